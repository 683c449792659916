// The page Search: ranked documents as one types, read, marked right or wrong.

import { counted, element, labels, partsOf, probabilityBar, show, withOptions } from "./elements.js";
import { markButtons, readMarks } from "./marks.js";
import { carry, note, address } from "./routes.js";
import { served, whyNot } from "./served.js";
import { ask } from "./service.js";
import { clearTrouble, showTrouble } from "./trouble.js";
import { asTyped, takeQuery } from "./typing.js";
import { excerpt, marked, wordsOf } from "./words.js";

const FIRST = 10; // results at once
const MOST = 50;
const EXAMPLES = 6;

export function searchPage(root) {
  const parts = partsOf(root);
  const box = parts.form.querySelector("input");
  let count = FIRST;
  const now = asTyped(box, run);

  async function run(query, signal, kept = 0) {
    if (!kept) count = FIRST;
    note("search", { q: query });
    carry(query);
    if (!query) {
      clearTrouble(parts.trouble);
      nothing();
      await start(signal);
      return;
    }
    const started = performance.now();
    try {
      const question = { method: "POST", body: { query, k: count }, signal };
      const [answer, info] = await Promise.all([ask("search", question), served(), readMarks()]);
      if (signal.aborted) return;
      clearTrouble(parts.trouble);
      results(query, answer.results[0].hits, info, Math.max(1, Math.round(performance.now() - started)));
      if (kept) titles()[kept]?.focus();
    } catch (error) {
      if (signal.aborted) return;
      nothing();
      showTrouble(parts.trouble, error, now);
    }
  }

  function nothing() {
    show(parts.results);
    show(parts.reason);
    show(parts.empty);
    parts.more.hidden = true;
    parts.status.textContent = "";
  }

  function results(query, hits, info, milliseconds) {
    const words = wordsOf(query);
    const reason = whyNot(info, "mark results");
    show(parts.empty);
    show(parts.results, ...hits.map((hit) => result(query, hit, words, reason)));
    show(parts.reason, ...withOptions(reason ?? ""));
    parts.more.hidden = hits.length < count || count >= Math.min(MOST, info.documents);
    const all = info.documents.toLocaleString("en");
    parts.status.textContent = `${counted(hits.length, "document")} of ${all}, in ${milliseconds} ms`;
  }

  async function start(signal) {
    try {
      const [info, { documents }] = await Promise.all([served(), ask("documents?limit=100", { signal })]);
      if (signal.aborted) return;
      const step = Math.max(1, Math.floor(documents.length / EXAMPLES));
      const some = documents.filter((_, index) => index % step === 0).slice(0, EXAMPLES);
      show(parts.empty, ...welcome(info, some));
    } catch (error) {
      if (!signal.aborted) showTrouble(parts.trouble, error, now);
    }
  }

  const titles = () => [...parts.results.querySelectorAll(".title")];

  parts.more.firstElementChild.onclick = () => {
    const before = titles().length;
    count = Math.min(MOST, count + FIRST);
    run(box.value.trim(), new AbortController().signal, before);
  };

  root.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !parts.results.children.length) return;
    const all = titles();
    const at = all.indexOf(document.activeElement?.closest(".result")?.querySelector(".title"));
    const inBox = document.activeElement === box;
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to !== undefined && (at >= 0 || (inBox && event.key === "ArrowDown"))) {
      event.preventDefault();
      if (to < 0) box.focus();
      else all[Math.min(to, all.length - 1)].focus();
    } else if (at >= 0 && (event.key === "r" || event.key === "w")) {
      all[at].closest(".result").querySelector(event.key === "r" ? ".mark.good" : ".mark.bad").click();
    }
  });

  return {
    box,
    show(parameters) {
      takeQuery(root, box, parameters, now);
    },
    anew: now,
  };
}

function result(query, hit, words, reason) {
  const text = element("p", { class: "text", id: `text-${hit.rank}` }, ...marked(excerpt(hit.text, words), words));
  const title = element(
    "button",
    { type: "button", class: "title", "aria-expanded": "false", "aria-controls": text.id },
    ...marked(hit.title || hit.doc_id, words),
  );
  title.onclick = () => {
    const open = title.getAttribute("aria-expanded") !== "true";
    title.setAttribute("aria-expanded", String(open));
    text.replaceChildren(...marked(open ? hit.text : excerpt(hit.text, words), words));
  };
  return element(
    "li",
    { class: "result", "data-document": hit.doc_id },
    element("span", { class: "rank", "aria-hidden": "true" }, String(hit.rank)),
    element("h2", {}, title),
    probabilityBar(hit.probability),
    text,
    element(
      "div",
      { class: "foot" },
      element("code", {}, hit.doc_id),
      labels(hit.metadata),
      markButtons(query, hit, reason),
    ),
  );
}

function welcome(info, documents) {
  const examples = documents.map((document) => document.title || document.text.slice(0, 60));
  return [
    element("h2", {}, "Try one"),
    element(
      "ul",
      { class: "examples" },
      ...examples.map((words) => element("li", {}, element("a", { href: address("search", { q: words }) }, words))),
    ),
    element("h2", {}, "What is served"),
    facts([
      ["Retriever", info.model_id],
      ["Documents", info.documents.toLocaleString("en")],
      ["Adapter", `${info.adapter}, ${info.width} numbers a text`],
      ["Answers by", info.generator],
      ["Changed since training", changed(info.changes)],
      ["Results marked", info.marks.toLocaleString("en")],
    ]),
  ];
}

function changed(changes) {
  const words = Object.entries(changes ?? {}).filter(([, count]) => count > 0);
  return words.length ? words.map(([what, count]) => `${count.toLocaleString("en")} ${what}`).join(", ") : "nothing";
}

/** Names with their values. */
export function facts(pairs) {
  const rows = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element(
    "dl",
    { class: "facts" },
    ...rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
}
