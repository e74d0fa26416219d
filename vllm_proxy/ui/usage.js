// Usage: what keys have used, by key, model, day or hour.
import { call } from "./api.js";
import { h, keyed, problem, setAttribute, setText, show, table } from "./dom.js";

const HOUR_MS = 3_600_000;
const SPANS = { "24 hours": 24, "7 days": 7 * 24, "30 days": 30 * 24, "400 days": 400 * 24 };
const BY = {
  "key,model": "key and model",
  key: "key",
  model: "model",
  day: "day",
  "key,day": "key and day",
  "model,day": "model and day",
  hour: "hour",
};
const SUMS = [
  ["requests", "requests"],
  ["prompt_tokens", "prompt"],
  ["completion_tokens", "answers"],
  ["cached_tokens", "cached"],
  ["estimated_tokens", "estimated"],
  ["failed", "failed"],
  ["limited", "limited"],
];
const WHAT = ["day", "hour", "key", "model"];
const kept = { span: "24 hours", by: "key,model" };

const count = (number) => number.toLocaleString("en");
const about = (one) => WHAT.filter((name) => one[name] !== undefined && one[name] !== null);

// Whole hours, the one that runs included; `Date` writes them as the API wants them.
function path() {
  const to = Math.ceil((Date.now() + 1) / HOUR_MS) * HOUR_MS;
  const time = (ms) => new Date(ms).toISOString().replace(".000", "");
  const asked = new URLSearchParams({ from: time(to - SPANS[kept.span] * HOUR_MS), to: time(to), by: kept.by });
  return `usage?${asked}`;
}

function row(first) {
  const cells = SUMS.map(([, label]) => h("td", { class: "n", "data-l": label }));
  const bar = h("progress", { max: 1, "aria-label": "Share of all tokens" });
  const names = about(first).map((name) => h("td", { class: name === "hour" ? "mono" : "id" }, shown(first, name)));
  const node = h("tr", {}, names, cells, h("td", { class: "share" }, bar));
  node.update = (now) => {
    for (const [i, [name]] of SUMS.entries()) setText(cells[i], count(now[name]));
    setAttribute(bar, "value", now.share.toFixed(4));
  };
  return node;
}

const shown = (one, name) => (name === "hour" ? one.hour.replace("T", " ").replace(/:00Z?$/, "") : one[name]);

// No row at all: either nothing was asked for in that time, or nothing is counted.
async function whyNone() {
  let isOn = null;
  try {
    const text = await (await call("GET", "config", { raw: true, quiet: true })).text();
    const { keys } = await call("GET", "keys", { quiet: true }); // those of the environment, too
    isOn = keys.length > 0 || /^\s*usage\s*=\s*true/m.test(text) || /^\s*keys_file\s*=/m.test(text);
  } catch {
    // who may not see the file is told both
  }
  const how = [
    "Nothing is counted where there are no keys. With ",
    h("code", {}, "usage = true"),
    " in ",
    h("code", {}, "[server]"),
    " it is, from then on; a key does the same. ",
    h("a", { href: "#/config" }, "Configuration"),
    " · ",
    h("a", { href: "../help/limits" }, "Limits and usage"),
  ];
  if (isOn === true) return [h("p", {}, "Nothing was used in that time.")];
  return [h("p", {}, isOn === false ? h("b", {}, "Usage is not metered. ") : "Nothing was used in that time. ", how)];
}

export function usage(main) {
  const stop = new AbortController();
  const select = (label, name, options) => {
    const node = h(
      "select",
      {},
      options.map(([value, text]) => h("option", { value }, text)),
    );
    node.value = kept[name];
    node.onchange = () => {
      kept[name] = node.value;
      load();
    };
    return h("label", {}, `${label} `, node);
  };
  const sums = h("p", { class: "sums", role: "status" });
  const place = h("div");
  let asked = 0;
  main.append(
    h("h1", {}, "Usage"),
    h(
      "div",
      { class: "bar" },
      select(
        "The last",
        "span",
        Object.keys(SPANS).map((name) => [name, name]),
      ),
      select("by", "by", Object.entries(BY)),
      h("button", { onclick: () => load() }, "Refresh"),
      h("button", { onclick: () => download() }, "Download CSV"),
    ),
    sums,
    place,
  );

  async function load() {
    const mine = ++asked;
    try {
      const { rows } = await call("GET", path(), { signal: stop.signal });
      if (mine !== asked) return;
      const none = rows.length ? null : await whyNone();
      if (mine !== asked) return;
      if (none) {
        setText(sums, "");
        show(place, h("div", { class: "card" }, none));
      } else fill(rows);
    } catch (error) {
      if (error.name === "AbortError" || mine !== asked) return;
      setText(sums, "");
      show(place, problem("", h("p", {}, `Usage cannot be shown: ${error.message}`)));
    }
  }

  function fill(rows) {
    const total = (name) => rows.reduce((sum, one) => sum + one[name], 0);
    const tokens = (one) => one.prompt_tokens + one.completion_tokens + one.estimated_tokens;
    const all = rows.reduce((sum, one) => sum + tokens(one), 0);
    const parts = [
      `${count(total("requests"))} ${total("requests") === 1 ? "request" : "requests"}`,
      `${count(total("prompt_tokens"))} tokens of prompts`,
    ];
    parts.push(`${count(total("completion_tokens"))} of answers`);
    const estimated = total("estimated_tokens");
    if (estimated) parts.push(`${count(estimated)} estimated`);
    if (total("failed")) parts.push(`${count(total("failed"))} failed`);
    if (total("limited")) parts.push(`${count(total("limited"))} limited`);
    setText(sums, parts.join(" · "));
    const body = h("tbody");
    const heads = about(rows[0]).map((name) => [name[0].toUpperCase() + name.slice(1)]);
    const columns = [...heads, ...SUMS.map(([, label]) => [label[0].toUpperCase() + label.slice(1), "n"]), ["Share"]];
    const shares = rows.map((one) => ({ ...one, share: all ? tokens(one) / all : 0 }));
    keyed(body, shares, (one) => JSON.stringify(about(one).map((name) => one[name])), row);
    show(place, table("Usage", columns, body));
  }

  async function download() {
    const answer = await call("GET", path(), { raw: true, headers: { Accept: "text/csv" } });
    const link = h("a", { href: URL.createObjectURL(await answer.blob()), download: "usage.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  load();
  return { leave: () => stop.abort() };
}
