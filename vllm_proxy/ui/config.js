// Configuration: placeholder.
import { h } from "./dom.js";

export function configuration(main) {
  main.append(h("h1", {}, "Configuration"));
  return {};
}
