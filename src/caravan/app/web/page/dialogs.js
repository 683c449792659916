// Dialogs: opened with a task, closed when it is done; a refusal is shown inside and nothing typed is lost.

import { currentKey, ServiceError, useKey } from "./service.js";
import { sentence } from "./trouble.js";

/**
 * Open a dialog.
 * @param {HTMLDialogElement} dialog - with one form, an element .fault and buttons [data-close]
 * @param {() => Promise<any>} act - what submitting does; an error that it throws is shown
 * @returns {Promise<any>} what `act` gave, or undefined where the dialog was left.
 */
export function opened(dialog, act) {
  const form = dialog.querySelector("form");
  const fault = dialog.querySelector(".fault");
  const buttons = [...form.querySelectorAll("[type=submit]")];
  fault.textContent = "";
  return new Promise((resolve) => {
    let result;
    const ended = new AbortController();
    const on = (node, name, listener) => node.addEventListener(name, listener, { signal: ended.signal });
    on(form, "submit", async (event) => {
      event.preventDefault();
      fault.textContent = "";
      for (const button of buttons) button.disabled = true;
      try {
        result = await act();
        dialog.close();
      } catch (error) {
        fault.textContent = sentence(error.message);
      } finally {
        for (const button of buttons) button.disabled = false;
      }
    });
    on(dialog, "click", (event) => {
      if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
    });
    on(dialog, "close", () => {
      ended.abort();
      resolve(result);
    });
    dialog.showModal();
  });
}

/** Ask for a key; gives up with an error where none is given. */
export async function keyDialog(why) {
  const dialog = document.getElementById("key-dialog");
  const box = dialog.querySelector("input");
  const forget = dialog.querySelector("[data-part=forget]");
  dialog.querySelector("[data-part=why]").textContent = why;
  box.value = "";
  forget.hidden = currentKey() === "";
  let forgotten = false;
  forget.onclick = () => {
    useKey("");
    forgotten = true;
    dialog.close();
  };
  const given = await opened(dialog, async () => {
    const key = box.value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) throw new ServiceError("a key has printable ASCII characters without spaces", 0);
    useKey(key);
    return true;
  });
  if (!given && !forgotten) throw new ServiceError("Without a key the service does not answer.", 401);
}
