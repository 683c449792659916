// Making elements: everything that the service says goes in as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  right: "M3 8.5l3.5 3.5L13 4.5",
  wrong: "M4 4l8 8M12 4l-8 8",
  up: "M8 13V3M4 7l4-4 4 4",
  down: "M8 3v10M4 9l4 4 4-4",
  same: "M3 6h10M3 10h10",
};

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An element; strings among the children become text. */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An element of a drawing. */
export function drawn(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** A small picture beside words that say the same. */
export function icon(name) {
  const path = drawn("path", { d: ICONS[name] });
  return drawn("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true" }, path);
}

/** The parts of a view by their name. */
export function partsOf(root) {
  return Object.fromEntries([...root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
}

/** Show or hide, and replace what is inside. */
export function show(part, ...children) {
  const kept = children.filter((child) => child !== null && child !== undefined && child !== "");
  part.replaceChildren(...kept);
  part.hidden = kept.length === 0;
}

/** A bar as long as a probability, with the number beside it, which is what a screen reader says. */
export function probabilityBar(probability, what = "probability") {
  const inner = element("span", { class: "bar-inner" });
  inner.style.setProperty("--share", probability);
  return element(
    "span",
    { class: "probability" },
    element("span", { class: "bar", "aria-hidden": "true" }, inner),
    element("span", { class: "number" }, percent(probability), element("span", { class: "unseen" }, ` ${what}`)),
  );
}

/** 0.1234 -> 12.3%. */
export function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1%";
  return `${(share * 100).toFixed(share >= 0.9995 ? 0 : 1)}%`;
}

/** A count with its noun. */
export function counted(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

/** A sentence whose options of the command line are not broken over two lines. */
export function withOptions(sentence) {
  return sentence.split(/(--[a-z-]+)/).map((piece) => (piece.startsWith("--") ? element("code", {}, piece) : piece));
}

/** Metadata as small labels. */
export function labels(metadata) {
  const pairs = Object.entries(metadata ?? {});
  if (pairs.length === 0) return null;
  const items = pairs.map(([name, value]) =>
    element("li", {}, element("span", { class: "muted" }, `${name} `), String(value)),
  );
  return element("ul", { class: "labels", "aria-label": "Metadata" }, ...items);
}
