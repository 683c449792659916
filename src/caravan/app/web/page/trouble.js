// What is shown when an answer does not come: busy, not reachable, no key, refused; with a way on.

import { element, show } from "./elements.js";
import { isAbort } from "./service.js";

const LONGEST = 15; // seconds between two tries
const tries = new WeakMap(); // place -> how often it failed in a row
const timers = new WeakMap();
let lost = () => {};

/** Say what to do when the service cannot be reached at all. */
export function whenLost(act) {
  lost = act;
}

/** Nothing is wrong (any more). */
export function clearTrouble(place) {
  tries.delete(place);
  quiet(place);
}

/**
 * Show an error in a place and offer to try again; what passes is tried again by itself.
 * @param {HTMLElement} place
 * @param {Error} error
 * @param {() => void} again
 */
export function showTrouble(place, error, again) {
  quiet(place);
  if (isAbort(error)) return;
  if (error.status === undefined) console.error(error); // a fault of the page
  if (error.status === 0) lost();
  const button = element("button", { type: "button", onclick: () => (quiet(place), again()) }, "Try again");
  if (!error.passing) {
    show(place, element("div", { class: "notice", role: "alert" }, element("p", {}, sentence(error.message)), button));
    return;
  }
  const count = (tries.get(place) ?? 0) + 1;
  tries.set(place, count);
  const seconds = Math.min(LONGEST, Math.max(error.retryAfter ?? 1, 2 ** (count - 1)));
  const words = error.status === 429 ? "Many people are asking right now." : "The service is not ready for this yet.";
  const hint = element("span", { class: "hint" }, `(${error.message})`);
  show(
    place,
    element(
      "div",
      { class: "notice busy", role: "alert" },
      element("p", {}, `${words} Trying again in ${seconds} s. `, hint),
      button,
    ),
  );
  timers.set(place, setTimeout(again, seconds * 1000));
}

/** First letter large, a full stop at the end: the service writes its errors as parts of a line. */
export function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(whole) ? whole : `${whole}.`;
}

function quiet(place) {
  clearTimeout(timers.get(place));
  show(place);
}
