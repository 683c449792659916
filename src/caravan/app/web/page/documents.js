// The page Documents: what can be found, page by page, and adding, editing and removing where the caller may.

import { opened } from "./dialogs.js";
import { counted, element, labels, partsOf, show, withOptions } from "./elements.js";
import { address, note } from "./routes.js";
import { served, servedAnew, whyNot } from "./served.js";
import { ask, withQuery } from "./service.js";
import { clearTrouble, showTrouble } from "./trouble.js";
import { asTyped } from "./typing.js";
import { toast } from "./toast.js";

const PAGE = 20; // documents
const AT_ONCE = 1000; // ids looked through with one request
const MOST = 20; // such requests

export function documentsPage(root) {
  const parts = partsOf(root);
  const filter = root.querySelector("#documents-filter");
  const dialog = document.getElementById("document-dialog");
  let offset = 0;
  let last = new AbortController();
  const now = () => run(filter.value.trim(), anew().signal);

  function anew() {
    last.abort();
    last = new AbortController();
    return last;
  }

  async function run(text, signal) {
    note("documents", { offset, id: text });
    try {
      const [info, found] = await Promise.all([served(), text ? matching(text, offset, signal) : page(offset, signal)]);
      if (signal.aborted) return;
      clearTrouble(parts.trouble);
      list(found, info, text);
    } catch (error) {
      if (signal.aborted) return;
      show(parts.list);
      parts.paging.hidden = true;
      showTrouble(parts.trouble, error, now);
    }
  }

  function list({ documents, total, cut }, info, text) {
    const reason = whyNot(info, "change documents");
    show(parts.reason, ...withOptions(reason ?? ""));
    parts.add.disabled = reason !== null;
    show(parts.list, ...documents.map((document) => row(document, reason)));
    const what = text ? `${counted(total, "document")} with “${text}” in the id` : counted(total, "document");
    parts.status.textContent = cut ? `${what}, among the first ${cut.toLocaleString("en")}` : what;
    parts.paging.hidden = total <= PAGE;
    parts.range.textContent = `${offset + 1} to ${offset + documents.length} of ${total.toLocaleString("en")}`;
    parts.earlier.disabled = offset === 0;
    parts.later.disabled = offset + PAGE >= total;
  }

  function row(document, reason) {
    const button = (word, act) =>
      element(
        "button",
        {
          type: "button",
          class: "quiet",
          disabled: reason !== null,
          "aria-label": `${word} ${document.doc_id}`,
          "aria-describedby": reason === null ? null : "documents-reason",
          onclick: () => act(document),
        },
        word,
      );
    return element(
      "li",
      { class: "document", "data-document": document.doc_id },
      element("h2", {}, document.title || document.doc_id),
      element("p", { class: "text clipped" }, document.text),
      element(
        "div",
        { class: "foot" },
        element("code", {}, document.doc_id),
        labels(document.metadata),
        element("span", { class: "buttons" }, button("Edit", edit), button("Remove", remove)),
      ),
    );
  }

  const box = (name) => dialog.querySelector(`#document-${name}`);

  function form(heading, document) {
    dialog.querySelector("h2").textContent = heading;
    for (const name of ["id", "title", "text", "metadata"]) box(name).value = "";
    box("id").readOnly = document !== null;
    box("id").toggleAttribute("autofocus", document === null);
    box("title").toggleAttribute("autofocus", document !== null);
    if (!document) return;
    box("id").value = document.doc_id;
    box("title").value = document.title;
    box("text").value = document.text;
    box("metadata").value = Object.entries(document.metadata)
      .map(([name, value]) => `${name}: ${value}`)
      .join("\n");
  }

  async function save(replace) {
    const document = {
      doc_id: box("id").value.trim(),
      title: box("title").value.trim(),
      text: box("text").value,
      metadata: pairs(box("metadata").value),
    };
    await ask("documents", { method: "POST", body: { documents: [document], replace } });
    return document;
  }

  async function add() {
    form("Add a document", null);
    const document = await opened(dialog, () => save(false));
    if (document) await changed(`“${document.title || document.doc_id}” is added and found from now on.`, document);
  }

  async function edit(document) {
    form("Edit the document", document);
    const saved = await opened(dialog, () => save(true));
    if (saved) await changed(`“${saved.title || saved.doc_id}” has its new text.`, saved);
  }

  async function remove(document) {
    const question = window.document.getElementById("remove-dialog");
    const name = document.title ? `${document.title} (${document.doc_id})` : document.doc_id;
    question.querySelector("[data-part=what]").textContent = name;
    const path = withQuery("documents", { doc_id: document.doc_id });
    const done = await opened(question, () => ask(path, { method: "DELETE" }));
    if (!done) return;
    if (offset > 0 && parts.list.children.length === 1) offset -= PAGE;
    await changed(`“${document.title || document.doc_id}” is removed.`);
  }

  async function changed(words, document = null) {
    const search = document && {
      label: "Search for it",
      act: () => (location.hash = address("search", { q: document.title || document.text.slice(0, 80) })),
    };
    toast(words, search);
    await servedAnew().catch(() => {}); // the list says what is wrong
    await now();
    const edited = document && [...parts.list.children].find((item) => item.dataset.document === document.doc_id);
    (edited?.querySelector("button") ?? root.querySelector("h1")).focus();
  }

  asTyped(filter, (text) => {
    offset = 0;
    return run(text, anew().signal);
  });
  parts.add.onclick = add;
  parts.earlier.onclick = () => turn(-PAGE);
  parts.later.onclick = () => turn(PAGE);

  async function turn(by) {
    offset = Math.max(0, offset + by);
    await now();
    root.querySelector("h1").focus();
  }

  return {
    box: filter,
    show(parameters) {
      offset = Math.max(0, Number.parseInt(parameters.get("offset") ?? "0", 10) || 0);
      filter.value = parameters.get("id") ?? "";
      return now();
    },
    anew: now,
  };
}

async function page(offset, signal) {
  return ask(withQuery("documents", { offset, limit: PAGE }), { signal });
}

/** Documents whose id has a text in it; the service has no such filter, so ids are looked through in parts. */
async function matching(text, offset, signal) {
  const wanted = text.toLowerCase();
  const found = [];
  for (let part = 0; part < MOST; part += 1) {
    const path = withQuery("documents", { offset: part * AT_ONCE, limit: AT_ONCE });
    const { documents, total } = await ask(path, { signal });
    found.push(...documents.filter((document) => document.doc_id.toLowerCase().includes(wanted)));
    if ((part + 1) * AT_ONCE >= total) return { documents: found.slice(offset, offset + PAGE), total: found.length };
  }
  return { documents: found.slice(offset, offset + PAGE), total: found.length, cut: MOST * AT_ONCE };
}

function pairs(lines) {
  const metadata = {};
  for (const line of lines.split("\n").filter((line) => line.trim())) {
    const colon = line.indexOf(":");
    if (colon < 1) throw new Error(`metadata: “${line.trim()}” has no colon; write name: value`);
    metadata[line.slice(0, colon).trim()] = line.slice(colon + 1).trim();
  }
  return metadata;
}
