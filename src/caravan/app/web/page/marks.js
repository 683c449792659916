// Results marked right or wrong: kept by the service, shown wherever the same result is, taken back on a click.

import { element, icon } from "./elements.js";
import { ask, isAbort, withQuery } from "./service.js";
import { servedAnew } from "./served.js";
import { toast } from "./toast.js";
import { sentence } from "./trouble.js";

const MOST = 1000; // marks read at the start
let known = null; // "query\0doc_id" -> whether it is right

const name = (query, doc_id) => `${query}\0${doc_id}`;

/** Read the marks that there are; without them results are shown unmarked. */
export async function readMarks() {
  if (known) return;
  try {
    const { marks } = await ask(withQuery("marks", { limit: MOST }));
    known = new Map(marks.map((mark) => [name(mark.query, mark.doc_id), mark.right]));
  } catch (error) {
    if (isAbort(error)) return;
    known = new Map();
  }
}

/** Forget what was read: another caller may have other marks. */
export function forgetMarks() {
  known = null;
}

/** Two buttons, of which one may be pressed. */
export function markButtons(query, hit, reason) {
  const buttons = [true, false].map((right) => {
    const word = right ? "Right" : "Wrong";
    return element(
      "button",
      {
        type: "button",
        class: `mark ${right ? "good" : "bad"}`,
        "data-right": String(right),
        "aria-label": `${word}: ${hit.title || hit.doc_id}`,
        disabled: reason !== null,
        "aria-describedby": reason === null ? null : "search-reason",
        onclick: () => mark(query, hit, known?.get(name(query, hit.doc_id)) === right ? null : right, group),
      },
      icon(right ? "right" : "wrong"),
      word,
    );
  });
  const group = element("span", { class: "marks", role: "group", "aria-label": "Mark this result" }, ...buttons);
  press(group, known?.get(name(query, hit.doc_id)));
  return group;
}

/** Keep a mark, or take it back where `right` is null. */
async function mark(query, hit, right, group) {
  const before = known?.get(name(query, hit.doc_id)) ?? null;
  press(group, right);
  try {
    await keep(query, hit.doc_id, right);
  } catch (error) {
    press(group, before);
    toast(`Not marked. ${sentence(error.message)}`);
    return;
  }
  const what = `“${hit.title || hit.doc_id}”`;
  const done = right === null ? "not marked any more" : `marked ${right ? "right" : "wrong"}`;
  toast(`${what} is ${done}.`, { label: "Undo", act: () => mark(query, hit, before, group) });
}

/** Tell the service; also used by the list of marks. */
export async function keep(query, doc_id, right) {
  known ??= new Map();
  if (right === null) {
    await ask(withQuery("marks", { query, doc_id }), { method: "DELETE" });
    known.delete(name(query, doc_id));
  } else {
    await ask("marks", { method: "POST", body: { query, doc_id, right } });
    known.set(name(query, doc_id), right);
  }
  servedAnew().catch(() => {}); // only the number of marks is another
}

function press(group, right) {
  for (const button of group.children) {
    button.setAttribute("aria-pressed", String(button.dataset.right === String(right)));
  }
}
