// Events: what has happened, the newest first, as the daemon keeps it.
import { clock, h, keyed, plural, setText, state, table } from "./dom.js";
import { store } from "./feed.js";

const SHOWN = 300;
const LISTED = 6; // changes of a file
// What is shown, by the name of the choice.
const KINDS = {
  all: () => true,
  problems: (one) => one.kind === "rejected" || one.state === "error" || Boolean(one.reason),
  models: (one) => one.kind === "instance" || one.kind === "model",
  file: (one) => one.kind === "accepted" || one.kind === "rejected",
  commands: (one) => one.kind === "write",
};

function modelOf({ model, instance }) {
  if (model === undefined) return "–";
  const name = instance ?? model;
  return h("a", { href: `#/model/${encodeURIComponent(model)}`, title: name }, name);
}

function what(one) {
  if (one.kind === "accepted") return accepted(one);
  if (one.kind === "rejected") {
    const { path, line, message } = one.problems[0] ?? {};
    const more = one.problems.length > 1 ? ` And ${one.problems.length - 1} more.` : "";
    return h("a", { href: "#/config" }, `${path ?? ""}${line ? ` (line ${line})` : ""}: ${message ?? ""}${more}`);
  }
  if (one.kind === "write") return [h("b", {}, one.who), ` ${one.what}`];
  const said = one.message ?? "";
  return [one.reason && h("a", { href: `../help/${one.reason}` }, one.reason), one.reason && said ? ": " : "", said];
}

// All of them, those that are too many to be read at once behind a click.
function listed(texts) {
  if (texts.length <= LISTED) return texts.join(", ");
  const more = h("details", {}, h("summary", {}, `and ${texts.length - LISTED} more`), texts.slice(LISTED).join(", "));
  return [texts.slice(0, LISTED).join(", "), more];
}

function accepted({ revision, changes, keys }) {
  const steps = changes.map((change) => `${change.action} ${change.model} (${change.reason})`);
  const counts = Object.entries(keys ?? {}).flatMap(([how, names]) =>
    names.length ? [`${plural(names.length, "key")} ${how}`] : [],
  );
  const said = [...counts, ...steps];
  return [h("code", {}, revision.slice(0, 8)), " ", said.length ? listed(said) : "nothing changes for engines"];
}

function shape(one) {
  if (one.kind === "accepted") return state("ready", "file accepted");
  if (one.kind === "rejected") return state("error", "file refused");
  if (one.kind === "write") return state("stopped", "by hand");
  const phase = one.phase && one.phase !== "serving" ? ` (${one.phase.replaceAll("_", " ")})` : "";
  return state(one.state, `${one.state}${phase}`); // as `vllm-proxy events` has it
}

const row = (one) =>
  h(
    "tr",
    {},
    h("td", { class: "mono when" }, clock(one.at)),
    h("td", { class: "is" }, shape(one)),
    h("td", { class: "which" }, modelOf(one)),
    h("td", { class: "said" }, what(one)),
  );

export function happenings(main) {
  const body = h("tbody");
  const none = h("p", { class: "sub" });
  const search = h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter events", oninput: update });
  let kind = "all";
  let most = SHOWN;
  const choices = Object.keys(KINDS).map((name) =>
    h(
      "button",
      { "aria-pressed": String(name === kind), onclick: () => choose(name) },
      name[0].toUpperCase() + name.slice(1),
    ),
  );
  const more = h("button", { onclick: all }, "Show all");
  const rows = table("Events", [["Time"], ["What"], ["Of"], ["Why"]], body);
  main.append(
    h("h1", {}, "Events"),
    h("div", { class: "bar" }, search, h("div", { class: "tabs", role: "group", "aria-label": "Kind" }, choices)),
    rows,
    none,
    h("div", { class: "bar" }, more),
  );
  function choose(name) {
    kind = name;
    Object.keys(KINDS).forEach((one, i) => choices[i].setAttribute("aria-pressed", String(one === name)));
    update();
  }
  function all() {
    most = Infinity;
    update();
  }
  function update() {
    const words = search.value.toLowerCase();
    const wanted = (one) => KINDS[kind](one) && JSON.stringify(one).toLowerCase().includes(words);
    const found = store.happened.filter(wanted).reverse();
    const shown = found.slice(0, most);
    keyed(body, shown, (one) => one.id, row);
    rows.hidden = !shown.length;
    none.hidden = Boolean(shown.length) || !store.told;
    setText(none, store.happened.length ? "None like that." : "Nothing has happened yet.");
    more.hidden = shown.length === found.length;
  }
  return { update };
}
