// Playground: a chat (several at once, too), embeddings and rankings, each with where its time went.
// What is written here stays in the tab. Texts and settings outlive the screen; requests end with it.
import { Refused, address, call, hasKey } from "./api.js";
import { copyButton } from "./copy.js";
import { enable, h, keyed, plural, seconds, setAttribute, setText, show } from "./dom.js";
import { models, store } from "./feed.js";
import { phases, word } from "./fleet.js";
import { chatOnce, embed, queuedFor, rank, rateTogether } from "./play_ask.js";

const MOST_AT_ONCE = 32;
const SHORTEST_WAIT = 0.001; // seconds in a queue that are told
const KINDS = {
  chat: { name: "Chat", path: "v1/chat/completions", hint: "A message; Ctrl+Enter sends it", label: "Message" },
  embeddings: { name: "Embeddings", path: "v1/embeddings", hint: "One text a line", label: "Texts, one a line" },
  ranking: {
    name: "Ranking",
    path: "v1/rerank",
    hint: "The query, then one document a line",
    label: "Query and documents",
  },
};
const kept = { kind: "chat", model: "", text: "", system: "", most: 256, many: 1, temperature: "", messages: [] };

const mean = (numbers) => numbers.reduce((sum, one) => sum + one, 0) / numbers.length;
const lines = (text) => text.split("\n").filter((line) => line.trim());
const number = (field, least, most, fallback) => {
  const value = Math.round(Number(field.value));
  return Number.isFinite(value) && field.value !== "" ? Math.min(most, Math.max(least, value)) : fallback;
};

// What is asked for, as it is sent.
function bodyOf(kind, text) {
  const model = kept.model;
  if (kind === "embeddings") return { model, input: lines(text) };
  if (kind === "ranking") {
    const [query, ...documents] = lines(text);
    return { model, query: query ?? "", documents };
  }
  const system = kept.system.trim() ? [{ role: "system", content: kept.system }] : [];
  const body = { model, messages: [...system, ...kept.messages], max_tokens: kept.most };
  if (text.trim()) body.messages.push({ role: "user", content: text });
  if (kept.temperature !== "") body.temperature = Number(kept.temperature);
  return body;
}

function asCurl(kind, body) {
  const stream = kind === "chat" ? " -N" : "";
  const key = hasKey() ? ' -H "Authorization: Bearer $KEY"' : "";
  const sent = JSON.stringify(kind === "chat" ? { ...body, stream: true } : body, null, 2).replaceAll("'", "'\\''");
  return `curl${stream} ${address(KINDS[kind].path)}${key} -H "Content-Type: application/json" -d '${sent}'\n`;
}

// JSON as Python writes it: none of these bodies has true, false or null.
function asPython(kind, body) {
  const { model, ...rest } = body;
  const key = hasKey() ? 'os.environ["KEY"]' : '"EMPTY"';
  const head = `${hasKey() ? "import os\n\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url="${address("v1")}", api_key=${key})\n`;
  const given = Object.entries({ model, ...rest }).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`);
  if (kind === "chat") {
    return `${head}stream = client.chat.completions.create(\n${given.join("")}    stream=True,\n)\nfor chunk in stream:\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="", flush=True)\n`;
  }
  if (kind === "embeddings") return `${head}print(client.embeddings.create(\n${given.join("")}))\n`;
  return `${head}print(client.post("/rerank", body=${JSON.stringify(body)}, cast_to=object))\n`;
}

// What went wrong: the daemon's own words and its code, which leads to its page.
function failure(error) {
  const stopped = error.name === "AbortError";
  if (stopped) return h("p", { class: "sub" }, "Stopped.");
  const text = error instanceof TypeError ? "The connection was lost." : error.message;
  const code = error instanceof Refused && typeof error.code === "string" && error.code; // an engine's is a number
  const link = code && h("a", { class: "code", href: `../help/${encodeURIComponent(code)}` }, code);
  return h("p", { class: "failed" }, h("b", {}, error.status ? `${error.status} ` : ""), link, link && " ", text);
}

const toRequest = (id) => h("a", { href: `#/requests/${encodeURIComponent(id)}` }, h("span", { class: "mono" }, id));
const joined = (parts) => parts.filter(Boolean).flatMap((part, i) => (i ? [" · ", part] : [part]));

// When the first tokens came: behind the queue, where it is known how long each was there.
function beginnings(done, queued) {
  const came = done.map((one, i) => [one.first, queued?.[i] ?? 0]).filter(([first]) => first !== null);
  if (!came.length) return "";
  const wait = mean(came.map(([, inQueue]) => inQueue));
  const after = mean(came.map(([first, inQueue]) => Math.max(0, first / 1000 - inQueue)));
  const ofAll = came.length > 1 ? " on average" : "";
  return wait < SHORTEST_WAIT
    ? `first token after ${seconds(after)}${ofAll}`
    : `${seconds(wait)} in the queue, first token ${seconds(after)} later${ofAll}`;
}

// The figures of some answers to one question; they add up: a wait is in none of the rates.
function figures(done, spent, queued) {
  const ids = done.map((one) => one.id).filter(Boolean);
  const rates = done.map((one) => one.rate).filter((one) => one !== null);
  const tokens = done.reduce((sum, one) => sum + one.tokens, 0);
  const all = rateTogether(done);
  const exact = done.every((one) => one.exact);
  return [
    beginnings(done, queued),
    rates.length > 0 &&
      `${mean(rates).toFixed(1)} tokens/s${done.length > 1 ? " each" : ""}${all === null ? "" : `, ${all.toFixed(1)} together`}`,
    `${plural(tokens, "token")}${exact ? "" : " or more"}`,
    `${seconds(spent)} in all`,
    [...new Set(done.map((one) => one.instance).filter(Boolean))].sort().join(", "),
    ids.length > 0 && ["request ", ids.slice(0, 4).flatMap((id, i) => (i ? [", ", toRequest(id)] : [toRequest(id)]))],
  ];
}

class Playground {
  constructor(main, [model]) {
    if (model) kept.model = model;
    this.stop = null;
    this.named = [];
    this.pick = h("select", { id: "play-model", onchange: () => this.picked(this.pick.value) });
    this.kinds = Object.entries(KINDS).map(([kind, { name }]) =>
      h("button", { type: "button", "data-kind": kind, onclick: () => this.other(kind) }, name),
    );
    this.most = this.numeric("most", 1, 1_000_000);
    this.many = this.numeric("many", 1, MOST_AT_ONCE);
    this.temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, placeholder: "default" });
    this.temperature.value = kept.temperature;
    this.temperature.onchange = () => (kept.temperature = this.temperature.value);
    this.system = h("textarea", { rows: 2, oninput: () => (kept.system = this.system.value) });
    this.system.value = kept.system;
    this.text = h("textarea", {
      rows: 4,
      class: "say",
      oninput: () => this.typed(),
      onkeydown: (event) => this.pressed(event),
    });
    this.text.value = kept.text;
    this.send = h("button", { class: "main", onclick: () => this.start() }, "Send");
    this.halt = h("button", { onclick: () => this.stop?.abort() }, "Stop");
    this.fresh = h("button", { onclick: () => this.anew() }, "New chat");
    this.talk = h("div", { class: "talk" });
    this.told = h("p", { class: "sub told", role: "status" });
    this.waits = h("div", { class: "waits" });
    this.chatOnly = h(
      "div",
      { class: "bar settings" },
      h("label", {}, "max tokens ", this.most),
      h("label", {}, "at once ", this.many),
      h("label", {}, "temperature ", this.temperature),
    );
    this.systemBox = h(
      "details",
      { class: "system" },
      h("summary", {}, "System message"),
      h("label", {}, "System", this.system),
    );
    this.systemBox.open = Boolean(kept.system);
    enable(this.halt, false);
    const body = () => bodyOf(kept.kind, this.text.value);
    main.append(
      h("h1", {}, "Playground"),
      h(
        "div",
        { class: "bar" },
        h("label", {}, "Model ", this.pick),
        h("div", { class: "tabs", role: "group", "aria-label": "Kind" }, this.kinds),
      ),
      this.chatOnly,
      this.systemBox,
      this.talk,
      this.waits,
      this.told,
      this.text,
      h(
        "div",
        { class: "bar" },
        this.send,
        this.halt,
        this.fresh,
        h("span", { class: "push" }),
        copyButton("Copy as curl", () => asCurl(kept.kind, body())),
        copyButton("Copy as Python", () => asPython(kept.kind, body())),
      ),
    );
    this.kind(kept.kind);
    this.names();
  }

  numeric(name, least, most) {
    const field = h("input", { type: "number", min: least, max: most });
    field.value = kept[name];
    field.onchange = () => {
      kept[name] = number(field, least, most, kept[name]);
      field.value = kept[name];
    };
    return field;
  }

  leave() {
    this.stop?.abort();
  }

  // Names that the feed does not tell: aliases, adapters, and all models where the key may do nothing but use them.
  async names() {
    try {
      const { data } = await call("GET", "v1/models", { quiet: true });
      this.named = data.map((one) => ({ id: one.id }));
    } catch {
      // those of the feed are there
    }
    this.known = true;
    this.update();
  }

  update() {
    const choices = [...models().filter((model) => model.enabled), ...this.named];
    const ids = new Set();
    const once = choices.filter(({ id }) => !ids.has(id) && ids.add(id));
    keyed(
      this.pick,
      once,
      (model) => model.id,
      () => {
        const node = h("option");
        node.update = (model) => {
          setAttribute(node, "value", model.id);
          setText(node, model.state ? `${model.id} (${word(model)[1]})` : model.id);
        };
        return node;
      },
    );
    if (!once.length) return;
    if (!ids.has(kept.model) && (this.known || !kept.model)) kept.model = once[0].id;
    this.pick.value = kept.model;
    this.wait();
  }

  // While an answer is waited for: how far its model is.
  wait() {
    const model = store.models.get(kept.model);
    this.waits.hidden = !this.stop || !model || model.state === "ready";
    if (this.waits.hidden) return;
    this.phases ??= phases(kept.model);
    this.reason ??= h("p", { class: "sub" });
    if (!this.waits.firstChild) this.waits.append(this.reason, this.phases);
    const queued = model.queued ? `; ${plural(model.queued, "request")} ${model.queued === 1 ? "waits" : "wait"}` : "";
    setText(this.reason, `${model.id} is ${word(model)[1]}${model.message ? `: ${model.message}` : ""}${queued}`);
    this.phases.update(model.replicas);
  }

  picked(id) {
    kept.model = id;
    this.phases = this.reason = undefined;
    show(this.waits);
  }

  // Another kind of question; what was said stays.
  other(kind) {
    if (kind === kept.kind) return;
    this.stop?.abort();
    show(this.talk);
    show(this.told);
    this.kind(kind);
  }

  kind(kind) {
    kept.kind = kind;
    for (const button of this.kinds)
      setAttribute(button, "aria-pressed", button.dataset.kind === kind ? "true" : "false");
    const { hint, label } = KINDS[kind];
    setAttribute(this.text, "placeholder", hint);
    setAttribute(this.text, "aria-label", label);
    this.chatOnly.hidden = this.systemBox.hidden = this.fresh.hidden = kind !== "chat";
    if (kind === "chat") for (const { role, content } of kept.messages) this.bubble(role).set(content);
    this.typed();
  }

  typed() {
    kept.text = this.text.value;
    enable(this.send, !this.stop && Boolean(this.text.value.trim()));
  }

  pressed(event) {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    this.start();
  }

  anew() {
    this.stop?.abort();
    kept.messages = [];
    show(this.talk);
    show(this.told);
  }

  bubble(role) {
    const thought = h("p", { class: "thought" });
    const text = h("p", {}, role === "user" ? "" : "…");
    const node = h("div", { class: `bubble ${role}` }, h("span", { class: "who" }, role), thought, text);
    thought.hidden = true;
    node.set = (said, thoughts = "") => {
      setText(text, said);
      setText(thought, thoughts);
      thought.hidden = !thoughts;
    };
    node.fail = (error) => node.append(failure(error));
    this.talk.append(node);
    return node;
  }

  async start() {
    if (this.stop || !this.text.value.trim() || !kept.model) return;
    const stop = (this.stop = new AbortController());
    enable(this.halt, true);
    enable(this.send, false);
    show(this.told, "Waiting for the answer.");
    this.wait();
    try {
      await (kept.kind === "chat" ? this.chat(stop.signal) : this.whole(stop.signal));
    } catch (error) {
      show(this.told, failure(error));
    }
    if (this.stop === stop) this.stop = null;
    enable(this.halt, false);
    this.waits.hidden = true;
    this.typed();
  }

  async chat(signal) {
    const said = this.text.value;
    const body = bodyOf("chat", said);
    const turn = [{ role: "user", content: said }];
    kept.messages.push(...turn);
    this.text.value = "";
    this.bubble("user").set(said);
    const begun = performance.now();
    const bubbles = Array.from({ length: kept.many }, () => this.bubble("assistant"));
    const asked = bubbles.map(async (bubble) => {
      const found = await chatOnce(body, signal, (text, thoughts) => bubble.set(text, thoughts));
      if (found.error) bubble.fail(found.error);
      if (!found.text && !found.thoughts) bubble.set(found.error ? "" : "(nothing)");
      return found;
    });
    const done = await Promise.all(asked);
    if (!kept.messages.includes(turn[0])) return; // there is a new chat
    const first = done.find((one) => one.text);
    if (first) kept.messages.push({ role: "assistant", content: first.text });
    else {
      kept.messages.pop(); // nothing answers it: it is to be sent again
      if (!this.text.value) this.text.value = said;
    }
    if (kept.kind !== "chat") return null; // its figures are not those of what is shown
    const some = done.filter((one) => one.id !== null);
    const failed = done.filter((one) => one.error).length;
    const bad = failed > 0 && done.length > 1 && `${failed} of ${done.length} failed`;
    const stopped = signal.aborted && "stopped";
    if (!some.length) return show(this.told, stopped || "No answer.");
    const spent = (performance.now() - begun) / 1000;
    const tell = (queued) => show(this.told, joined([stopped, bad, ...figures(some, spent, queued)]));
    return tell(await queuedFor(some));
  }

  async whole(signal) {
    const begun = performance.now();
    const ask = kept.kind === "embeddings" ? embed : rank;
    show(this.talk); // what stands there answers another question
    const { node, facts, instance, id } = await ask(bodyOf(kept.kind, this.text.value), signal);
    show(this.talk, node);
    const spent = seconds((performance.now() - begun) / 1000);
    show(this.told, joined([...facts, `${spent} in all`, instance, id && ["request ", toRequest(id)]]));
  }
}

export const playground = (main, rest) => new Playground(main, rest);
