// What differs between two texts, by lines, and how it is shown.
import { h } from "./dom.js";

const CONTEXT = 2;
const MOST_CELLS = 4_000_000; // of the table below: beyond, all between the first and the last difference is one change

// All lines of both: ["-" | "+" | " ", line].
function lines(before, after) {
  const a = before.split("\n");
  const b = after.split("\n");
  let top = 0;
  while (top < a.length && top < b.length && a[top] === b[top]) top++;
  let end = 0;
  while (end < Math.min(a.length, b.length) - top && a.at(-1 - end) === b.at(-1 - end)) end++;
  const same = (line) => [" ", line];
  const changed = between(a.slice(top, a.length - end), b.slice(top, b.length - end));
  return [...a.slice(0, top).map(same), ...changed, ...a.slice(a.length - end).map(same)];
}

function between(a, b) {
  if (a.length * b.length > MOST_CELLS) return [...a.map((line) => ["-", line]), ...b.map((line) => ["+", line])];
  const common = Array.from({ length: a.length + 1 }, () => new Uint32Array(b.length + 1)); // of what is behind
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  const found = [];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      found.push([" ", a[i++]]);
      j++;
    } else if (j === b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) found.push(["-", a[i++]]);
    else found.push(["+", b[j++]]);
  }
  return found;
}

// The changes with some lines around them; ["@", ""] stands for lines that are left out.
export function diff(before, after) {
  const all = lines(before, after);
  const near = new Set();
  for (const [at, [kind]] of all.entries()) {
    if (kind === " ") continue;
    for (let i = at - CONTEXT; i <= at + CONTEXT; i++) near.add(i);
  }
  const found = [];
  for (const [at, line] of all.entries()) {
    if (!near.has(at)) continue;
    if (found.length && !near.has(at - 1)) found.push(["@", ""]);
    found.push(line);
  }
  return found;
}

const KINDS = { "+": "add", "-": "del", "@": "gap", " ": "" };
export function showDiff(before, after, label) {
  const rows = diff(before, after).map(([kind, line]) =>
    h("div", { class: KINDS[kind] }, kind === "@" ? "⋯" : `${kind} ${line}`),
  );
  return h("pre", { class: "diff card", tabindex: 0, role: "region", "aria-label": label }, rows);
}
