// What the daemon says of itself: one stream for the whole tab, kept in `store`. Screens read it and change nothing.
// A connection begins with all models, so nothing has to be asked for again after one was lost.
import { call, follow, repeat } from "./api.js";
import { useSocket } from "./dialogs.js";

const KEPT = 1000; // happenings
const HEALTH_MS = 5000; // no event tells of it
const NO_PROBLEM = new Set([null, "stopped_by_hand", "gave_way", "sleeping"]); // reasons that somebody wanted

export const store = {
  models: new Map(), // by id: a `Brief` of the API, and `stamp`, a text that is another one once something changed
  order: [], // all ids, as the file has them
  config: { revision: "", problems: [], pending_restart: [] },
  health: {}, // what `GET /health` says
  happened: [], // the oldest first
  told: false, // whether it is known what there is
  live: null, // null: it was never connected
  refused: null, // why it is not: the daemon's error
};
const listeners = new Set();
let last = "0"; // the id of the last happening
let anew = false; // the next event `fleet` has all

// Call a function whenever `store` has changed; returns what ends that.
export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

const changed = () => {
  for (const listener of listeners) listener();
};

export const models = () => store.order.map((id) => store.models.get(id)).filter(Boolean);

// As a shell takes it for one word.
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`);

function* ofTheFile({ problems: refused, pending_restart: waits }, { config }) {
  if (refused.length) {
    const more = refused.length > 1 ? ` And ${refused.length - 1} more.` : "";
    const { path, message } = refused[0];
    const text = `The file on disk is refused; what ran before goes on. ${path ? `${path}: ` : ""}${message}${more}`;
    const next = config ? `vllm-proxy check -c ${quoted(config.file)}` : "";
    yield { id: "/file", mild: false, code: "invalid_config", text, next, to: "#/config" };
  }
  if (waits.length) {
    const text = `A change of ${waits.join(", ")} waits for a restart of the daemon.`;
    yield { id: "/restart", mild: true, code: "changes", text, to: "#/config" };
  }
}

// Of the daemon itself, as `vllm-proxy status` tells it; who may not read gets none of it.
function* ofTheDaemon({ config, not_ended: left = [], devices, usage, state }) {
  if (config?.certificate_error) {
    const text = `The certificate on disk is rejected: ${config.certificate_error}`;
    yield { id: "/certificate", mild: false, code: "security", text, next: "vllm-proxy reload" };
  }
  for (const instance of left) {
    const text = `${instance}: an engine could not be ended.`;
    yield { id: `/not_ended/${instance}`, mild: false, code: "not_ended", text };
  }
  if (devices?.problem) {
    const text = `Devices: ${devices.problem}`;
    yield { id: "/devices", mild: false, code: "scheduling", text, to: "#/devices" };
  }
  if (usage?.error) yield { id: "/usage", mild: false, code: "limits", text: `Usage: ${usage.error}`, to: "#/usage" };
  if (state?.error) {
    yield { id: "/state", mild: false, code: "operating", text: `The record of engines: ${state.error}` };
  }
}

// Why a model is not what the file asks for, its own reason or that of a replica beside others that are ready; or null.
export function failure(model) {
  const bad = model.reason ? null : model.replicas.find(({ reason }) => reason);
  const code = model.reason ?? bad?.reason ?? null;
  if (NO_PROBLEM.has(code) && model.state !== "error") return null;
  const said = bad?.message ?? "";
  const text = model.message ?? (said && model.replicas.length > 1 ? `Replica ${bad.index}: ${said}` : said);
  const mild = model.state !== "error" && model.replicas.every(({ state }) => state !== "error");
  const to = `#/model/${encodeURIComponent(model.id)}`;
  return { id: model.id, mild, model, code, text, to };
}

// What is wrong, the worst first: {id, mild, model, code, text, next, to}. `code` has a page of the manual, `next` is a
// command that helps.
export function problems() {
  const found = [
    ...ofTheFile(store.config, store.health),
    ...ofTheDaemon(store.health),
    ...models().map(failure).filter(Boolean),
  ];
  return found.sort((one, other) => one.mild - other.mild);
}

const takes = {
  fleet({ models: some, gone, order }) {
    if (anew) {
      store.models.clear();
      anew = false;
    }
    for (const model of some) {
      model.stamp = JSON.stringify(model);
      store.models.set(model.id, model);
    }
    for (const id of gone) store.models.delete(id);
    if (order) store.order = order;
    store.told = true;
  },
  config(state) {
    store.config = state;
  },
  happened(one) {
    store.happened = store.happened.concat(one).slice(-KEPT);
  },
  reset() {
    store.happened = [];
  },
};

// Follow it as long as the tab lives.
export function begin() {
  follow(
    () => {
      anew = true;
      return `events?fleet=1&since=${last}`;
    },
    ({ event, data, id }) => {
      if (!(event in takes)) return;
      takes[event](JSON.parse(data));
      if (id) last = id;
      changed();
    },
    (live, refused) => {
      store.live = live;
      store.refused = refused?.status === 401 || refused?.status === 403 ? refused : null;
      changed();
    },
  );
  repeat(
    async (signal) => {
      const health = await call("GET", "health", { signal, quiet: true });
      if (JSON.stringify(health) === JSON.stringify(store.health)) return;
      store.health = health;
      useSocket(health.control_socket);
      changed();
    },
    HEALTH_MS,
    new AbortController().signal,
  );
}
