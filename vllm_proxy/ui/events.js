// Events: placeholder.
import { h } from "./dom.js";

export function happenings(main) {
  main.append(h("h1", {}, "Events"));
  return {};
}
