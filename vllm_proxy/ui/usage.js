// Usage: placeholder.
import { h } from "./dom.js";

export function usage(main) {
  main.append(h("h1", {}, "Usage"));
  return {};
}
