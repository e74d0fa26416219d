// Copies a text to the clipboard.
import { h, say } from "./dom.js";

// Over plain HTTP, on another machine than this one, browsers have no `navigator.clipboard`.
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = h("textarea", { readonly: true, "aria-hidden": "true" });
  field.value = text;
  const before = document.activeElement;
  (before?.closest("dialog") ?? document.body).append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  if (!done) throw new Error("the browser does not let it");
}

// text: a function.
export function copyButton(name, text, kind = "") {
  const act = async () => {
    try {
      await copy(text());
      say("copied");
    } catch (error) {
      say(`cannot copy: ${error.message}; select the text instead`, true);
    }
  };
  return h("button", { type: "button", class: kind, onclick: act }, name);
}
