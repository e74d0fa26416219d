// Fleet: what is wrong, what all do together, and every model in a row. Problems first, then what moves, then as the file.
import { act, buttons } from "./actions.js";
import { call, repeat } from "./api.js";
import { meter } from "./devices.js";
import { bytes, h, keyed, problem, rate, seconds, setAttribute, setText, spark, state, table } from "./dom.js";
import { failure, models, problems, store } from "./feed.js";

const RANK = { loading: 1, unloading: 1 };
const POINTS = 48; // of the line of the last hour
const STATS_MS = 20_000;
const SCREENS = { "#/config": "Configuration", "#/devices": "Devices", "#/usage": "Usage" };

// Its shape and its word, as `vllm-proxy status` has it.
export function word(model) {
  if (model.state !== "stopped") return [model.state, model.state];
  if (!model.enabled) return ["disabled", "disabled"];
  return ["stopped", model.start === "on-demand" && model.reason !== "stopped_by_hand" ? "on demand" : "stopped"];
}

// How far each replica is that is on its way: `node.update(replicas)`.
export function phases(id) {
  const node = h("div", { class: "phases" });
  const one = (replica) => {
    const text = h("span");
    const bar = h("progress", { max: 1, "aria-label": `Progress of ${id}/${replica.index}` });
    const line = h("div", { class: "sub phase" }, text, bar);
    line.update = ({ index, phase, left, progress, several }) => {
      const of = several ? `${index}: ` : "";
      setText(text, `${of}${(phase ?? "").replaceAll("_", " ")}${left === null ? "" : `, ${seconds(left)} left`}`);
      setAttribute(bar, "value", progress);
    };
    return line;
  };
  node.update = (replicas) => {
    const several = replicas.length > 1;
    const moving = replicas.filter(({ state: is }) => is === "loading" || is === "unloading");
    keyed(
      node,
      moving.map((replica) => ({ ...replica, several })),
      (replica) => replica.index,
      one,
    );
  };
  return node;
}

// What is wrong, each with what can be done: `node.update(only)`. `here`: it is on the model's own screen.
export function problemList(here = false) {
  const node = h("section", { "aria-label": "Problems", role: "status" });
  const one = (found) => {
    const text = h("span");
    const help = h("a", { class: "code" });
    const next = h("code");
    const { id, model, to } = found;
    const change = h("a", { class: "button", "aria-label": `Change… ${id}` }, "Change…");
    const again = h("button", { onclick: () => act(id, "start"), "aria-label": `Try again: ${id}` }, "Try again");
    const box = problem(
      found.mild ? "mild" : "",
      h("p", {}, model && !here && h("b", {}, `${model.id} `), text),
      h(
        "div",
        { class: "acts" },
        help,
        next,
        !here &&
          to &&
          h("a", { class: "button", href: to, "aria-label": model && `Show ${id}` }, SCREENS[to] ?? "Show"),
        model && change,
        model && again,
      ),
    );
    box.update = (now) => {
      setText(text, now.text);
      setText(help, now.code ?? "");
      help.hidden = !now.code;
      setAttribute(help, "href", now.code ? `../help/${now.code}` : null);
      setText(next, now.next ?? "");
      next.hidden = !now.next;
      if (!now.model) return;
      again.hidden = !now.model.enabled;
      const { key, value } = now.model.change ?? {};
      setAttribute(change, "href", `#/config/${key ? "change" : "model"}/${encodeURIComponent(now.id)}`);
      setAttribute(change, "title", key ? `${key} = ${JSON.stringify(value)}, and what it would do` : null);
    };
    return box;
  };
  node.update = (only = () => true) => {
    const key = (found) => `${found.id} ${found.mild}`;
    keyed(node, problems().filter(only), key, one);
  };
  return node;
}

function row(first, history) {
  const { id } = first;
  const is = state(...word(first));
  const far = phases(id);
  const what = h("div", { class: "sub" });
  const cell = (label) => h("td", { class: "n", "data-l": label });
  const [running, waiting, requests, tokens, memory] = ["running", "waiting", "req/s", "tok/s", "memory"].map(cell);
  const line = h("td", { class: "line" });
  const acts = buttons(first);
  const name = h("a", { class: "name", title: id, href: `#/model/${encodeURIComponent(id)}` }, id);
  const node = h(
    "tr",
    {},
    h("td", { class: "is" }, is, far),
    h("td", { class: "what" }, name, what),
    running,
    waiting,
    requests,
    tokens,
    line,
    memory,
    h("td", { class: "does" }, acts),
  );
  let stamp = "";
  let drawn = null;
  node.update = (model) => {
    const points = history.get(id);
    if (points !== drawn) {
      drawn = points;
      line.replaceChildren(...(points ? [spark(points)] : []));
    }
    if (stamp === model.stamp) return;
    stamp = model.stamp;
    is.set(...word(model));
    far.update(model.replicas);
    const said = [...new Set([replicated(model), model.source, ...model.aliases])].filter(Boolean).join(" · ");
    setText(what, said);
    setAttribute(what, "title", said);
    setText(running, String(model.in_flight));
    setText(waiting, String(model.queued));
    setAttribute(waiting, "class", model.queued ? "n busy" : "n");
    setText(requests, rate(model.rps));
    setText(tokens, rate(model.tps));
    const taken = model.replicas.reduce((sum, replica) => sum + (replica.memory ?? 0), 0);
    setText(memory, taken ? bytes(taken) : "–");
    acts.update(model);
  };
  return node;
}

function replicated({ replicas }) {
  if (replicas.length < 2) return "";
  const count = (wanted) => replicas.filter((replica) => replica.state === wanted).length;
  const failed = count("error") ? `, ${count("error")} in error` : "";
  return `${count("ready")} of ${replicas.length} replicas${failed}`;
}

// The greatest of each of `POINTS` parts of the last hour.
function drawable({ rps, tps }) {
  const points = tps.some(Boolean) ? tps : rps;
  const size = Math.ceil(points.length / POINTS);
  const found = [];
  for (let i = 0; i < points.length; i += size) found.push(Math.max(...points.slice(i, i + size)));
  return found;
}

// Those that are wanted without a request, as `GET /ready` waits for them, and others while they are ready.
function isCounted(model) {
  const isWanted = model.enabled && model.start === "always" && model.reason !== "stopped_by_hand";
  return model.state === "ready" || (isWanted && model.state !== "sleeping");
}

function figures() {
  const node = h("dl", { class: "card figures" });
  const one = ([name]) => {
    const value = h("dd");
    const pair = h("div", {}, h("dt", {}, name), value);
    pair.update = ([, text]) => setText(value, text);
    return pair;
  };
  node.update = (all) => {
    const sum = (key) => all.reduce((total, model) => total + (model[key] ?? 0), 0);
    const words = all.map((model) => word(model)[1]);
    const count = (wanted) => words.filter((said) => said === wanted).length;
    const later = count("on demand");
    const found = [
      ["Ready", `${count("ready")} / ${all.filter(isCounted).length}`],
      ...(later ? [["On demand", String(later)]] : []),
      ["In flight", String(sum("in_flight"))],
      ["Waiting", String(sum("queued"))],
      ["Requests/s", rate(sum("rps"))],
      ["Tokens/s", rate(sum("tps"))],
    ];
    keyed(node, found, ([name]) => name, one);
  };
  return node;
}

export function fleet(main) {
  const wrong = problemList();
  const sums = figures();
  const gauges = h("div", { class: "gauges" });
  const body = h("tbody");
  const none = h("p", { class: "sub none", hidden: true });
  const stop = new AbortController();
  const history = new Map();
  const search = h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter models", oninput: update });
  const columns = [
    ["State"],
    ["Model"],
    ["Running", "n"],
    ["Waiting", "n"],
    ["Req/s", "n"],
    ["Tok/s", "n"],
    ["Last hour"],
    ["Memory", "n"],
    [""],
  ];
  const rows = table("Models", columns, body);
  main.append(
    h("h1", {}, "Fleet"),
    wrong,
    sums,
    gauges,
    h("div", { class: "bar" }, search, h("a", { class: "button", href: "#/config/new" }, "Add a model")),
    rows,
    none,
  );
  async function past(signal) {
    const [stats, devices] = await Promise.all([
      call("GET", "stats?minutes=60", { signal, quiet: true }),
      call("GET", "devices", { signal, quiet: true }),
    ]);
    history.clear();
    for (const model of stats.models) history.set(model.id, drawable(model));
    keyed(gauges, devices.devices, (device) => device.id, meter);
    update();
  }
  repeat(past, STATS_MS, stop.signal);
  function update() {
    const all = models();
    wrong.update();
    sums.update(all);
    const words = search.value.toLowerCase();
    const says = (model) => `${model.id} ${model.source} ${model.aliases.join(" ")} ${word(model)[1]}`.toLowerCase();
    const found = all.filter((model) => says(model).includes(words));
    const rank = (model) => (failure(model) ? 0 : (RANK[model.state] ?? 2));
    found.sort((one, other) => rank(one) - rank(other));
    keyed(
      body,
      found,
      (model) => model.id,
      (model) => row(model, history),
    );
    rows.hidden = !found.length;
    none.hidden = Boolean(found.length) || !store.told;
    setText(none, all.length ? "No model is like that." : "No models yet: add one, or edit the file.");
  }
  return { update, leave: () => stop.abort() };
}
