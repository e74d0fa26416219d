// The requests of the playground, and their answers: read, timed, and shown where they are tables.
import { Refused, call, events } from "./api.js";
import { h, plural } from "./dom.js";

const SHORTEST_MS = 20; // a stream that took less came at once: it tells no speed

const from = (answer) => ({
  instance: answer.headers.get("X-Vllm-Proxy-Instance"),
  id: answer.headers.get("X-Request-Id"),
});

// One streamed chat. each(text, thoughts): called with all that has come so far. Never throws: `error` says why it
// ended; `first`, `last`: when those tokens came, in ms since it was asked; `rate` in tokens a second; null where not
// known; `exact`: the engine has counted the tokens.
export async function chatOnce(body, signal, each) {
  const begun = performance.now();
  const found = {
    text: "",
    thoughts: "",
    first: null,
    last: null,
    rate: null,
    tokens: 0,
    exact: false,
    error: null,
    instance: null,
    id: null,
  };
  let chunks = 0;
  try {
    const sent = { ...body, stream: true, stream_options: { include_usage: true } };
    const answer = await call("POST", "v1/chat/completions", { body: sent, raw: true, signal });
    Object.assign(found, from(answer));
    for await (const { data } of events(answer)) {
      if (data === "[DONE]") break;
      const part = JSON.parse(data);
      if (part.error) throw new Refused(part.error.status ?? 0, part.error);
      if (part.usage) [found.tokens, found.exact] = [part.usage.completion_tokens, true];
      const delta = part.choices?.[0]?.delta ?? {};
      const thought = delta.reasoning ?? delta.reasoning_content ?? "";
      if (!delta.content && !thought) continue;
      found.first ??= performance.now() - begun;
      chunks++;
      found.text += delta.content ?? "";
      found.thoughts += thought;
      each(found.text, found.thoughts);
    }
  } catch (error) {
    found.error = error;
  }
  if (!found.exact) found.tokens = chunks;
  found.last = performance.now() - begun;
  const streamed = found.last - (found.first ?? 0);
  if (found.first !== null && found.tokens > 1 && streamed >= SHORTEST_MS) {
    found.rate = (found.tokens - 1) / (streamed / 1000);
  }
  return found;
}

// The tokens a second of several answers together, counted as that of each: from a first token on, without any wait.
export function rateTogether(answers) {
  const streamed = answers.filter((one) => one.rate !== null);
  if (streamed.length < 2) return null;
  const span = Math.max(...streamed.map((one) => one.last)) - Math.min(...streamed.map((one) => one.first));
  return streamed.reduce((sum, one) => sum + one.tokens - 1, 0) / (span / 1000);
}

// How long each of some answers waited for an instance, in seconds; null where that is not known.
export async function queuedFor(answers) {
  const one = async ({ id }) =>
    (await call("GET", `requests/${encodeURIComponent(id)}`, { quiet: true })).queue_seconds;
  try {
    return await Promise.all(answers.map(one));
  } catch {
    return null; // who may use models need not be one who may see requests
  }
}

async function whole(path, body, signal) {
  const answer = await call("POST", path, { body, raw: true, signal });
  return { ...(await answer.json()), ...from(answer) };
}

const COMPARED = 40; // texts; each with each is a cell

// Cosines of all pairs, as a table whose cells are coloured by value.
export async function embed(body, signal) {
  const { data, usage, instance, id } = await whole("v1/embeddings", body, signal);
  const all = data.toSorted((one, other) => one.index - other.index).map((one) => one.embedding);
  const vectors = all.slice(0, COMPARED);
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  const sizes = vectors.map((one) => Math.sqrt(dot(one, one)));
  const cell = (i, j) => {
    const value = dot(vectors[i], vectors[j]) / (sizes[i] * sizes[j] || 1);
    const strength = Math.round(Math.min(1, Math.max(0, value)) * 10);
    return h("td", { class: `n like-${strength}` }, value.toFixed(2));
  };
  const head = h(
    "tr",
    {},
    h("td"),
    vectors.map((_, i) => h("th", { scope: "col", class: "n" }, i + 1)),
  );
  const rows = vectors.map((_, i) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, `${i + 1}. ${body.input[i]}`),
      vectors.map((__, j) => cell(i, j)),
    ),
  );
  const table = h(
    "table",
    { class: "alike", "aria-label": "How alike the texts are" },
    h("thead", {}, head),
    h("tbody", {}, rows),
  );
  const node = h("div", { class: "card wide", tabindex: 0, role: "region", "aria-label": "Similarities" }, table);
  const facts = [
    plural(vectors[0]?.length ?? 0, "dimension"),
    usage?.prompt_tokens && plural(usage.prompt_tokens, "token"),
    all.length > COMPARED && `the first ${COMPARED} of ${all.length} are compared`,
  ];
  return { node, facts, instance, id };
}

// Documents with their scores, the best first.
export async function rank(body, signal) {
  const { results, usage, instance, id } = await whole("v1/rerank", body, signal);
  const sorted = results.toSorted((one, other) => other.relevance_score - one.relevance_score);
  const rows = sorted.map((one) =>
    h(
      "tr",
      {},
      h("td", { class: "n" }, one.relevance_score.toFixed(4)),
      h("td", {}, body.documents[one.index] ?? one.document?.text ?? ""),
    ),
  );
  const head = h("tr", {}, h("th", { scope: "col", class: "n" }, "Score"), h("th", { scope: "col" }, "Document"));
  const label = `Documents by how well they answer: ${body.query}`;
  const table = h("table", { "aria-label": label }, h("thead", {}, head), h("tbody", {}, rows));
  const facts = [plural(results.length, "document"), usage?.total_tokens && plural(usage.total_tokens, "token")];
  return { node: h("div", { class: "card" }, h("p", {}, h("b", {}, body.query)), table), facts, instance, id };
}
