// What the daemon says of itself: one stream for the whole tab, kept in `store`. Screens read it and change nothing.
// A connection begins with all models, so nothing has to be asked for again after one was lost.
import { follow } from "./api.js";

const KEPT = 1000; // happenings

export const store = {
  models: new Map(), // by id: a `Brief` of the API, and `stamp`, a text that is another one once something changed
  order: [], // all ids, as the file has them
  config: { revision: "", problems: [], pending_restart: [] },
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

// What is wrong, the worst first: {id, mild, model, code, text, to}.
export function problems() {
  const { problems: refused, pending_restart: waits } = store.config;
  const found = [];
  if (refused.length) {
    const more = refused.length > 1 ? ` And ${refused.length - 1} more.` : "";
    const { path, message } = refused[0];
    const text = `The file on disk is refused; what ran before goes on. ${path ? `${path}: ` : ""}${message}${more}`;
    found.push({ id: "/file", mild: false, code: "invalid_config", text, to: "#/config" });
  }
  for (const model of models()) {
    const mild = model.state !== "error";
    if (!model.enabled || (mild && (!model.reason || model.state === "stopped"))) continue;
    const text = model.message ?? "";
    const to = `#/model/${encodeURIComponent(model.id)}`;
    found.push({ id: model.id, mild, model, code: model.reason, text, to });
  }
  if (waits.length) {
    const text = `A change of ${waits.join(", ")} waits for a restart of the daemon.`;
    found.push({ id: "/restart", mild: true, code: null, text, to: "#/config" });
  }
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
}
