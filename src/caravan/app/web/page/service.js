// What the page asks of the service: JSON, streams of events, the key, and errors in the service's own words.

const KEPT = "caravan-key"; // in this tab's session storage

let askForKey = () => Promise.reject(new ServiceError("a key is needed", 401));
let asking = null; // one question for a key at a time, however many requests wait for it

/** An answer that is none; status 0: the service cannot be reached. */
export class ServiceError extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  get passing() {
    return this.status === 429 || this.status === 503;
  }
}

/** Whether a request was given up by the page itself. */
export const isAbort = (error) => error.name === "AbortError";

export const currentKey = () => sessionStorage.getItem(KEPT) ?? "";

export function useKey(key) {
  if (key) sessionStorage.setItem(KEPT, key);
  else sessionStorage.removeItem(KEPT);
}

/** Say how to ask a person for a key: a function of (why) that gives a promise. */
export function whenKeyIsNeeded(ask) {
  askForKey = ask;
}

/** Ask and give the answer's JSON. */
export async function ask(path, options = {}) {
  const response = await send(path, options);
  try {
    return await response.json();
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ServiceError("The answer broke off.", 0);
  }
}

/** Ask for a stream and give its events as they come: {name, data}, data as JSON. */
export async function* events(path, options = {}) {
  const response = await send(path, { ...options, accept: "text/event-stream" });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text = (text + value).replace(/\r\n/g, "\n");
      for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
        const event = parsed(text.slice(0, end));
        if (event) yield event;
      }
    }
  } catch (error) {
    if (isAbort(error) || error instanceof ServiceError) throw error;
    throw new ServiceError("The stream broke off.", 0);
  } finally {
    reader.cancel().catch(() => {}); // a stream that broke off is over anyway
  }
}

/** A path with a query string; what is empty is left out. */
export function withQuery(path, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) if (value !== "" && value !== null) query.append(name, value);
  return query.size ? `${path}?${query}` : path;
}

async function send(path, { method = "GET", body, signal, accept = "application/json" }) {
  for (;;) {
    const key = currentKey();
    const headers = { accept };
    if (key) headers.authorization = `Bearer ${key}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, signal, cache: "no-store", body: JSON.stringify(body) });
    } catch (error) {
      if (isAbort(error)) throw error;
      throw new ServiceError("The service cannot be reached.", 0);
    }
    if (response.ok) return response;
    const refusal = await refusalOf(response);
    if (response.status !== 401) throw refusal;
    if (key === currentKey()) await newKey(key ? `${refusal.message}.` : "This service asks for a key.");
    signal?.throwIfAborted();
  }
}

async function refusalOf(response) {
  const seconds = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  let message = `The service answered ${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error ?? message;
  } catch {
    // No JSON: something between here and the service has answered.
  }
  return new ServiceError(message, response.status, Number.isNaN(seconds) ? null : seconds);
}

function newKey(why) {
  asking ??= askForKey(why).finally(() => {
    asking = null;
  });
  return asking;
}

function parsed(block) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    if (colon === 0) continue; // a comment: a sign of life
    const [field, rest] = colon < 0 ? [line, ""] : [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, "")];
    if (field === "event") name = rest;
    if (field === "data") data.push(rest);
  }
  return data.length ? { name, data: JSON.parse(data.join("\n")) } : null;
}
