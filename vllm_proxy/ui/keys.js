// Keys: placeholder.
import { h } from "./dom.js";

export function keys(main) {
  main.append(h("h1", {}, "Keys"));
  return {};
}
