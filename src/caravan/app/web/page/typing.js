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
