// Requests: placeholder.
import { h } from "./dom.js";

export function requests(main) {
  main.append(h("h1", {}, "Requests"));
  return {};
}
