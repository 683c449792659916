// Lines between neighbouring columns that join the same document; the one under the pointer or focus stands out.

import { drawn } from "./elements.js";

/**
 * Draw lines over a row of columns, and again whenever its size changes.
 * @param {HTMLElement} row - its children .column hold items [data-document]
 * @returns {() => void} draws anew, after the columns were replaced.
 */
export function connect(row) {
  function draw() {
    row.querySelector(".lines")?.remove();
    if (row.hidden || !row.clientWidth) return;
    if (row.scrollWidth > row.clientWidth + 1) return; // columns that are swiped have no gaps between them
    const place = row.getBoundingClientRect();
    const size = { width: row.clientWidth, height: row.clientHeight };
    const lines = drawn("svg", { class: "lines", "aria-hidden": "true", ...size });
    const columns = [...row.querySelectorAll(".column[data-column]")];
    for (const [index, left] of columns.slice(0, -1).entries()) {
      const right = new Map(items(columns[index + 1]).map((item) => [item.dataset.document, item]));
      for (const from of items(left)) {
        const to = right.get(from.dataset.document);
        if (to) lines.append(line(place, from, to));
      }
    }
    row.append(lines);
  }

  function point(id) {
    for (const part of row.querySelectorAll("[data-document]")) {
      part.classList.toggle("same-document", part.dataset.document === id);
    }
  }
  const pointed = (event) => point(event.target.closest?.("[data-document]")?.dataset.document);
  row.addEventListener("pointerover", pointed);
  row.addEventListener("pointerleave", () => point(undefined));
  row.addEventListener("focusin", pointed);
  row.addEventListener("focusout", () => point(undefined));
  new ResizeObserver(draw).observe(row);
  return draw;
}

const items = (column) => [...column.querySelectorAll("li")];

function line(place, from, to) {
  const [a, b] = [from.getBoundingClientRect(), to.getBoundingClientRect()];
  const [x1, y1] = [a.right - place.left, a.top + a.height / 2 - place.top];
  const [x2, y2] = [b.left - place.left, b.top + b.height / 2 - place.top];
  const middle = (x1 + x2) / 2;
  return drawn("path", {
    d: `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`,
    "data-document": from.dataset.document,
  });
}
