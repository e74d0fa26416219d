// A text field with line numbers and marks at bad lines.
import { h, setAttribute } from "./dom.js";

// label: what a screen reader calls it; changed: called after each change by hand.
export function editor(label, changed) {
  const field = h("textarea", {
    class: "mono",
    "aria-label": label,
    "aria-describedby": "verdict",
    spellcheck: "false",
    autocapitalize: "off",
    autocomplete: "off",
    wrap: "off",
    oninput,
  });
  const numbers = h("pre", { class: "mono", "aria-hidden": "true" });
  let bad = [];
  let drawn = "";

  function oninput() {
    bad = [];
    draw();
    changed();
  }

  // Made anew only where the number of lines or the marks are others.
  function draw() {
    const count = field.value.split("\n").length;
    const now = `${count} ${bad.join()}`;
    if (now !== drawn) {
      drawn = now;
      const marked = new Set(bad);
      const runs = [];
      for (let line = 1; line <= count; line++) {
        if (marked.has(line)) runs.push(h("span", { class: "bad" }, `● ${line}`), "\n");
        else if (typeof runs.at(-1) === "string") runs[runs.length - 1] += `${line}\n`;
        else runs.push(`${line}\n`);
      }
      numbers.replaceChildren(...runs);
    }
    numbers.scrollTop = field.scrollTop;
  }
  field.onscroll = draw;

  // Select a part of the text and show it.
  function select(from, to) {
    const all = field.value.split("\n").length;
    const before = field.value.slice(0, from).split("\n").length - 1;
    field.focus();
    field.setSelectionRange(from, to);
    field.scrollTop = Math.max(0, ((before - 5) * field.scrollHeight) / all);
    field.scrollLeft = 0;
    draw();
  }

  // Select a line, if it is one.
  function go(line) {
    if (!line) return;
    const lines = field.value.split("\n");
    const from = lines.slice(0, line - 1).reduce((sum, one) => sum + one.length + 1, 0);
    select(from, from + (lines[line - 1] ?? "").length);
  }

  return {
    node: h("div", { class: "editor" }, numbers, field),
    value: () => field.value,
    focus: () => field.focus(),
    isReadOnly: () => field.readOnly,
    go,
    set(text) {
      field.value = text;
      bad = [];
      draw();
    },
    // Another text, as if typed, with what is selected of it.
    type({ text, from, to }) {
      field.value = text;
      oninput();
      select(from, to);
    },
    mark(problems) {
      bad = problems.filter((one) => one.line && !one.file).map((one) => one.line);
      setAttribute(field, "aria-invalid", problems.length ? "true" : null);
      draw();
    },
    readOnly(is) {
      field.readOnly = is;
    },
  };
}
