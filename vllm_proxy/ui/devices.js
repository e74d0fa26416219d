// Devices: who has the memory of each GPU, and who gets what becomes free. `meter` is also a part of Fleet.
import { call, repeat } from "./api.js";
import { bytes, h, keyed, problem, s, setText, show } from "./dom.js";

const PAUSE_MS = 3000;
const GAP = 0.5; // between two, in percent
const STANDING = {
  comes: "loads or wakes",
  serves: "serves",
  yields: "its last requests end",
  goes: "is being ended",
  sleeps: "sleeps",
};

const nameOf = (device) => (device.index === null ? device.id : `GPU ${device.index}`);

// One device in a line: `node.update(device)`.
export function meter() {
  const name = h("span");
  const bar = gauge();
  const text = h("span", { class: "sub" });
  const node = h("a", { class: "gauge", href: "#/devices" }, name, bar, text);
  node.update = (device) => {
    setText(name, nameOf(device));
    bar.update(device);
    setText(text, `${bytes(held(device))} of ${bytes(device.total)}`);
  };
  return node;
}

const held = ({ holds, foreign }) => [...holds, ...foreign].reduce((sum, one) => sum + one.bytes, 0);

function gauge() {
  const node = s("svg", { class: "meter", viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  node.update = (device) => node.replaceChildren(...segments(device));
  return node;
}

// From the left: who has how much; at the right end what engines are never given.
function segments({ total, holds, foreign, reserve }) {
  const rect = (kind, x, width) =>
    s("rect", { class: kind, x, y: 0, width: Math.max(0, Math.min(width, 100 - x)), height: 1 });
  const kept = Math.min(100, (100 * reserve) / total);
  const found = [rect("reserve", 100 - kept, kept)];
  let at = 0;
  for (const [size, kind] of [
    ...holds.map((one) => [one.bytes, one.standing]),
    ...foreign.map((one) => [one.bytes, "foreign"]),
  ]) {
    found.push(rect(kind, Math.min(at, 100), (100 * size) / total - GAP));
    at += (100 * size) / total;
  }
  return found;
}

function part(kind, name, size, more = "") {
  return h(
    "tr",
    {},
    h("td", {}, h("i", { class: `swatch ${kind}` }), name),
    h("td", { class: "n" }, bytes(size)),
    h("td", { class: "sub" }, more),
  );
}

function parts(device) {
  const { holds, foreign, reserve, total, free, promised_to: next } = device;
  const link = (instance) =>
    h("a", { href: `#/model/${encodeURIComponent(instance.replace(/\/\d+$/, ""))}` }, instance);
  return [
    ...holds.map((one) => part(one.standing, link(one.instance), one.bytes, STANDING[one.standing])),
    ...foreign.map((one) => part("foreign", `${one.name} (${one.pid})`, one.bytes, "another program")),
    part("reserve", "reserved", reserve, "kept free"),
    part("free", "for one more engine", Math.max(0, total - reserve - held(device)), next ? `goes to ${next}` : ""),
    free !== null &&
      h("tr", {}, h("td", { class: "sub" }, "free, as measured"), h("td", { class: "n sub" }, bytes(free)), h("td")),
  ];
}

function card(first) {
  const bar = gauge();
  const rows = h("tbody");
  const node = h(
    "section",
    { class: "card device", "aria-label": nameOf(first) },
    h(
      "div",
      { class: "bar top" },
      h("h2", {}, nameOf(first)),
      h("span", { class: "sub" }, `${first.name} · ${bytes(first.total)}`),
    ),
    bar,
    h("table", { "aria-label": `Who has the memory of ${nameOf(first)}` }, rows),
  );
  let stamp = "";
  node.update = (device) => {
    const now = JSON.stringify(device);
    if (now === stamp) return;
    stamp = now;
    bar.update(device);
    show(rows, parts(device));
  };
  return node;
}

export function devices(main) {
  const stop = new AbortController();
  const wrong = h("div");
  const all = h("div", { class: "cards-of-devices" });
  const told = h("p", { class: "sub" });
  main.append(h("h1", {}, "Devices"), wrong, all, told);
  repeat(
    async (signal) => {
      const found = await call("GET", "devices", { signal, quiet: true });
      keyed(
        wrong,
        found.problem ? [found.problem] : [],
        (text) => text,
        (text) => problem("mild", h("p", {}, text)),
      );
      keyed(all, found.devices, (device) => device.id, card);
      setText(told, found.unmanaged ?? "");
    },
    PAUSE_MS,
    stop.signal,
    (error) => setText(told, error.status ? error.message : "connection lost, trying again"),
  );
  return { leave: () => stop.abort() };
}
