// Keys: who may do what; a key is made, rotated in two steps, disabled, deleted. The key itself is shown once: it stays
// in this tab, above the list, until it is put away.
import { call, repeat } from "./api.js";
import { copyButton } from "./copy.js";
import { ask } from "./dialogs.js";
import { clock, h, keyed, offer, problem, say, setAttribute, setText, show, table } from "./dom.js";
import { store } from "./feed.js";

const SCOPES = {
  inference: "use models",
  metrics: "read metrics",
  read: "see everything but logs and the file",
  operate: "start, stop, logs, reload",
  admin: "everything, the file and keys too",
};
const LIMITS = {
  requests_per_minute: "requests/min",
  tokens_per_minute: "tokens/min",
  tokens_per_day: "tokens/day",
  tokens_per_month: "tokens/month",
  max_in_flight: "at once",
  max_output_tokens: "tokens an answer",
};
const ASKED = ["requests_per_minute", "tokens_per_minute", "tokens_per_day", "max_in_flight"]; // in the form

let shownOnce = []; // {name, key, rotated}, the newest first: each until it is put away
addEventListener("beforeunload", (event) => {
  if (shownOnce.length) event.preventDefault();
});

const LOOK_MS = 10_000; // no event tells of a change of server.keys_file
const at = (name, more = "") => `keys/${encodeURIComponent(name)}${more}`;
const VARIABLES = { env: "VLLM_PROXY_API_KEY", "env-admin": "VLLM_PROXY_ADMIN_KEY" };
const isFixed = (key) => key.source === "environment";

function limitsOf(key) {
  const found = Object.entries(LIMITS).filter(([name]) => key[name] > 0);
  const texts = found.map(([name, word]) => `${key[name].toLocaleString("en")} ${word}`);
  const globs = Object.keys(key.limits);
  if (globs.length) texts.push(`others for ${globs.join(", ")}`);
  if (key.priority) texts.push(`priority ${key.priority}`);
  if (key.weight !== 1) texts.push(`weight ${key.weight}`);
  return texts.join(", ");
}

function stateOf(key) {
  if (!key.enabled) return ["off", "disabled"];
  if (key.expires_at !== null && new Date(key.expires_at) <= new Date()) return ["off", "expired"];
  if (key.hashes > 1) return ["moves", `in rotation, ${key.hashes} are good`];
  return ["on", "enabled"];
}

// Where it is written, as far as that says what cannot be done with it here.
function whereOf(key) {
  if (key.file !== null) return `its key is the first line of ${key.file}: put another one there to rotate it`;
  if (isFixed(key)) return `${VARIABLES[key.name] ?? "the environment"} gives it: change that, and restart the daemon`;
  if (key.name === "anonymous") return "for who sends no key";
  return key.source === "keys_file" ? "in server.keys_file" : "";
}

// The form for a new key: `make(body)` is called with what is typed in, and returns whether it was made.
function form(make) {
  const field = (name, label, props) => {
    const node = h("input", { id: `key-${name}`, autocomplete: "off", spellcheck: "false", ...props });
    return [node, h("label", { for: `key-${name}` }, h("span", {}, label), node)];
  };
  const [name, nameLabel] = field("name", "Name", {
    required: true,
    pattern: "[a-z0-9][a-z0-9._\\-]*",
    maxlength: 64,
  });
  const [about, aboutLabel] = field("description", "For what");
  const [globs, globsLabel] = field("models", "Models, globs with commas", { placeholder: "*" });
  const [until, untilLabel] = field("expires", "Expires", { type: "date" });
  const limits = ASKED.map((limit) => [
    limit,
    ...field(limit, LIMITS[limit], { type: "number", min: 1, placeholder: "no limit" }),
  ]);
  const boxes = Object.entries(SCOPES).map(([scope, means]) => {
    const box = h("input", { type: "checkbox", value: scope, checked: scope === "inference" });
    return [box, h("label", { class: "scope" }, box, h("b", {}, scope), h("span", { class: "sub" }, means))];
  });
  const node = h(
    "form",
    { class: "card make" },
    h(
      "div",
      { class: "fields" },
      nameLabel,
      aboutLabel,
      globsLabel,
      untilLabel,
      limits.map(([, , label]) => label),
    ),
    h(
      "fieldset",
      {},
      h("legend", {}, "May"),
      boxes.map(([, label]) => label),
    ),
    h("div", { class: "bar end" }, h("button", { type: "submit", class: "main" }, "Make the key")),
  );
  node.onsubmit = async (event) => {
    event.preventDefault();
    const body = { name: name.value.trim(), scopes: boxes.filter(([box]) => box.checked).map(([box]) => box.value) };
    if (about.value.trim()) body.description = about.value.trim();
    const some = globs.value
      .split(",")
      .map((glob) => glob.trim())
      .filter(Boolean);
    if (some.length) body.models = some;
    if (until.value) body.expires_at = `${until.value}T00:00:00Z`;
    for (const [limit, input] of limits) if (input.value) body[limit] = Number(input.value);
    if (await make(body)) node.reset();
  };
  return node;
}

class Keys {
  constructor(main) {
    this.revision = null;
    this.seen = null;
    this.asked = this.answered = 0; // what was asked earlier than what is shown is older
    this.once = h("div");
    this.wrong = h("div", { role: "alert" });
    this.unknown = h("div", { role: "alert" });
    this.body = h("tbody");
    const columns = [["Name"], ["May"], ["Models"], ["Limits"], ["Expires"], ["State"], [""]];
    this.rows = table("Keys", columns, this.body);
    this.none = h("p", { class: "sub" }, "There are no keys.");
    this.rows.hidden = this.none.hidden = true;
    this.form = form((body) => this.make(body));
    this.more = h("details", { class: "more" }, h("summary", {}, "Make a key"), this.form);
    main.append(
      h("h1", {}, "Keys"),
      h(
        "p",
        { class: "sub" },
        "What they may do counts at once, for requests that run as well. ",
        h("a", { href: "../help/security" }, "Scopes and rules"),
      ),
      this.once,
      this.unknown,
      this.wrong,
      this.rows,
      this.none,
      this.more,
    );
    this.showOnce();
    this.left = new AbortController();
    let quiet = false; // who is asked for a key is asked once
    const look = async () => {
      await this.load(quiet);
      quiet = true;
    };
    repeat(look, LOOK_MS, this.left.signal);
  }

  leave() {
    this.left.abort();
  }

  update() {
    const now = store.config.revision;
    const before = this.seen;
    this.seen = now;
    if (before && before !== now) this.load();
  }

  async load(quiet = false) {
    const mine = ++this.asked;
    try {
      const { revision, keys } = await call("GET", "keys", { quiet });
      if (this.left.signal.aborted || mine < this.answered) return;
      this.answered = mine;
      show(this.unknown);
      this.revision = revision;
      this.rows.hidden = !keys.length;
      this.none.hidden = Boolean(keys.length);
      keyed(
        this.body,
        keys,
        (key) => key.name,
        (key) => this.row(key),
      );
    } catch (error) {
      if (mine < this.answered) return;
      this.answered = mine;
      const again = h("button", { onclick: () => this.again() }, "Try again");
      show(this.unknown, problem("", h("p", {}, `Keys cannot be shown: ${error.message}`), again));
    }
  }

  again() {
    show(this.unknown);
    this.load();
  }

  row(first) {
    const { name } = first;
    let now = first;
    const cell = (label, kind = "") => h("td", { "data-l": label, class: kind });
    const [about, may, globs, limits] = [
      h("span", { class: "sub" }),
      cell("may"),
      cell("models", "id"),
      cell("limits", "sub"),
    ];
    const [expires, state] = [cell("expires"), h("td")];
    const button = (word, act, kind) =>
      h("button", { class: kind, onclick: act, "aria-label": `${word} ${name}` }, word);
    const rotate = button("Rotate", () => this.rotate(name));
    const finish = button("Finish rotation", () => this.finish(now));
    const off = button("Disable", () => this.enable(name, false));
    const on = button("Enable", () => this.enable(name, true));
    const gone = button("Delete", () => this.remove(now), "danger");
    const node = h(
      "tr",
      {},
      h("td", { class: "id" }, h("b", {}, name), " ", about),
      may,
      globs,
      limits,
      expires,
      state,
      h("td", {}, h("div", { class: "acts" }, rotate, finish, off, on, gone)),
    );
    node.update = (key) => {
      now = key;
      const digits = key.id ? `${key.id}…` : "";
      setText(about, [digits, key.description, whereOf(key)].filter(Boolean).join(" · "));
      setText(may, key.scopes.join(", ") || "nothing");
      setText(globs, key.models.join(", "));
      setText(limits, limitsOf(key));
      setText(expires, key.expires_at === null ? "" : clock(key.expires_at));
      const [kind, word] = stateOf(key);
      setAttribute(state, "class", `key-${kind}`);
      setText(state, word);
      const fixed = isFixed(key);
      const turns = key.file === null && key.name !== "anonymous" && !(key.enabled && key.hashes > 1);
      offer([
        [rotate, !fixed && turns],
        [finish, !fixed && key.hashes > 1],
        [off, !fixed && key.enabled],
        [on, !fixed && !key.enabled],
        [gone, !fixed],
      ]);
    };
    return node;
  }

  // A write: what it answers, or null where it was refused, which is shown then.
  // `revision`: of what its user saw when it was asked for, which a dialogue may be older than.
  async write(method, path, body, revision = this.revision) {
    show(this.wrong);
    try {
      const headers = revision ? { "If-Match": `"${revision}"` } : {};
      const answer = await call(method, path, { body, headers });
      await this.load();
      return answer ?? true;
    } catch (error) {
      const changed = error.status === 412;
      const lead = changed
        ? "Somebody else has changed the keys meanwhile. Look at them, and try again."
        : error.message;
      const known = error.status < 500; // without an answer, or by one of a proxy on the way, it may be written
      const sure = known ? "Nothing was written. " : "It is not known whether it was written. ";
      const list = (error.problems ?? []).filter((one) => !lead.includes(one.message));
      const more = list.map((one) => h("li", {}, one.path && h("code", {}, one.path), " ", one.message));
      const code =
        error.code && h("a", { class: "code", href: `../help/${encodeURIComponent(error.code)}` }, error.code);
      show(this.wrong, problem("", h("p", {}, h("b", {}, sure), lead), code, more.length > 0 && h("ul", {}, more)));
      if (changed || !known) await this.load();
      return null;
    }
  }

  async make(body) {
    const made = await this.write("POST", "keys", body);
    if (made) this.tell(made, false);
    return made !== null;
  }

  async rotate(name) {
    const made = await this.write("POST", at(name, "/rotate"), {});
    if (made) this.tell(made, made.hashes > 1);
  }

  async finish(key) {
    const more = `Only the newest, ${key.id}…, stays good. Clients that still send an older one are refused at once.`;
    const { revision } = this;
    if (!(await ask(`Finish the rotation of ${key.name}?`, "Finish", more))) return;
    const done = await this.write("POST", at(key.name, "/rotate"), { finish: true }, revision);
    if (done) say(`${key.name} is rotated`);
  }

  async enable(name, enabled) {
    if (await this.write("PATCH", at(name), { enabled })) say(`${name} is ${enabled ? "enabled" : "disabled"}`);
  }

  async remove(key) {
    const more = "Who sends it is refused at once. Its name can be given to another key.";
    const { revision } = this;
    if (!(await ask(`Delete the key ${key.name}?`, "Delete", more))) return;
    if (await this.write("DELETE", at(key.name), undefined, revision)) say(`${key.name} is deleted`);
  }

  tell({ name, key }, rotated) {
    if (!key) return;
    shownOnce = [{ name, key, rotated }, ...shownOnce];
    this.showOnce();
    this.once.querySelector("button").focus();
  }

  showOnce() {
    show(
      this.once,
      shownOnce.map((one) => this.card(one)),
    );
  }

  card(one) {
    const { name, key, rotated } = one;
    const id = `new-key-${key.slice(-12)}`;
    const field = h("input", {
      class: "mono",
      readonly: true,
      value: key,
      id,
      onfocus: () => field.select(),
    });
    const words = rotated
      ? "The old key stays good until you finish the rotation: give clients this one first."
      : "It is shown this once: the daemon keeps only its hash.";
    const away = () => {
      shownOnce = shownOnce.filter((it) => it !== one);
      this.showOnce();
      this.more.querySelector("summary").focus();
    };
    const copied = copyButton("Copy", () => key, "main");
    return h(
      "section",
      { class: "card once", "aria-label": `The new key of ${name}` },
      h("p", {}, h("label", { for: id }, `The new key of ${name}. `), words),
      h("div", { class: "bar" }, field, copied, h("button", { onclick: away }, "I have it, put it away")),
    );
  }
}

export const keys = (main) => new Keys(main);
