// Model: placeholder.
import { h } from "./dom.js";

export function model(main) {
  main.append(h("h1", {}, "Model"));
  return {};
}
