// Dialogues: a question with yes or no, and the one that asks for a key. Both are modal and end with Escape;
// the focus then goes back by itself to what had it.
import { h } from "./dom.js";

let socket = "/run/vllm-proxy/control.sock"; // that of the service, until the daemon has told its own

// Take note of the control socket's path, as `GET /health` tells it to who may read.
export function useSocket(path) {
  socket = path ?? socket;
}

// Show a dialogue until it is closed; returns the value that it was closed with, "" by Escape.
function shown(dialog, first) {
  document.body.append(dialog);
  dialog.showModal();
  first.focus();
  return new Promise((done) => {
    dialog.onclose = () => {
      dialog.remove();
      done(dialog.returnValue);
    };
  });
}

// Close what is open, as if by Escape: what it asks about is of the screen that is left.
export function closeDialogs() {
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close("");
}

// Ask before something that costs somebody something; true where the answer is `yes`.
export async function ask(question, yes, more = "") {
  const no = h("button", { type: "button" }, "Cancel");
  const go = h("button", { type: "button", class: "main danger" }, yes);
  const dialog = h(
    "dialog",
    { "aria-labelledby": "question" },
    h("h2", { id: "question" }, question),
    more && h("p", {}, more),
    h("div", { class: "bar end" }, no, go),
  );
  no.onclick = () => dialog.close("");
  go.onclick = () => dialog.close("yes");
  return (await shown(dialog, no)) === "yes";
}

// Returns the key, "" where it is to be forgotten, null where none was given.
export async function askForKey(why, has) {
  const port = location.port || "8000";
  const field = h("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false" });
  const use = h("button", { type: "submit", class: "main" }, "Use it");
  const no = h("button", { type: "button" }, "Cancel");
  const forget = has && h("button", { type: "button" }, "Forget it");
  let given = null;
  const form = h(
    "form",
    {},
    h("h2", { id: "asks" }, "A key of this daemon"),
    why && h("p", { class: "why" }, why),
    h("label", { for: "key" }, "Key"),
    field,
    h(
      "p",
      { class: "sub" },
      "It stays in this tab. ",
      h("code", {}, "vllm-proxy keys new me --scope admin"),
      " makes one on the server. From the first one on every client needs one, on this machine too, unless ",
      h("code", {}, "[keys.anonymous]"),
      " in the file says what those without may do. By ",
      h("code", {}, `ssh -NL ${port}:${socket} SERVER`),
      ` the page at localhost:${port}/ui/ needs none.`,
    ),
    h("div", { class: "bar end" }, forget, no, use),
  );
  const dialog = h("dialog", { "aria-labelledby": "asks" }, form);
  form.onsubmit = (event) => {
    event.preventDefault();
    if (field.value.trim()) given = field.value.trim();
    dialog.close();
  };
  no.onclick = () => dialog.close();
  if (forget) {
    forget.onclick = () => {
      given = "";
      dialog.close();
    };
  }
  await shown(dialog, field);
  return given;
}
