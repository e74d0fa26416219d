// Playground: placeholder.
import { h } from "./dom.js";

export function playground(main) {
  main.append(h("h1", {}, "Playground"));
  return {};
}
