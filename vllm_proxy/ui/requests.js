// Requests: those in flight, which can be cancelled, and the last ones, each with where its time went.
import { call, repeat } from "./api.js";
import { ask } from "./dialogs.js";
import { bytes, clock, enable, h, keyed, s, say, seconds, setAttribute, setText, show, table } from "./dom.js";

const SHOWN = 200;
const ALL = 1000; // that the daemon keeps: those are filtered
const PAUSE_MS = 2000;
const AT_ONCE = 0.02; // seconds in which nothing streams

const place = (one) => (one.model === null ? "–" : `${one.model}${one.replica === null ? "" : `/${one.replica}`}`);
const toRequest = (one) => h("a", { href: `#/requests/${encodeURIComponent(one.engine_id)}` }, one.id);
const toCode = (one) => one.code && h("a", { href: `../help/${one.code}` }, one.code);
const toModel = (one) =>
  one.model === null ? "–" : h("a", { href: `#/model/${encodeURIComponent(one.model)}` }, place(one));
const isBad = (one) => one.status === null || one.status >= 400 || one.code !== null;
const text = (one) =>
  [place(one), one.route, one.state, one.client, one.key, one.id, one.engine_id, one.status, one.code]
    .join(" ")
    .toLowerCase();
const bySpeed = (one) => {
  if (one.first_byte === null || !(one.completion_tokens > 1)) return "–";
  const span = one.seconds - one.first_byte;
  if (span >= AT_ONCE) return ((one.completion_tokens - 1) / span).toFixed(1);
  const whole = one.seconds - one.queue_seconds; // it was not streamed: its first byte is its last
  return whole > 0 ? (one.completion_tokens / whole).toFixed(1) : "–";
};

// Where the time of a request went: in the queue, until the first byte, until the last.
function bar(one) {
  const whole = Math.max(one.seconds, 1e-6);
  const queue = Math.min(one.queue_seconds, whole);
  const first = Math.min(Math.max(one.first_byte ?? whole, queue), whole);
  const part = (kind, from, to) =>
    s("rect", { class: kind, x: (100 * from) / whole, y: 0, width: (100 * (to - from)) / whole, height: 1 });
  const told = [
    `queue ${seconds(one.queue_seconds)}`,
    one.first_byte === null ? "no first byte" : `first byte ${seconds(one.first_byte)}`,
    `whole ${seconds(one.seconds)}`,
  ].join(", ");
  return h(
    "div",
    { class: "spent", title: told },
    s(
      "svg",
      { viewBox: "0 0 100 1", preserveAspectRatio: "none", role: "img", "aria-label": told },
      part("queue", 0, queue),
      part("first", queue, first),
      part("stream", first, whole),
    ),
    h("span", { class: "sub" }, seconds(one.seconds)),
  );
}

// What the parts of such a bar are.
function legend() {
  const part = (kind, name) => h("span", { class: "part" }, h("span", { class: `swatch ${kind}` }), name);
  const parts = [
    part("queue", "in the queue"),
    part("first", "until the first byte"),
    part("stream", "until the last"),
  ];
  return h("p", { class: "sub legend" }, parts);
}

function endedRow(one) {
  return h(
    "tr",
    { class: isBad(one) ? "failed" : "" },
    h("td", { class: "mono" }, clock(one.since)),
    h("td", { class: "of", title: place(one) }, toModel(one)),
    h("td", { class: "mono sub route" }, one.route),
    h("td", {}, h("span", { class: "status" }, one.status ?? "–"), " ", toCode(one)),
    h("td", {}, bar(one)),
    h("td", { class: "n", "data-l": "tokens" }, `${one.prompt_tokens ?? "–"} → ${one.completion_tokens ?? "–"}`),
    h("td", { class: "n", "data-l": "tok/s" }, bySpeed(one)),
    h("td", { class: "sub from" }, one.key ?? one.client ?? "–"),
    h("td", { class: "mono sub id", title: one.id }, toRequest(one)),
  );
}

// A table of requests that have ended: `node.update(them)`.
export function ended(none) {
  const body = h("tbody");
  const columns = [
    ["Began"],
    ["Model"],
    ["Route"],
    ["Status"],
    ["Queue, first byte, whole"],
    ["Tokens", "n"],
    ["Tok/s", "n"],
    ["From"],
    ["Request"],
  ];
  const rows = table("Requests that have ended", columns, body);
  const empty = h("p", { class: "sub" }, none);
  const parts = legend();
  const node = h("div", { class: "requests ended" }, parts, rows, empty);
  parts.hidden = rows.hidden = empty.hidden = true; // it is not known yet
  node.update = (them) => {
    parts.hidden = rows.hidden = !them.length;
    empty.hidden = Boolean(them.length);
    keyed(body, them, (one) => one.engine_id, endedRow);
  };
  return node;
}

async function cancel(one) {
  const more = `${place(one)} has worked on it for ${seconds(one.seconds)}; its client gets an error, or what it has so far.`;
  if (!(await ask("Cancel this request?", "Cancel it", more))) return;
  try {
    await call("DELETE", `requests/${encodeURIComponent(one.engine_id)}`);
    say(`cancelled ${one.id}`);
  } catch (error) {
    say(error.message, true);
  }
}

function activeRow(first) {
  const cell = (label, kind = "") => h("td", { class: kind, "data-l": label });
  const [since, sent] = [cell("since", "n"), cell("sent", "n")];
  const [where, how] = [h("td", { class: "of" }), h("td")];
  let now = first;
  const end = h(
    "button",
    { class: "danger", onclick: () => cancel(now), "aria-label": `Cancel ${first.id}` },
    "Cancel",
  );
  const node = h(
    "tr",
    {},
    since,
    where,
    h("td", { class: "mono sub route" }, first.route),
    how,
    sent,
    h("td", { class: "sub from" }, [first.key, first.client].filter(Boolean).join(" · ") || "–"),
    h("td", { class: "mono sub id", title: first.id }, toRequest(first)),
    h("td", { class: "does" }, end),
  );
  node.update = (one) => {
    if (place(now) !== place(one) || !where.firstChild) {
      show(where, toModel(one));
      setAttribute(where, "title", place(one));
    }
    now = one;
    setText(since, seconds(one.seconds));
    setText(how, one.state);
    setAttribute(how, "class", one.state === "queued" ? "busy" : "");
    setText(sent, bytes(one.bytes));
    enable(end, true);
  };
  return node;
}

// A table of requests in flight: `node.update(them, none)`; `none`: what stands there where there are none.
export function inFlight() {
  const body = h("tbody");
  const columns = [["Since", "n"], ["Model"], ["Route"], ["State"], ["Sent", "n"], ["From"], ["Request"], [""]];
  const rows = table("Requests in flight", columns, body);
  const empty = h("p", { class: "sub" });
  const node = h("div", { class: "requests flying" }, rows, empty);
  rows.hidden = true;
  node.update = (them, none) => {
    rows.hidden = !them.length;
    empty.hidden = Boolean(them.length);
    setText(empty, none);
    keyed(body, them, (one) => one.engine_id, activeRow);
  };
  return node;
}

// One request in full: `node.update(it)`; what is the same stays, with the focus that it may have.
function details() {
  const cells = new Map();
  const node = h("dl", { class: "card facts" });
  node.update = (one) => {
    for (const [name, ...value] of facts(one)) {
      const cell = cells.get(name) ?? h("dd");
      if (!cells.has(name)) node.append(h("div", {}, h("dt", {}, name), cell));
      cells.set(name, cell);
      const now = h("dd", {}, value);
      if (cell.textContent !== now.textContent) show(cell, ...now.childNodes);
    }
  };
  return node;
}

function facts(one) {
  return [
    ["Request", one.id],
    ["For its engine", one.engine_id],
    ["Model", toModel(one)],
    ["Route", one.route],
    ["State", one.state],
    ["Status", one.status ?? "–", " ", toCode(one)],
    ["Began", clock(one.since)],
    ["In the queue", seconds(one.queue_seconds)],
    ["First byte", seconds(one.first_byte)],
    ["Whole", seconds(one.seconds)],
    ["Answer", bytes(one.bytes)],
    ["Tokens", `${one.prompt_tokens ?? "–"} → ${one.completion_tokens ?? "–"}`],
    ["Sent again", String(one.retries)],
    ["From", [one.key, one.client].filter(Boolean).join(" · ") || "–"],
  ];
}

export function requests(main, [id]) {
  const stop = new AbortController();
  const flying = inFlight();
  const recent = ended("None yet.");
  const search = h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter requests", oninput: draw });
  const bad = h("input", { type: "checkbox", onchange: draw });
  const chosen = h("div");
  const whole = details();
  const told = h("p", { class: "sub" });
  let known = { active: [], recent: [] };
  main.append(
    h("h1", {}, "Requests"),
    chosen,
    told,
    h("div", { class: "bar" }, search, h("label", {}, bad, "errors only")),
    h("h2", {}, "In flight"),
    flying,
    h("h2", {}, "Ended"),
    recent,
  );
  function draw() {
    const words = search.value.toLowerCase();
    const wanted = (one) => text(one).includes(words);
    flying.update(known.active.filter(wanted), known.active.length ? "None like that." : "None.");
    recent.update(known.recent.filter((one) => wanted(one) && (!bad.checked || isBad(one))));
  }
  async function lookAtIt(signal) {
    try {
      whole.update(await call("GET", `requests/${encodeURIComponent(id)}`, { signal, quiet: true }));
      if (!whole.isConnected) show(chosen, whole);
    } catch (error) {
      if (error.status !== 404) throw error;
      show(chosen, h("p", { class: "card" }, error.message));
    }
  }
  repeat(
    async (signal) => {
      if (id) await lookAtIt(signal);
      const limit = search.value || bad.checked ? ALL : SHOWN;
      known = await call("GET", `requests?limit=${limit}`, { signal, quiet: true });
      setText(told, "");
      told.hidden = true;
      draw();
    },
    PAUSE_MS,
    stop.signal,
    (error) => {
      told.hidden = false;
      setText(told, error.status ? error.message : "connection lost, trying again");
    },
  );
  return { leave: () => stop.abort() };
}
