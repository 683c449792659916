// The page Ask: an answer as it is written, with the documents that it cites.

import { counted, element, labels, partsOf, probabilityBar, show } from "./elements.js";
import { carry, note } from "./routes.js";
import { served, servedAnew } from "./served.js";
import { ask, events, ServiceError, withQuery } from "./service.js";
import { clearTrouble, showTrouble } from "./trouble.js";
import { marked, wordsOf } from "./words.js";

const PATIENCE = 2500; // milliseconds after which a person is told why it takes long
const SLOW = "Still looking. The first answer after a start can take a minute. ";

export function askPage(root) {
  const parts = partsOf(root);
  const box = parts.form.querySelector("input");
  let last = new AbortController();

  async function run() {
    const query = box.value.trim();
    if (!query) return;
    last.abort();
    last = new AbortController();
    const { signal } = last;
    note("ask", { q: query });
    carry(query);
    clearTrouble(parts.trouble);
    show(parts.empty);
    const text = element("p", { class: "written writing" });
    show(parts.answer, element("article", { class: "answer", "aria-busy": "true" }, text));
    parts.status.textContent = "Looking for an answer";
    const slow = setTimeout(() => text.append(element("span", { class: "hint" }, SLOW)), PATIENCE);
    try {
      const answer = await written(query, signal, (words) => {
        clearTimeout(slow);
        text.replaceChildren(words);
      });
      if (signal.aborted) return;
      const documents = await texts(answer.found, signal);
      if (signal.aborted) return;
      show(parts.answer, ...whole(answer, documents, wordsOf(query), await servedAnew()));
      parts.status.textContent = answer.known
        ? `Answered, citing ${counted(answer.citations.length, "document")}.`
        : "There is no sure answer; the closest documents are listed.";
    } catch (error) {
      if (signal.aborted) return;
      show(parts.answer);
      parts.status.textContent = "";
      showTrouble(parts.trouble, error, run);
    } finally {
      clearTimeout(slow);
    }
  }

  parts.form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  box.addEventListener("input", () => carry(box.value.trim()));

  return {
    box,
    async show(parameters) {
      const query = parameters.get("q") ?? "";
      if (query && query !== box.value.trim()) {
        last.abort();
        box.value = query;
        show(parts.answer);
      }
      try {
        const info = await served();
        parts.lead.textContent = `Answers come from the documents alone, written by ${writer(info.generator)}.`;
        if (!parts.answer.hasChildNodes()) show(parts.empty, element("p", {}, hint(info)));
      } catch (error) {
        showTrouble(parts.trouble, error, () => this.show(parameters));
      }
    },
    anew: () => {},
  };
}

/** Ask with a stream, show pieces as they come, and give the last event, which alone is final. */
async function written(query, signal, tell) {
  let words = "";
  for await (const { name, data } of events("ask", { method: "POST", body: { query, stream: true }, signal })) {
    if (name === "piece") tell((words = data.afresh ? data.text : words + data.text));
    if (name === "error") throw new ServiceError(data.error, 502);
    if (name === "answer") return data;
  }
  throw new ServiceError("The answer broke off.", 502);
}

/** What the documents say; one that was removed meanwhile is left out. */
async function texts(found, signal) {
  const one = async ({ doc_id }) => {
    try {
      return (await ask(withQuery("documents", { doc_id }), { signal })).documents[0];
    } catch (error) {
      if (error.status === 404) return null;
      throw error;
    }
  };
  const documents = await Promise.all(found.map(one));
  return new Map(documents.filter(Boolean).map((document) => [document.doc_id, document]));
}

function whole(answer, documents, words, info) {
  const cited = new Set(answer.citations.map((citation) => citation.number));
  const other = answer.found.filter((citation) => !cited.has(citation.number));
  const list = (citations) =>
    element("ol", { class: "sources" }, ...citations.map((citation) => source(citation, documents, words)));
  const scale = info.calibrated ? "the scale is set on validation queries" : "the scale is not calibrated";
  const confidence = element(
    "div",
    { class: "confidence" },
    element("span", {}, "Confidence"),
    probabilityBar(answer.confidence, "that a document answers this"),
    element("span", { class: "hint" }, [!answer.known && "too little to answer", scale].filter(Boolean).join("; ")),
  );
  const body = answer.known
    ? element("p", { class: "written" }, ...linked(answer.text, new Set(answer.found.map(({ number }) => number))))
    : element("p", { class: "written unknown" }, answer.text);
  return [
    element("article", { class: "answer", "data-known": String(answer.known) }, body, confidence),
    ...(answer.citations.length ? [element("h2", {}, "Cited"), list(answer.citations)] : []),
    ...(other.length ? [element("h2", {}, answer.known ? "Also read" : "Closest documents"), list(other)] : []),
  ];
}

/** A text whose [1] lead to the documents below. */
function linked(text, numbers) {
  return text.split(/(\[\d+\])/).map((piece) => {
    const number = Number(piece.slice(1, -1));
    if (!/^\[\d+\]$/.test(piece) || !numbers.has(number)) return piece;
    return element("a", { href: `#source-${number}`, class: "cite", "aria-label": `Document ${number}` }, piece);
  });
}

function source(citation, documents, words) {
  const document = documents.get(citation.doc_id);
  return element(
    "li",
    { class: "source", id: `source-${citation.number}`, tabindex: "-1", "data-document": citation.doc_id },
    element("span", { class: "number-of", "aria-hidden": "true" }, `[${citation.number}]`),
    element("h3", {}, citation.title || citation.doc_id),
    probabilityBar(citation.probability, "that it answers"),
    document && element("p", { class: "text" }, ...marked(document.text, words)),
    element("div", { class: "foot" }, element("code", {}, citation.doc_id), document && labels(document.metadata)),
  );
}

function writer(generator) {
  return generator === "extractive" ? "quoting their best sentences" : generator;
}

function hint(info) {
  const when = "Where the documents do not answer, it says so and shows the closest ones.";
  return info.calibrated ? when : `${when} When it is too unsure was not set on validation queries yet.`;
}
