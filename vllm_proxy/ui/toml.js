// What stands where in a TOML text, and what the editor types into it: a model, a copy of one, a key of one.
// Only whole lines are added or a value replaced; comments and all else stay. Whether it means what was asked for is up to
// the daemon's plan, which is shown beside it. A text that is no TOML is taken as far as it can be.
const PART = String.raw`(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]+)`;
const KEY = String.raw`${PART}(?:[ \t]*\.[ \t]*${PART})*`;
const PARTS = new RegExp(PART, "g");
const HEADER = new RegExp(String.raw`[ \t]*\[(\[?)[ \t]*(${KEY})[ \t]*\]`, "y");
const ASSIGNMENT = new RegExp(String.raw`[ \t]*(${KEY})[ \t]*=`, "y");
const STRING = String.raw`"""(?:[^\\]|\\.)*?"{3,5}|'''.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'`;
const TOKEN = new RegExp(String.raw`${STRING}|#[^\n]*|[\[\]{},\n]|[^\[\]{},"'#\n]+|.`, "sy");
const SCALAR = new RegExp(String.raw`([ \t]*)(?:${STRING}|[^\s#"'\[{]+)`, "sy");
const DEEPER = { "[": 1, "{": 1, "]": -1, "}": -1 };

function unquoted(part) {
  if (part.startsWith("'")) return part.slice(1, -1);
  if (!part.startsWith('"')) return part;
  const plain = part.replace(/\\U([0-9A-Fa-f]{8})/g, (_, code) => String.fromCodePoint(Number.parseInt(code, 16)));
  return JSON.parse(plain);
}

function parts(key) {
  try {
    return key.match(PARTS).map(unquoted);
  } catch {
    return [key]; // a string that is none
  }
}

const quoted = (name) => (/^[A-Za-z0-9_-]+$/.test(name) ? name : JSON.stringify(name));

function matched(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

// Behind the newline that ends what begins at `at`: not one inside a string, a list or a table.
function endOfLines(text, at) {
  let depth = 0;
  for (let token = matched(TOKEN, text, at); token; token = matched(TOKEN, text, TOKEN.lastIndex)) {
    depth += DEEPER[token[0]] ?? 0;
    if (token[0] === "\n" && depth <= 0) return TOKEN.lastIndex;
  }
  return text.length;
}

// A text in pieces of whole lines, without gaps: {kind, path, text}. kind: header, key, comment, blank; path: from the
// root, of the last two that of the header above.
function pieces(text) {
  const found = [];
  let table = [];
  for (let at = 0; at < text.length; at += found.at(-1).text.length) {
    const header = matched(HEADER, text, at);
    const key = header ? null : matched(ASSIGNMENT, text, at);
    const whole = text.slice(at, endOfLines(text, at + (header ?? key ?? [""])[0].length));
    if (header) found.push({ kind: "header", path: (table = parts(header[2])), text: whole });
    else if (key) found.push({ kind: "key", path: [...table, ...parts(key[1])], text: whole });
    else found.push({ kind: whole.trim() ? "comment" : "blank", path: table, text: whole });
  }
  return found;
}

// The tables of a model, in the text's order: {own: its pieces, end: the index behind them}. Comments directly above a
// header belong to it, and those directly below its last key, unless another header follows directly.
function tables(all, id) {
  const found = [];
  for (let at = 0; at < all.length; at++) {
    const { kind, path } = all[at];
    if (kind !== "header" || path[0] !== "models" || path[1] !== id) continue;
    let from = at;
    while (all[from - 1]?.kind === "comment") from--;
    let next = at + 1;
    while (next < all.length && all[next].kind !== "header") next++;
    let end = next;
    while (all[end - 1].kind !== "key" && all[end - 1].kind !== "header") end--;
    let below = end;
    while (below < next && all[below].kind === "comment") below++;
    if (below < next || next === all.length) end = below;
    found.push({ own: all.slice(from, end), path, head: at, end });
  }
  return found;
}

const same = (one, other) => one.length === other.length && one.every((part, i) => part === other[i]);
const joined = (all) => all.map((piece) => piece.text).join("");
const closed = (text) => (!text || text.endsWith("\n") ? text : `${text}\n`);

// A value between two texts, which is selected; behind them come the pieces after `at`.
function typed(before, value, behind, all, at) {
  const shown = JSON.stringify(value);
  const text = before + shown + behind + joined(all.slice(at + 1));
  return { text, from: before.length, to: before.length + shown.length };
}

function unused(name, all, taken) {
  const there = new Set(taken);
  for (const { path } of all) {
    if (path[0] !== "models") continue;
    if (path.length > 1) there.add(path[1]);
    if (path[2] === "adapters" && path.length > 3) there.add(path[3]);
  }
  let found = name;
  for (let i = 2; there.has(found); i++) found = `${name}-${i}`;
  return found;
}

// The line of a model's table, 0 where there is none.
export function tableLine(text, id) {
  let line = 1;
  for (const { kind, path, text: own } of pieces(text)) {
    if (kind !== "comment" && kind !== "blank" && path[0] === "models" && path[1] === id) return line;
    line += own.split("\n").length - 1;
  }
  return 0;
}

// Each of these gives {text, from, to}: the new text, and what of it is to be selected; null: there is no place for it.

// With another model at the end, or with the one that was added before and has no source yet. `taken`: ids and aliases
// that there are.
export function withModel(text, taken) {
  const empty = /^\[models\.new(?:-\d+)?\]\n(model = "")$/m.exec(text);
  if (empty) {
    const to = empty.index + empty[0].length;
    return { text, from: to - empty[1].length, to };
  }
  const before = text.replace(/\n*$/, "");
  const head = `${before}${before && "\n\n"}[models.${unused("new", pieces(text), taken)}]\n`;
  return { text: `${head}model = ""\n`, from: head.length, to: head.length + 'model = ""'.length };
}

// With a key of a model's own table in the place of the one that it has, or behind its others.
export function withKey(text, id, key, value) {
  const all = pieces(text);
  const there = all.findIndex(({ kind, path }) => kind === "key" && same(path, ["models", id, key]));
  if (there >= 0) {
    const own = all[there].text;
    const start = matched(ASSIGNMENT, own, 0)[0].length;
    const old = matched(SCALAR, own, start);
    if (!old) return null;
    return typed(
      joined(all.slice(0, there)) + own.slice(0, start) + old[1],
      value,
      own.slice(SCALAR.lastIndex),
      all,
      there,
    );
  }
  const table = tables(all, id).find(({ path }) => path.length === 2);
  if (!table) return null;
  let last = table.end - 1;
  while (all[last].kind !== "key" && all[last].kind !== "header") last--;
  const before = closed(joined(all.slice(0, last + 1)));
  const indent = all[last].kind === "key" ? /^[ \t]*/.exec(all[last].text)[0] : "";
  return typed(`${before}${indent}${key} = `, value, "\n", all, last);
}

// With a copy of a model directly behind it, without what no two models may have: aliases, and adapters, whose ids are
// names that clients send, too.
export function withCopy(text, id, taken) {
  const all = pieces(text);
  const found = tables(all, id);
  const elsewhere = ({ kind, path }) => kind === "key" && path[0] === "models" && (path.length < 2 || path[1] === id);
  const within = new Set(found.flatMap(({ own }) => own));
  if (!found.length || all.some((piece) => elsewhere(piece) && !within.has(piece))) return null;
  const name = quoted(unused(`${id}-copy`, all, taken));
  const renamed = (piece) => {
    if (piece.kind !== "header") return piece.text;
    const [head, twice] = matched(HEADER, piece.text, 0);
    const key = ["models", name, ...piece.path.slice(2).map(quoted)].join(".");
    return `${twice ? "[[" : "["}${key}]${piece.text.slice(head.length)}`;
  };
  const ownOf = ({ own }) =>
    own.filter(({ kind, path }) => kind !== "key" || (path[2] !== "aliases" && path[2] !== "adapters"));
  const copied = found.filter(({ path }) => path[2] !== "adapters");
  const shown = copied.map((one, i) => {
    const isApart = i + 1 < copied.length && all[one.end]?.kind === "blank";
    return closed(ownOf(one).map(renamed).join("")) + (isApart ? "\n" : "");
  });
  const { end } = found.at(-1);
  const before = `${closed(joined(all.slice(0, end)))}\n`;
  const after = joined(all.slice(end));
  const copy = shown.join("");
  const from = before.length + copy.indexOf(`[models.${name}`) + "[models.".length;
  return { text: before + copy + (after && !after.startsWith("\n") ? "\n" : "") + after, from, to: from + name.length };
}
