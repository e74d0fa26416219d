// Asks a daemon by the official client of JavaScript, once for each line of stdin:
//   {"url", "key", "model", "stream"} -> {"error": its class, "status", "code", "requests", "text", "finished"}
import { createInterface } from "node:readline";
import * as openai from "openai";

for await (const line of createInterface({ input: process.stdin })) {
  const { url, key, ...asked } = JSON.parse(line);
  const found = { error: null, requests: 0, text: "", finished: false };
  const counted = (...request) => (found.requests++, fetch(...request));
  const client = new openai.OpenAI({ baseURL: url, apiKey: key, fetch: counted });
  try {
    const answer = await client.chat.completions.create({ messages: [{ role: "user", content: "hi" }], ...asked });
    for await (const part of asked.stream ? answer : [answer]) {
      const [choice] = part.choices;
      found.text += choice?.delta?.content ?? choice?.message?.content ?? "";
      found.finished ||= Boolean(choice?.finish_reason);
      if (asked.stream) console.log(JSON.stringify({ event: found.text }));
    }
  } catch (error) {
    Object.assign(found, { error: error.constructor.name, status: error.status ?? null, code: error.code ?? null });
    found.isApiError = error instanceof openai.APIError;
  }
  console.log(JSON.stringify(found));
}
