// One model: its replicas, why the last engine ended, what engines write, its requests, its keys and what a change costs.
import { act, buttons } from "./actions.js";
import { call, repeat } from "./api.js";
import { bytes, clock, h, keyed, plural, seconds, setText, show, state, table } from "./dom.js";
import { store } from "./feed.js";
import { phases, problemList, word } from "./fleet.js";
import { output } from "./output.js";
import { ended, inFlight } from "./requests.js";

const REQUESTS = 20;
const REQUESTS_MS = 3000;

export function model(main, [id = ""]) {
  const stop = new AbortController();
  const path = `models/${encodeURIComponent(id)}`;
  const is = state("stopped", "");
  const about = h("span", { class: "sub" });
  const does = h("div", { class: "bar push" });
  const wrong = problemList(true);
  const last = h("div");
  const replicas = h("tbody");
  const adapters = h("div");
  const spec = h("div");
  const requests = h("div");
  const none = h("p", { class: "sub" });
  const found = h("div");
  const columns = [
    ["#"],
    ["State"],
    ["Process"],
    ["Port"],
    ["Running", "n"],
    ["KV cache", "n"],
    ["Memory", "n"],
    ["Restarts", "n"],
    ["Up", "n"],
  ];
  main.append(h("div", { class: "bar top" }, h("h1", {}, id), is, about, does), none, wrong, last, found);
  const log = output(`${path}/logs`, id, stop.signal);
  found.append(
    h("h2", {}, "Replicas"),
    table("Replicas", columns, replicas),
    adapters,
    log,
    h("h2", {}, "Requests"),
    requests,
    h("h2", {}, "Keys"),
    spec,
  );
  let acts = null;
  let seen = "";
  const shown = new Map(); // of a part: what it was made of
  const renew = (node, from, make) => {
    const text = JSON.stringify(from);
    if (shown.get(node) !== text) show(node, make());
    shown.set(node, text); // what is the same stays as its reader has it: opened, selected
  };

  function first(one) {
    acts = buttons(one);
    const name = encodeURIComponent(id);
    does.append(
      acts,
      h("a", { class: "button", href: `#/config/model/${name}` }, "Edit"),
      h("a", { class: "button", href: `#/config/copy/${name}` }, "Copy"),
      h("a", { class: "button", href: `#/play/${name}` }, "Try it"),
    );
  }

  async function look() {
    const [whole, schema] = await Promise.all([
      call("GET", path, { signal: stop.signal, quiet: true }),
      call("GET", "schema.json", { signal: stop.signal, quiet: true }),
    ]);
    const { instances, adapters: held } = whole.status;
    const exits = instances.map((one) => one.last_exit);
    renew(last, exits, () => lastExit(exits));
    renew(adapters, held, () => held.length > 0 && adapterTable(held));
    renew(spec, [whole.spec, whole.effective], () => keys(whole, schema));
    if (whole.effective.sleep && !does.querySelector(".sleep")) {
      const sleep = () => act(id, "sleep");
      acts?.append(h("button", { class: "sleep", onclick: sleep, "aria-label": `Sleep ${id}` }, "Sleep"));
    }
  }

  const flying = inFlight();
  const recent = ended("No requests among the last 1,000.");
  requests.append(flying, recent);
  repeat(
    async (signal) => {
      const at = `requests?limit=${REQUESTS}&model=${encodeURIComponent(id)}`;
      const its = await call("GET", at, { signal, quiet: true });
      flying.update(its.active, "None in flight.");
      recent.update(its.recent);
      update(); // how long engines are up is told by no event
    },
    REQUESTS_MS,
    stop.signal,
  );

  function update() {
    const one = store.models.get(id);
    found.hidden = does.hidden = !one && store.told;
    setText(none, one || !store.told ? "" : "There is no such model in the configuration.");
    none.hidden = !none.textContent;
    is.hidden = !one;
    wrong.update((problem) => problem.id === id);
    if (!one) return;
    if (!acts) first(one);
    is.set(...word(one));
    setText(about, [one.source, ...one.aliases, one.description].filter(Boolean).join(" · "));
    acts.update(one);
    keyed(
      replicas,
      one.replicas,
      (replica) => replica.index,
      () => replicaRow(id),
    );
    const now = JSON.stringify([store.config.revision, one.replicas.map((it) => [it.state, it.restarts, it.reason])]);
    if (now === seen) return;
    seen = now;
    look().catch((error) => {
      if (error.name !== "AbortError" && error.status !== 404)
        renew(last, error.message, () => h("p", { class: "sub" }, error.message));
    });
  }
  return { update, leave: () => stop.abort() };
}

function replicaRow(id) {
  const is = state("stopped");
  const far = phases(id);
  const note = h("div", { class: "sub" });
  const cell = (label, kind = "n") => h("td", { class: kind, "data-l": label });
  const index = h("td", { class: "name" });
  const [pid, port] = [cell("process", "mono"), cell("port", "mono")];
  const [running, kv, memory, restarts, up] = ["running", "KV cache", "memory", "restarts", "up"].map((name) =>
    cell(name),
  );
  const node = h(
    "tr",
    {},
    index,
    h("td", { class: "is" }, is, far, note),
    pid,
    port,
    running,
    kv,
    memory,
    restarts,
    up,
  );
  node.update = (it) => {
    setText(index, String(it.index));
    is.set(it.state);
    far.update([it]);
    setText(note, it.message === store.models.get(id)?.message ? "" : (it.message ?? ""));
    setText(pid, it.pid === null ? "–" : String(it.pid));
    setText(port, it.port === null ? "–" : String(it.port));
    setText(running, String(it.in_flight));
    setText(kv, it.kv === null ? "–" : `${Math.round(it.kv * 100)} %`);
    setText(memory, bytes(it.memory));
    setText(restarts, String(it.restarts));
    setText(up, it.since === null ? "–" : seconds(Math.max(0, (Date.now() - new Date(it.since)) / 1000)));
  };
  return node;
}

// Why an engine ended last, with the end of its log.
function lastExit(exits) {
  const exit = exits.filter(Boolean).sort((one, other) => (one.at < other.at ? 1 : -1))[0];
  if (!exit) return null;
  let how = exit.signal ? `signal ${exit.signal}` : `exit status ${exit.code}`;
  if (!exit.signal && exit.code === null) how = "how it ended is not known";
  return h(
    "details",
    { class: "card exit" },
    h(
      "summary",
      {},
      h("b", {}, "Last failure "),
      h("span", { class: "sub" }, [clock(exit.at), how, exit.reason].filter(Boolean).join(" · ")),
    ),
    exit.message && h("p", {}, exit.message),
    h("pre", { tabindex: 0, "aria-label": "Last lines of its log" }, exit.log_tail.join("\n")),
  );
}

function adapterTable(all) {
  const rows = all.map((one) =>
    h(
      "tr",
      {},
      h("td", { class: "name id" }, one.id),
      h("td", {}, state(one.state)),
      h("td", { class: "sub" }, one.message ?? plural(one.instances.length, "instance")),
    ),
  );
  return [h("h2", {}, "Adapters"), table("Adapters", [["Adapter"], ["State"], ["Where"]], h("tbody", {}, rows))];
}

// Every key in force: those that the model itself says, and behind them the others.
function keys({ spec, effective }, schema) {
  const described = schema.$defs.Model.properties;
  const rows = (wanted) =>
    Object.entries(effective)
      .filter(([key, value]) => key in spec === wanted && (wanted || value !== null))
      .map(([key, value]) => keyRow(key, value, described[key]?.description ?? ""));
  const columns = [["Key"], ["Value"], ["A change"], ["Means"]];
  const others = rows(false);
  return [
    table("Keys", columns, h("tbody", {}, rows(true))),
    h(
      "details",
      { class: "others" },
      h("summary", {}, `${others.length} more, as [defaults] and the daemon have them`),
      table("Other keys", columns, h("tbody", {}, others)),
    ),
  ];
}

function keyRow(key, value, text) {
  const cost = /A change is applied live/.test(text) ? "live" : /replaces the engine/.test(text) ? "replaces" : "";
  return h(
    "tr",
    {},
    h("td", { class: "mono key" }, key),
    h("td", { class: "mono value" }, typeof value === "string" ? value : JSON.stringify(value)),
    h("td", { class: "sub" }, cost),
    h("td", { class: "sub" }, text.replace(/ A change (is applied live|replaces the engine)\./, "")),
  );
}
