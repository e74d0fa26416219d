// Elements without markup as text: `h("td", {class: "n", onclick: f}, "text", child)`; and what all screens show alike.
const SVG = "http://www.w3.org/2000/svg";
// What turns lines around: messages may repeat what an engine or a client has written. As commands/screen.py.
const TURNS = /[\u2028\u2029\u202a-\u202e\u2066-\u2069]+/g;
const SAID = new Set(["title", "aria-label"]); // attributes that are shown

const printable = (text) => String(text).replace(TURNS, " ");

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (name.startsWith("on")) node[name] = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) setAttribute(node, name, value);
  }
  node.append(...there(children));
  return node;
}

const there = (children) =>
  children
    .flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false && child !== "")
    .map((child) => (child instanceof Node ? child : printable(child)));

export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
export const s = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);
// Put these in place of all children.
export const show = (node, ...children) => node.replaceChildren(...there(children));
// Set a text where it is another one, so that a selection and a reader's place stay.
export const setText = (node, text) => {
  const shown = printable(text);
  if (node.textContent !== shown) node.textContent = shown;
};
export const setAttribute = (node, name, value) => {
  if (value === null || value === false) return node.removeAttribute(name);
  const given = value === true ? "" : SAID.has(name) ? printable(value) : String(value);
  if (node.getAttribute(name) !== given) node.setAttribute(name, given);
};

// Let a button act or not. One that has the focus is not disabled, which would take the focus away.
export function enable(button, can) {
  setAttribute(button, "aria-disabled", can ? null : "true");
  button.disabled = !can && button !== document.activeElement;
}
export const acts = (button) => button.getAttribute("aria-disabled") !== "true";

// Show some of the buttons of a group. Where the one that has the focus is to go, the next one gets it.
export function offer(buttons) {
  const focused = document.activeElement;
  for (const [button, is] of buttons) button.hidden = !is;
  if (buttons.some(([button, is]) => button === focused && !is)) buttons.find(([, is]) => is)?.[0].focus();
}

// Keep the children of `parent` in step with `items`. A node is made once for each key, by `make(item)`, and kept:
// focus, hover and a click that has begun stay. `node.update(item)` is called with the item from then on.
export function keyed(parent, items, key, make) {
  const before = (parent.kept ??= new Map());
  const now = new Map(items.map((item) => [key(item), item]));
  const focused = document.activeElement;
  for (const [name, node] of before) {
    if (now.has(name)) continue;
    node.remove();
    before.delete(name);
  }
  let at = parent.firstChild;
  for (const [name, item] of now) {
    let node = before.get(name);
    if (!node) before.set(name, (node = make(item)));
    node.update?.(item);
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}

// A table whose rows are cards on a narrow screen, with `data-l` of a cell in front of it. columns: [name, class of its
// head]; "" is that of buttons.
export function table(label, columns, body) {
  const unseen = () => h("span", { class: "unseen" }, "Actions");
  const heads = columns.map(([name, kind]) => h("th", { scope: "col", class: kind }, name || unseen()));
  return h(
    "div",
    { class: "card wide" },
    h("table", { class: "cards", "aria-label": label }, h("thead", {}, h("tr", {}, heads)), body),
  );
}

export function spark(points, width = 96, height = 22) {
  const most = Math.max(...points, 1e-9);
  const step = width / Math.max(points.length - 1, 1);
  const at = (point, i) => `${(i * step).toFixed(1)},${(height - 1.5 - (point / most) * (height - 3)).toFixed(1)}`;
  const path = points.map(at).join(" ");
  return s(
    "svg",
    { class: "spark", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    points.length > 1 && s("polygon", { points: `0,${height} ${path} ${width},${height}` }),
    points.length > 1 && s("polyline", { points: path }),
  );
}

// A state is told by shape, colour and word.
const SHAPES = {
  ready: "M2 7.5l3.2 3.2L12 3.8",
  error: "M3 3l8 8M11 3l-8 8",
  loading: "M7 1.5a5.5 5.5 0 1 1-5.5 5.5",
  unloading: "M7 2v9M3 7.5l4 4 4-4",
  sleeping: "M9.5 2.2a5 5 0 1 0 2.6 7.2A4.6 4.6 0 0 1 9.5 2.2z",
  stopped: "M3 3h8v8H3z",
  disabled: "M2.5 7h9",
};
export function state(name, word = name) {
  const path = s("path", {});
  const text = h("span");
  const shape = s("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" }, path);
  const node = h("span", {}, shape, text);
  node.set = (now, said = now) => {
    setAttribute(node, "class", `state ${now}`);
    setAttribute(path, "d", SHAPES[now] ?? SHAPES.stopped);
    setText(text, said);
  };
  node.set(name, word);
  return node;
}

const GIBIBYTE = 2 ** 30;
export const bytes = (n) => {
  if (n === null || n === undefined) return "–";
  if (n >= GIBIBYTE) return `${(n / GIBIBYTE).toFixed(1)} GiB`;
  if (n >= 2 ** 20) return `${Math.round(n / 2 ** 20)} MiB`;
  return n >= 1024 ? `${(n / 1024).toFixed(1)} KiB` : `${n} B`;
};
export const seconds = (n) => {
  if (n === null || n === undefined) return "–";
  if (n < 1) return `${Math.round(n * 1000)} ms`;
  if (n < 10) return `${n.toFixed(1)} s`;
  if (n < 90) return `${Math.round(n)} s`;
  if (n < 5400) return `${Math.round(n / 60)} min`;
  return n < 129_600 ? `${Math.round(n / 3600)} h` : `${Math.round(n / 86_400)} d`;
};
export const rate = (n) => (!n ? "–" : n < 100 ? n.toFixed(1) : String(Math.round(n)));
export const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
// A time of the API, in the reader's zone: 03:12:04, with the day where it is another one.
export function clock(time) {
  const at = new Date(time);
  const text = at.toLocaleTimeString("sv-SE");
  return at.toDateString() === new Date().toDateString() ? text : `${at.toLocaleDateString("sv-SE")} ${text}`;
}

// A problem in a box, with what can be done about it.
export const problem = (kind, ...children) => h("div", { class: `card problem ${kind}` }, children);

// Say what came of something, to readers of the screen too; it fades.
export function say(text, isBad = false) {
  const node = h("div", { class: isBad ? "bad" : "" }, text);
  document.getElementById("said").append(node);
  setTimeout(() => node.remove(), isBad ? 12_000 : 5000);
}
