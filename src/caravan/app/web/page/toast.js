// One line at the foot of the window that says what was done, with a way back.

import { element } from "./elements.js";

const SHOWN = 8000; // milliseconds; it stays while the pointer or the focus is on it
let timer = 0;

export function toast(words, action = null) {
  const place = document.getElementById("toast");
  const button =
    action &&
    element("button", { type: "button", onclick: () => (place.replaceChildren(), action.act()) }, action.label);
  const line = element("div", { class: "toast-line" }, element("span", {}, words), button);
  place.replaceChildren(line);
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (line.matches(":hover, :focus-within")) later();
      else if (line.isConnected) place.replaceChildren();
    }, SHOWN);
  };
  later();
}
