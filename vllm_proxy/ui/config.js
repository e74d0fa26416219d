// Configuration: the file in an editor, with the daemon's own plan, or its problems, before anything is written.
// A text that is not applied outlives the screen: it stays in this tab until it is applied or undone.
import { call } from "./api.js";
import { copyButton } from "./copy.js";
import { showDiff } from "./diff.js";
import { acts, enable, h, plural, problem, say, setAttribute, setText, show } from "./dom.js";
import { editor } from "./editor.js";
import { store } from "./feed.js";
import { tableLine, withCopy, withKey, withModel } from "./toml.js";

const PAUSE_MS = 250;
const WORDS = { start: "start", replace: "replace", update: "live", scale: "scale", stop: "stop" };
const TOML = "text/toml";

let draft = null; // {text, base, revision} of what was left without being applied
addEventListener("beforeunload", (event) => {
  if (draft?.text !== undefined && draft.text !== draft.base) event.preventDefault();
});

// What the file is: {text, revision, crlf, readOnly}; a text field knows LF alone.
async function read() {
  const answer = await call("GET", "config", { raw: true });
  const text = await answer.text();
  return {
    text: text.replaceAll("\r\n", "\n"),
    crlf: /\r\n/.test(text) && !/(^|[^\r])\n/.test(text),
    revision: answer.headers.get("ETag"),
    readOnly: answer.headers.get("X-Vllm-Proxy-Read-Only"),
  };
}

function step({ model, action, reason, place, misfit }) {
  let where = null;
  if (place) where = `on ${place.length > 1 ? "GPUs" : "GPU"} ${place.join(", ")}`;
  else if (misfit) where = h("span", { class: "misfit" }, `never runs here: ${misfit}`);
  return h(
    "li",
    { class: `step ${action}` },
    h("span", { class: "word" }, WORDS[action] ?? action),
    h("span", {}, h("b", {}, model), " ", h("span", { class: "sub" }, reason, where && " · ", where)),
  );
}

// What changes outside of models: keys, settings, and what waits for a restart.
function others({ keys, settings, pending_restart: waits }) {
  const line = (word, text) =>
    h("li", { class: `step ${word}` }, h("span", { class: "word" }, word), h("span", { class: "sub" }, text));
  const some = Object.entries(keys).filter(([, names]) => names.length);
  return [
    ...some.map(([what, names]) => line("live", `${names.length > 1 ? "keys" : "key"} ${what}: ${names.join(", ")}`)),
    ...settings.map((text) => line("live", text)),
    ...waits.map((key) => line("restart", `${key}, with the next start of the daemon`)),
  ];
}

// Who would notice: the requests of the models whose engines end.
function touched(changes) {
  const ids = new Set(
    changes.filter((one) => one.action === "stop" || one.action === "replace").map((one) => one.model),
  );
  const busy = [...ids]
    .map((id) => store.models.get(id))
    .filter((model) => model && model.in_flight + model.queued > 0);
  if (!busy.length) return "";
  const count = (model) => `${model.id} ${model.in_flight}${model.queued ? ` and ${model.queued} waiting` : ""}`;
  const all = busy.reduce((sum, model) => sum + model.in_flight, 0);
  return `Touches ${plural(all, "request")} in flight: ${busy.map(count).join(", ")}. They get the drain time to end.`;
}

function applied({ changes, keys }) {
  const some = Object.values(keys ?? {}).reduce((sum, names) => sum + (names?.length ?? 0), 0);
  return `applied: ${plural(changes.length, "change")}${some ? `, ${plural(some, "key")}` : ""}`;
}

class Configuration {
  constructor(main, [what, id]) {
    this.base = "";
    this.revision = null;
    this.crlf = false;
    this.changes = null; // the plan of the text as it is; null: not known, or it has problems
    this.asked = 0;
    this.busy = true;
    this.seen = "";
    this.wanted = { what, id, address: location.hash };
    this.text = editor("models.toml", () => this.changed());
    this.text.readOnly(true); // until the file is there: what is typed before it would be a draft of nothing
    this.verdict = h("div", { id: "verdict", role: "status" });
    this.difference = h("div");
    this.above = h("div");
    this.touched = h("p", { class: "touched", hidden: true });
    this.apply = h("button", { class: "main", "aria-keyshortcuts": "Control+S", onclick: () => this.write() }, "Apply");
    this.undo = h("button", { onclick: () => this.reset() }, "Undo");
    enable(this.apply, false);
    enable(this.undo, false);
    main.append(
      h("h1", {}, "Configuration"),
      this.above,
      h(
        "div",
        { class: "split" },
        this.text.node,
        h(
          "div",
          { class: "beside" },
          h("div", { class: "bar" }, this.apply, this.undo, h("span", { class: "sub" }, "Ctrl+S applies")),
          this.touched,
          this.verdict,
          this.difference,
        ),
      ),
    );
    this.keys = (event) => this.pressed(event);
    document.addEventListener("keydown", this.keys);
    this.load();
  }

  leave() {
    this.left = true;
    clearTimeout(this.timer);
    this.asked++;
    document.removeEventListener("keydown", this.keys);
  }

  // The feed has told something: another file, or more requests.
  update() {
    setText(this.touched, touched(this.changes ?? []));
    this.touched.hidden = !this.touched.textContent;
    const heals = store.live && !this.live;
    this.live = store.live;
    if (heals && this.unanswered) this.plan();
    const { revision, problems } = store.config;
    const now = JSON.stringify([revision, problems]);
    if (now === this.seen) return;
    const first = !this.seen;
    this.seen = now;
    if (!first && !this.busy) this.look();
  }

  pressed(event) {
    if (event.key.toLowerCase() !== "s" || !(event.ctrlKey || event.metaKey) || event.altKey) return;
    event.preventDefault();
    if (acts(this.apply)) this.write();
    else if (this.changes === null && !this.text.isReadOnly()) this.plan(); // it is to be seen before it is applied
  }

  async load() {
    try {
      const file = await read();
      if (this.left) return;
      if (draft && draft.text !== draft.base) {
        const { revision } = draft;
        this.take(draft.text, draft.base, { ...file, revision });
        if (file.revision !== revision && !file.readOnly) this.conflict(file);
      } else this.take(file.text, file.text, file);
      this.begin(file.readOnly);
      this.busy = false;
    } catch (error) {
      const again = h("button", { onclick: () => this.load() }, "Try again");
      show(this.above, problem("", h("p", {}, `The file cannot be shown: ${error.message}`), again));
    }
  }

  // Type in what the address asks for, or show it.
  begin(readOnly) {
    const { what, id, address } = this.wanted;
    this.wanted = {};
    const there = this.text.value();
    const names = [...store.models.values()].flatMap((model) => [model.id, ...model.aliases]);
    const change = store.models.get(id)?.change;
    const types = {
      new: () => withModel(there, names),
      copy: () => withCopy(there, id, names),
      ...(change && { change: () => withKey(there, id, change.key, change.value) }),
    };
    const line = id ? tableLine(there, id) : 0;
    if (!Object.hasOwn(types, what ?? "") || readOnly) return this.text.go(line);
    // To come back here adds no other one. Whoever is on the way to another screen is not called back.
    if (location.hash === address) history.replaceState(null, "", "#/config");
    const typed = types[what]();
    if (typed) return this.text.type(typed);
    this.text.go(line);
    const why = " has no table [models.ID] of its own in this file, so nothing was typed in: edit its lines by hand.";
    this.above.append(problem("mild", h("p", {}, h("b", {}, id), why)));
  }

  // Show a text; `base` is the file that it is made from.
  take(text, base, { revision, crlf, readOnly }) {
    [this.base, this.revision, this.crlf] = [base, revision, crlf];
    show(this.above);
    this.text.set(text);
    this.text.readOnly(false);
    this.apply.hidden = this.undo.hidden = false;
    if (readOnly) this.readOnly(readOnly);
    this.changed(0);
  }

  readOnly(why) {
    this.text.readOnly(true);
    this.apply.hidden = true;
    this.undo.hidden = this.text.value() === this.base;
    const text = h("p", {}, h("b", {}, "Read-only. "), why);
    show(
      this.above,
      problem(
        "mild",
        text,
        copyButton("Copy the text", () => this.text.value(), "main"),
      ),
    );
  }

  reset() {
    if (!acts(this.undo)) return;
    this.text.set(this.base);
    this.changed(0);
    this.text.focus();
  }

  changed(pause = PAUSE_MS) {
    const text = this.text.value();
    draft = { text, base: this.base, revision: this.revision };
    enable(this.undo, text !== this.base);
    enable(this.apply, false);
    this.changes = null;
    this.asked++;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.plan(), pause);
  }

  async plan() {
    clearTimeout(this.timer);
    const mine = ++this.asked;
    const sent = this.text.value();
    let found = null;
    let refused = null;
    try {
      found = await call("POST", "config/plan", { body: sent || "\n", type: TOML, quiet: true });
    } catch (error) {
      if (error.name === "AbortError") return;
      refused = error;
    }
    if (mine !== this.asked) return;
    this.changes = found?.changes ?? null;
    enable(this.apply, found !== null && sent !== this.base && !this.busy);
    this.unanswered = refused !== null && !refused.status;
    this.text.mark(refused?.problems ?? []);
    show(this.verdict, refused ? this.refused(refused) : this.planned(found, sent === this.base));
    if (sent === this.base) show(this.difference);
    else
      show(
        this.difference,
        h("h2", {}, "What changes in the file"),
        showDiff(this.base, sent, "What changes in the file"),
      );
    this.update();
  }

  planned(found, same) {
    const steps = [...found.changes.map(step), ...others(same ? { ...found, pending_restart: [] } : found)];
    const warned = found.warnings.map((text) => problem("mild", h("p", {}, text)));
    if (steps.length) return [h("h2", {}, "Plan"), h("ul", { class: "plan card" }, steps), warned];
    const waits = store.config.pending_restart;
    const more = waits.length ? `A change of ${waits.join(", ")} waits for a restart of the daemon.` : "";
    const known = `${plural(store.order.length, "model")}, revision ${(this.revision ?? "").replaceAll('"', "").slice(0, 12)}.`;
    const text = same ? `${known} ${more}` : "Nothing changes: not for any model, nor for keys and settings.";
    return [h("h2", {}, same ? "In force" : "Plan"), h("p", { class: "sub" }, text)];
  }

  refused(error) {
    if (!error.problems?.length) return [h("h2", {}, "No plan"), problem("", h("p", {}, error.message))];
    const one = ({ path, message, line, file }) => {
      const to = line && !file ? h("button", { onclick: () => this.text.go(line) }, `Line ${line}`) : null;
      const where = file ? ` (${file}${line ? `, line ${line}` : ""})` : "";
      return problem("", h("p", {}, path && h("code", {}, path), path && " ", message, where), to);
    };
    return [h("h2", {}, plural(error.problems.length, "problem")), error.problems.map(one)];
  }

  async write() {
    if (!acts(this.apply)) return;
    const sent = this.text.value();
    enable(this.apply, false);
    this.busy = true;
    try {
      const body = this.crlf ? sent.replaceAll("\n", "\r\n") : sent;
      const headers = this.revision ? { "If-Match": this.revision } : {};
      const answer = await call("PUT", "config", { body, type: TOML, headers, raw: true });
      say(applied(await answer.json()));
      const revision = answer.headers.get("ETag");
      if (this.left) {
        if (draft?.text === sent) draft = { text: sent, base: sent, revision };
        return;
      }
      this.revision = revision;
      this.base = sent;
      show(this.above);
      this.changed(0);
    } catch (error) {
      await this.failed(error);
    } finally {
      this.busy = false;
    }
  }

  async failed(error) {
    const known = error.status < 500; // without an answer, or by one of a proxy on the way, it may be written
    const lead = known ? "Nothing was written. " : "It is not known whether it was written. ";
    if (this.left) return say(lead + error.message, true);
    if (error.status === 412) return this.look(true);
    if (error.code === "config_read_only") this.readOnly(error.message);
    else show(this.above, problem("", h("p", {}, h("b", {}, lead), error.message)));
    this.changed(0);
    if (!known) await this.look();
  }

  // Look at the file on disk: follow it, or show that it is another one than the text was made from.
  async look(isSure = false) {
    let file;
    try {
      file = await read();
    } catch (error) {
      if (!this.left) say(error.message, true);
      return;
    }
    if (this.left) return;
    const text = this.text.value();
    const isSafe = text === this.base || text === file.text; // nothing is lost
    if (file.revision === this.revision) {
      if (isSure) say("Nothing was written: the file was another one for a moment. Look at the plan again.", true);
      this.plan();
    } else if (isSafe && !isSure) this.take(file.text, file.text, file);
    else this.conflict(file);
  }

  conflict(file) {
    const theirs = file.text;
    const words = h(
      "p",
      {},
      h("b", {}, "The file changed meanwhile."),
      " Nothing was written. What the other one changed:",
    );
    const mine = () => this.take(this.text.value(), theirs, file);
    const keep = h("button", { class: "main", onclick: mine }, "Keep my text, over theirs");
    const take = h("button", { onclick: () => this.take(theirs, theirs, file) }, "Take theirs");
    const box = problem("", words, h("div", { class: "acts" }, keep, take));
    setAttribute(box, "role", "alert");
    show(this.above, h("div", { class: "conflict" }, box, showDiff(this.base, theirs, "What the other one changed")));
    enable(this.apply, false);
  }
}

export const configuration = (main, rest) => new Configuration(main, rest);
