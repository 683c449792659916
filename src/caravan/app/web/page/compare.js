// The page Compare: three rankings of one query side by side, and what moved between them.

import { element, icon, partsOf, percent, show } from "./elements.js";
import { connect } from "./connections.js";
import { carry, note } from "./routes.js";
import { served } from "./served.js";
import { ask } from "./service.js";
import { clearTrouble, showTrouble } from "./trouble.js";
import { asTyped, takeQuery } from "./typing.js";

const SHOWN = 10; // documents a column
const RANKED = 50; // how far a document is looked for in the other rankings
const NAMES = { ours: "Ours", mips: "MIPS", bm25: "BM25" };
const WAYS = { ours: "trained adapter and head", mips: "the frozen model alone", bm25: "words in common" };

export function comparePage(root) {
  const parts = partsOf(root);
  const box = parts.form.querySelector("input");
  const now = asTyped(box, run);
  const redraw = connect(parts.columns);

  async function run(query, signal) {
    note("compare", { q: query });
    carry(query);
    if (!query) {
      clearTrouble(parts.trouble);
      show(parts.columns);
      parts.status.textContent = "";
      show(parts.empty, element("p", {}, "Type a query to see which documents each way of searching puts first."));
      return;
    }
    try {
      const info = await served();
      const k = Math.min(RANKED, info.documents);
      const body = { query, k, texts: false, bm25: true, mips: info.mips };
      const answer = await ask("search", { method: "POST", body, signal });
      if (signal.aborted) return;
      clearTrouble(parts.trouble);
      columns(answer.results[0], info);
    } catch (error) {
      if (signal.aborted) return;
      show(parts.columns);
      showTrouble(parts.trouble, error, now);
    }
  }

  function columns(result, info) {
    const rankings = { ours: result.hits, ...(info.mips && { mips: result.mips }), bm25: result.bm25 };
    const ranks = Object.fromEntries(
      Object.entries(rankings).map(([name, rows]) => [name, new Map(rows.map((row) => [row.doc_id, row.rank]))]),
    );
    show(parts.empty);
    show(
      parts.columns,
      ...Object.entries(rankings).map(([name, rows]) => column(name, rows.slice(0, SHOWN), ranks)),
      info.mips ? null : withoutMips(info),
    );
    parts.status.textContent = inWords(result.hits[0], ranks);
    redraw();
  }

  return {
    box,
    show(parameters) {
      takeQuery(root, box, parameters, now);
      redraw();
    },
    anew: now,
  };
}

function column(name, rows, ranks) {
  const heading = element("h2", { id: `column-${name}` }, NAMES[name], element("span", { class: "hint" }, WAYS[name]));
  const items = rows.map((row) =>
    element(
      "li",
      { tabindex: "0", "data-document": row.doc_id },
      element("span", { class: "rank", "aria-hidden": "true" }, String(row.rank)),
      element("span", { class: "what" }, row.title || row.doc_id),
      element(
        "span",
        { class: "moves" },
        element("span", { class: "muted" }, name === "ours" ? percent(row.probability) : row.score.toFixed(2)),
        ...moves(name, row, ranks),
      ),
    ),
  );
  const list = element("ol", { "aria-labelledby": heading.id }, ...items);
  const none = items.length === 0 && element("p", { class: "hint" }, "No document has a word of this query.");
  return element("div", { class: "column", "data-column": name }, heading, none || list);
}

/** In our column: how much higher or lower than by the others. In theirs: where it is by ours. */
function moves(name, row, ranks) {
  const others = Object.keys(ranks).filter((other) => (name === "ours" ? other !== "ours" : other === "ours"));
  return others.map((other) => {
    const there = ranks[other].get(row.doc_id);
    const where = NAMES[other];
    if (there === undefined) return tag("new", null, where, `not among the ${RANKED} first of ${where}`);
    const gain = name === "ours" ? there - row.rank : row.rank - there;
    if (gain === 0) return tag("same", "same", `same in ${where}`, `same place in ${where}`);
    const words = name === "ours" ? `${where} has it at ${there}` : `ours has it at ${there}`;
    const way = gain > 0 ? "up" : "down";
    return tag(way, way, `${Math.abs(gain)} ${name === "ours" ? "vs" : "in"} ${where}`, words);
  });
}

function tag(kind, picture, short, words) {
  const shown = element("span", { "aria-hidden": "true" }, picture ? icon(picture) : "not in ", short);
  const said = element("span", { class: "unseen" }, `, ${words}`);
  return element("span", { class: `move ${kind}`, title: words }, shown, said);
}

function withoutMips(info) {
  return element(
    "div",
    { class: "column off" },
    element("h2", {}, "MIPS", element("span", { class: "hint" }, "off")),
    element("p", {}, "Plain vector search is not kept ready. To see it here, start the service with"),
    element("p", {}, element("code", {}, `caravan serve ${info.model_id} --mips`)),
  );
}

function inWords(first, ranks) {
  const places = Object.entries(ranks)
    .filter(([name]) => name !== "ours")
    .map(([name, rows]) => {
      const rank = rows.get(first.doc_id);
      if (rank === 1) return `also first by ${NAMES[name]}`;
      return rank ? `number ${rank} by ${NAMES[name]}` : `not among the ${RANKED} first of ${NAMES[name]}`;
    });
  return `Ours puts “${first.title || first.doc_id}” first; it is ${places.join(" and ")}.`;
}
