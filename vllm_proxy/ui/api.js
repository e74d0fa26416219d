// Every request to the daemon goes through `call`, which adds the key; no other module calls fetch.
// Addresses are relative to the page, so that it works behind any path prefix.
import { askForKey } from "./dialogs.js";

const root = new URL("../", location.href);
const SILENT_MS = 45_000; // the daemon sends something every 15 s: a stream without that is dead
let key = ""; // in memory alone: it is gone with the tab
let asking = null; // the dialogue that is open, for all calls that wait for it
const listeners = new Set(); // of a change of the key

// An answer that is none of 2xx: `status`, and of the daemon's error `code`, `message` and `problems`.
export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `HTTP ${status}`);
    this.name = "Refused";
    this.status = status;
    this.code = error?.code;
    this.problems = error?.problems ?? [];
  }
}

export const address = (path) => new URL(path, root);
export const hasKey = () => key !== "";

export function useKey(given) {
  key = given;
  for (const listener of listeners) listener();
}

// Open the dialogue for a key, unless it is open; true once one was given, false where that was declined.
export function enterKey(why = "") {
  asking ??= askForKey(why, hasKey())
    .then((given) => {
      if (given === null) return false;
      useKey(given);
      if (!given) location.reload(); // what was shown for it goes as well
      return given !== "";
    })
    .finally(() => {
      asking = null;
    });
  return asking;
}

// Returns the JSON of the answer (null of 204); with `raw` the Response. `body` is made JSON unless `type` is given.
// A 401 opens the dialogue for a key, unless `quiet`: what nobody has clicked for interrupts nobody.
// Throws Refused, TypeError without a connection, AbortError.
export async function call(method, path, { body, type, headers, signal, raw, quiet } = {}) {
  const sent = {
    ...(body !== undefined && { "Content-Type": type ?? "application/json" }),
    ...(key && { Authorization: `Bearer ${key}` }),
    ...headers,
  };
  const text = body === undefined || type ? body : JSON.stringify(body);
  const answer = await fetch(address(path), { method, body: text, signal, headers: sent, cache: "no-store" });
  if (answer.ok) return raw ? answer : answer.status === 204 ? null : answer.json();
  const refused = new Refused(answer.status, (await answer.json().catch(() => null))?.error);
  if (answer.status === 401 && !quiet && (await enterKey(refused.message))) {
    return call(method, path, { body, type, headers, signal, raw });
  }
  throw refused;
}

// The server-sent events of an answer: {event, data, id}. `beat` is called with everything that comes.
export async function* events(answer, beat = () => {}) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    beat();
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const found = parsed(block);
      if (found.data !== null) yield found;
    }
  }
}

function parsed(block) {
  const found = { event: "message", data: null, id: null };
  for (const line of block.split(/\r?\n/)) {
    const at = line.indexOf(":");
    if (at < 1) continue;
    const name = line.slice(0, at);
    const text = line.slice(at + 1).replace(/^ /, "");
    found[name] = name === "data" && found.data !== null ? `${found.data}\n${text}` : text;
  }
  return found;
}

// Follow a stream of events as long as it is wanted and the tab is seen; a lost connection is made anew.
// EventSource cannot send a key, and would keep its connection in hidden tabs: browsers have six for one server.
//   path: a function; each: called with an event; told: (connected, a Refused or null); signal: ends it;
//   quiet: as of `call`; without it, the dialogue opens once.
export async function follow(path, each, told, { signal, quiet = false } = {}) {
  let silent = quiet;
  for (let wait = 500; !signal?.aborted; wait = Math.min(wait * 2, 10_000)) {
    await seen(signal);
    const stop = new AbortController();
    const end = () => stop.abort();
    let anew = false; // there is another key: what follows is for its holder
    const change = () => {
      anew = true;
      end();
    };
    const hide = () => document.hidden && end();
    let alive = setTimeout(end, SILENT_MS);
    const beat = () => {
      clearTimeout(alive);
      alive = setTimeout(end, SILENT_MS);
    };
    document.addEventListener("visibilitychange", hide);
    signal?.addEventListener("abort", end);
    let why = null;
    try {
      if (signal?.aborted) return;
      const answer = await call("GET", path(), { raw: true, signal: stop.signal, quiet: silent });
      listeners.add(change);
      told(true, null);
      silent = quiet;
      wait = 250;
      for await (const event of events(answer, beat)) delivered(each, event);
    } catch (error) {
      if (error instanceof Refused) {
        why = error;
        silent = true;
        if (error.status < 500) wait = 10_000;
      } else if (error.name !== "AbortError" && !(error instanceof TypeError)) throw error;
    } finally {
      clearTimeout(alive);
      listeners.delete(change);
      document.removeEventListener("visibilitychange", hide);
      signal?.removeEventListener("abort", end);
    }
    if (signal?.aborted) return;
    if (!document.hidden && !anew) {
      told(false, why);
      await pause(wait, signal);
    }
  }
}

// A fault in what takes an event is told (app.js does, of all of them), and ends no stream.
function delivered(each, event) {
  try {
    each(event);
  } catch (error) {
    reportError(error);
  }
}

// Until the tab is seen.
function seen(signal) {
  return new Promise((done) => {
    if (!document.hidden) return done();
    const look = () => {
      if (document.hidden && !signal?.aborted) return;
      document.removeEventListener("visibilitychange", look);
      done();
    };
    document.addEventListener("visibilitychange", look);
    signal?.addEventListener("abort", look, { once: true });
  });
}

// For a time; until there is another key.
function pause(ms, signal) {
  return new Promise((done) => {
    const end = () => {
      clearTimeout(timer);
      listeners.delete(end);
      signal?.removeEventListener("abort", end);
      done();
    };
    const timer = setTimeout(end, ms);
    listeners.add(end);
    signal?.addEventListener("abort", end, { once: true });
  });
}

// Call `work` now and every `ms` while the tab is seen, until the signal; what it throws is passed to `failed`.
export async function repeat(work, ms, signal, failed = () => {}) {
  while (!signal.aborted) {
    await seen(signal);
    if (signal.aborted) return;
    try {
      await work(signal);
    } catch (error) {
      if (!signal.aborted) failed(error);
    }
    await pause(ms, signal);
  }
}
