// The shell: head, navigation and routing.
//
// A screen is a module with a function `screen(main, rest)`, named in SCREENS. It fills `main`, which is empty, and
// returns {update, leave}, both optional:
//   rest      the parts of the address behind the screen's name, decoded: of `#/model/org%2Fembed` it is ["org/embed"]
//   update()  called when `store` (feed.js) has changed, at most once a frame, and once at the beginning
//   leave()   called when another screen, or the same one with another `rest`, takes its place: abort what is under way
// It asks the daemon through `call` (api.js) alone; a 401 opens the dialogue for a key there. Elements are made by `h`
// (dom.js), never from markup; styles are classes of the screen's own css file, named in index.html.
// Addresses: #/fleet, #/model/ID, #/requests[/REQUEST_ID], #/events, #/devices, #/config[/new | /model/ID | /copy/ID |
// /change/ID], #/play[/ID], #/keys, #/usage.
import { enterKey } from "./api.js";
import { configuration } from "./config.js";
import { devices } from "./devices.js";
import { closeDialogs } from "./dialogs.js";
import { h, plural, problem, say, setAttribute, setText } from "./dom.js";
import { happenings } from "./events.js";
import { begin, onChange, problems, store } from "./feed.js";
import { fleet } from "./fleet.js";
import { keys } from "./keys.js";
import { model } from "./model.js";
import { playground } from "./play.js";
import { requests } from "./requests.js";
import { usage } from "./usage.js";

// By the first part of the address: the name in the navigation (null: not there), and the screen.
const SCREENS = {
  fleet: ["Fleet", fleet],
  model: [null, model],
  requests: ["Requests", requests],
  events: ["Events", happenings],
  devices: ["Devices", devices],
  config: ["Configuration", configuration],
  play: ["Playground", playground],
  keys: ["Keys", keys],
  usage: ["Usage", usage],
};
const THEMES = { "": "light dark", light: "light", dark: "dark" };
const THEME = "vllm-proxy.theme"; // the only thing that is kept in the browser

const main = document.querySelector("main");
const links = Object.entries(SCREENS).flatMap(([to, [name]]) =>
  name ? [[to, h("a", { href: `#/${to}` }, name)]] : [],
);
const connection = h("span", { class: "connection", role: "status" });
const theme = h("button", { class: "plain", onclick: nextTheme });
const why = h("p");
const banner = problem("", why, h("button", { class: "main", onclick: () => enterKey() }, "Enter a key"));
let screen = null;
let title = "";
let due = false;
let current = "";

function head() {
  document.querySelector("header").append(
    h("a", { class: "brand", href: "#/fleet" }, "vllm-proxy"),
    h(
      "nav",
      { "aria-label": "Screens" },
      links.map(([, link]) => link),
      h("a", { href: "../help/" }, "Help"),
    ),
    h("div", { class: "tools" }, connection, h("button", { class: "plain", onclick: () => enterKey() }, "Key"), theme),
  );
}

// What keeps the daemon from telling anything, above every screen.
function aboveAll() {
  banner.classList.add("banner");
  banner.setAttribute("role", "alert");
  banner.hidden = true;
  main.before(banner);
}

function updateHead() {
  const wrong = problems().length;
  const state = store.live === null ? "connecting" : store.live ? "live" : "lost";
  setAttribute(connection, "class", `connection ${state} ${wrong ? "wrong" : ""}`);
  let text = state;
  if (store.live === false) text = store.refused ? "not let in" : "connection lost, trying again";
  else if (store.live && wrong) text = `live · ${plural(wrong, "problem")}`;
  setText(connection, text);
  banner.hidden = !store.refused;
  setText(why, store.refused?.message ?? "");
  document.title = `${wrong ? `(${wrong}) ` : ""}${title} · vllm-proxy`;
}

function render() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    updateHead();
    screen?.update?.();
  });
}

function parts() {
  try {
    return location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  } catch {
    return [""]; // no such address
  }
}

function go() {
  let [name, ...rest] = parts();
  if (!Object.hasOwn(SCREENS, name)) [name, rest] = ["fleet", []];
  screen?.leave?.();
  closeDialogs();
  main.replaceChildren();
  main.className = name;
  const [shown, make] = SCREENS[name];
  title = shown ?? rest[0] ?? "";
  for (const [to, link] of links) setAttribute(link, "aria-current", to === name && "page");
  document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  screen = make(main, rest);
  render();
}

function keptTheme() {
  try {
    return localStorage.getItem(THEME) ?? "";
  } catch {
    return "";
  }
}

function setTheme(name) {
  current = name;
  document.documentElement.style.colorScheme = THEMES[name];
  setText(theme, `Theme: ${name || "auto"}`);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const name = names[(names.indexOf(current) + 1) % names.length];
  try {
    localStorage.setItem(THEME, name);
  } catch {
    // a browser that keeps nothing of sites: it holds until the tab is closed
  }
  setTheme(name);
}

addEventListener("hashchange", () => {
  go();
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
});
addEventListener("unhandledrejection", ({ reason }) => {
  if (reason?.name !== "AbortError") say(reason?.message ?? String(reason), true);
});
addEventListener("error", ({ message }) => message && say(message, true));
document.querySelector(".skip").onclick = (event) => {
  event.preventDefault(); // its address would be taken for a screen's
  main.focus();
};
head();
aboveAll();
const kept = keptTheme();
setTheme(Object.hasOwn(THEMES, kept) ? kept : "");
onChange(render);
go();
begin();
