// What is served, asked once and again after a change; every page looks here for what may be done.

import { ask } from "./service.js";

let known = null;
let coming = null;

/** What /info says; asked for the first time where it is not known. */
export function served() {
  if (known) return Promise.resolve(known);
  coming ??= ask("info")
    .then((info) => {
      known = info;
      document.dispatchEvent(new CustomEvent("served", { detail: info }));
      return info;
    })
    .finally(() => {
      coming = null;
    });
  return coming;
}

/** Ask again: a key, the documents or the marks are others now. */
export function servedAnew() {
  known = null;
  return served();
}

/** What stands where nothing may be changed, or null where it may. */
export function whyNot(info, what) {
  if (info.can_change) return null;
  return (
    `You can look but not ${what}: that needs a write key, or a service started with --local-changes ` +
    `and asked from the same machine.`
  );
}
