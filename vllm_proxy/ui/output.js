// What the engines of a model write, as it comes: coloured, filtered, wrapped, kept still while somebody reads above its end.
import { call, enterKey, follow } from "./api.js";
import { h, say, setAttribute, setText } from "./dom.js";

const LINES = 500; // of before
const MOST = 5000;
const NEAR = 40; // pixels from its end
const BAD = /\b(ERROR|CRITICAL)\b|Traceback|(^|[|)] )\S*(Error|Exception):/;
const WARNING = /\bWARNING\b/;

const kind = (line) => (BAD.test(line) ? "bad" : WARNING.test(line) ? "warn" : "");

// path: of the log; id: of the model.
export function output(path, id, signal) {
  const log = h("pre", { class: "log", tabindex: 0, "aria-label": `What the engines of ${id} write` });
  const told = h("span", { class: "sub" });
  const key = h("button", { hidden: true, onclick: () => enterKey() }, "Enter a key");
  const search = h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter lines", oninput: filter });
  const only = h("input", { type: "checkbox", onchange: filter });
  const wrap = h("input", {
    type: "checkbox",
    checked: true,
    onchange: () => log.classList.toggle("long", !wrap.checked),
  });
  const end = h("button", { hidden: true, onclick: toEnd }, "To the end");
  let pinned = true;
  let waiting = [];
  let anew = false;
  log.onscroll = () => {
    pinned = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
    end.hidden = pinned;
  };
  function toEnd() {
    log.scrollTop = log.scrollHeight;
  }
  const hides = (line) =>
    (only.checked && !line.className) || !line.textContent.toLowerCase().includes(search.value.toLowerCase());
  function filter() {
    for (const line of log.children) line.hidden = hides(line);
    if (pinned) toEnd();
  }
  function write() {
    if (anew) log.replaceChildren();
    anew = false;
    log.append(...waiting);
    waiting = [];
    while (log.childElementCount > MOST) log.firstChild.remove();
    if (pinned) toEnd();
  }
  function add({ data, event }) {
    if (event !== "message") return;
    const line = h("div", { class: kind(data) }, data || " ");
    line.hidden = hides(line);
    if (waiting.push(line) === 1) requestAnimationFrame(write);
  }
  async function download() {
    const answer = await call("GET", `${path}?lines=10000`, { raw: true });
    const link = h("a", { href: URL.createObjectURL(await answer.blob()), download: `${id.replaceAll("/", "_")}.log` });
    link.click();
    URL.revokeObjectURL(link.href);
  }
  follow(
    () => `${path}?follow=1&lines=${LINES}`,
    add,
    (live, refused) => {
      anew ||= live;
      setText(told, live ? "" : (refused?.message ?? "connection lost, trying again"));
      key.hidden = refused?.status !== 401;
      setAttribute(log, "aria-busy", live ? null : "true");
    },
    { signal, quiet: true },
  );
  return h(
    "section",
    { class: "output", "aria-label": "Output" },
    h(
      "div",
      { class: "bar" },
      h("h2", {}, "Output"),
      search,
      h("label", {}, only, "errors and warnings"),
      h("label", {}, wrap, "wrap"),
      told,
      key,
      h("span", { class: "push" }),
      end,
      h("button", { onclick: () => download().catch((error) => say(error.message, true)) }, "Download"),
    ),
    log,
  );
}
