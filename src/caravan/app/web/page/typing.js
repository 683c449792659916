// Answers while somebody types: only the last question counts, whatever order answers come in.

const PAUSE = 120; // milliseconds without a key; shorter than the gap between two slow keys

/**
 * Run a search when the text of a box has changed.
 * @param {HTMLInputElement} box
 * @param {(text: string, signal: AbortSignal) => Promise<void>} run - shows nothing where `signal.aborted`
 * @returns {() => Promise<void>} runs at once.
 */
export function asTyped(box, run) {
  let timer = 0;
  let last = new AbortController();
  async function now() {
    clearTimeout(timer);
    last.abort();
    last = new AbortController();
    await run(box.value.trim(), last.signal);
  }
  box.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(now, PAUSE);
  });
  box.form?.addEventListener("submit", (event) => {
    event.preventDefault();
    now();
  });
  return now;
}

/**
 * Take the query that an address names: into the box, and searched unless it is there and was shown already.
 * @param {HTMLElement} root - of the page; remembers that it was shown
 * @param {HTMLInputElement} box
 * @param {URLSearchParams} parameters
 * @param {() => Promise<void>} now - searches for what is in the box
 */
export function takeQuery(root, box, parameters, now) {
  const query = parameters.get("q") ?? "";
  if (query !== box.value.trim() || !root.dataset.shown) {
    box.value = query;
    now();
  }
  root.dataset.shown = "yes";
}
