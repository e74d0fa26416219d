// What is done to a model by hand, as buttons: Start (or Wake), Restart, Stop. Stop and Restart of a busy one ask once.
import { call } from "./api.js";
import { ask } from "./dialogs.js";
import { acts, enable, h, plural, say, setAttribute, setText } from "./dom.js";

const COSTS = "requests get 503 model_stopped until somebody starts it";
const DONE = { start: "starts", wake: "wakes", restart: "restarts", stop: `stops: ${COSTS}`, sleep: "falls asleep" };

export async function act(id, what) {
  try {
    await call("POST", `models/${encodeURIComponent(id)}/${what}`);
    say(`${id} ${DONE[what]}`);
  } catch (error) {
    say(error.message, true);
  }
}

async function end(model, what) {
  const name = what[0].toUpperCase() + what.slice(1);
  const busy = model.in_flight + model.queued;
  const those = `${plural(model.in_flight, "request")} in flight, ${model.queued} waiting: they get the drain time to end.`;
  const more = what === "stop" ? `${those} From then on ${COSTS}.` : those;
  if (!busy || (await ask(`${name} ${model.id}?`, name, more))) await act(model.id, what);
}

// `node.update(model)` keeps it in step.
export function buttons(model) {
  const { id } = model;
  let now = model;
  const start = h("button", { onclick: () => acts(start) && act(id, now.state === "sleeping" ? "wake" : "start") });
  const again = () => acts(restart) && end(now, "restart");
  const restart = h("button", { onclick: again, "aria-label": `Restart ${id}` }, "Restart");
  const halt = () => acts(stop) && end(now, "stop");
  const stop = h("button", { class: "danger", onclick: halt, "aria-label": `Stop ${id}` }, "Stop");
  const node = h("div", { class: "acts" }, start, restart, stop);
  node.update = (one) => {
    now = one;
    const runs = one.state === "ready" || one.state === "loading";
    const failed = one.replicas.some(({ state }) => state === "error"); // a start is of it alone
    const word = one.state === "sleeping" ? "Wake" : "Start";
    setText(start, word);
    setAttribute(start, "aria-label", `${word} ${id}`);
    enable(start, (!runs || failed) && one.enabled);
    enable(restart, runs && one.enabled);
    enable(stop, one.enabled && one.state !== "stopped" && one.state !== "unloading");
  };
  node.update(model);
  return node;
}
