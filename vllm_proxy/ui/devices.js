// Devices: who has the memory of each GPU. Placeholder of the screen; `meter` is also a part of Fleet.
import { bytes, h, s, setText } from "./dom.js";

// One device in a line: `node.update(device)`.
export function meter() {
  const name = h("span");
  const bar = s("svg", { class: "meter", viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  const text = h("span", { class: "sub" });
  const node = h("a", { class: "gauge", href: "#/devices" }, name, bar, text);
  node.update = (device) => {
    setText(name, device.index === null ? device.id : `GPU ${device.index}`);
    bar.replaceChildren(...segments(device));
    const { total, free } = device;
    setText(text, free === null ? bytes(total) : `${bytes(total - free)} of ${bytes(total)}`);
  };
  return node;
}

function segments({ total, holds, foreign, reserve }) {
  let at = 0;
  const part = (size, kind) => {
    const width = (100 * size) / total;
    const x = Math.min(at, 100);
    at += width;
    return s("rect", { class: kind, x, y: 0, width: Math.max(0, Math.min(width, 100 - x)), height: 1 });
  };
  return [
    ...holds.map((one) => part(one.bytes, one.standing)),
    ...foreign.map((one) => part(one.bytes, "foreign")),
    s("rect", { class: "reserve", x: 100 - Math.min(100, (100 * reserve) / total), y: 0, width: Math.min(100, (100 * reserve) / total), height: 1 }),
  ];
}

export function devices(main) {
  main.append(h("h1", {}, "Devices"));
  return {};
}
