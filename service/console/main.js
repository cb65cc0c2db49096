// The frame: sections by the address's hash, the person's key, the theme. Each section is built when first seen.

import { call } from "./api.js";
import { h, replace, setText } from "./dom.js";
import { askForKey } from "./key.js";
import { Decisions } from "./decisions.js";
import { Jobs } from "./jobs.js";
import { Plan } from "./plan.js";
import { Playground } from "./playground.js";
import { Proposals } from "./proposals.js";
import { Reference } from "./reference.js";
import { Residency } from "./residency.js";
import { Tasks } from "./tasks.js";

// A section has `element`, `show(rest, session)` and `hide()`; `rest` is what follows its name in the address.
const SECTIONS = [
  ["playground", "Playground", Playground],
  ["residency", "Residency", Residency],
  ["tasks", "Tasks", Tasks],
  ["jobs", "Jobs", Jobs],
  ["plan", "Plan", Plan],
  ["decisions", "Decisions", Decisions],
  ["proposals", "Proposals", Proposals],
  ["api", "API", Reference],
];

const main = document.getElementById("main");
const notice = document.getElementById("notice");
const built = new Map();
let session = null;
let shown = null;

function place() {
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  const section = SECTIONS.find(([known]) => known === name) ?? SECTIONS[0];
  return { section, rest: rest.map(decoded).join("/") };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;  // a hash typed by hand need not be encoded rightly
  }
}

function mark() {
  const { section: [name, title] } = place();
  for (const link of document.querySelectorAll("#sections a")) {
    if (link.dataset.name === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${title} – moepager console`;
}

async function route({ moved = true } = {}) {
  mark();
  if (session === null && !(await begin())) return;
  const { section: [name, , Section], rest } = place();  // who waited may have gone elsewhere meanwhile
  if (!built.has(name)) {
    const section = new Section();
    section.element.hidden = true;
    main.append(section.element);
    built.set(name, section);
  }
  const next = built.get(name);
  if (shown && shown !== next) {
    shown.hide();
    shown.element.hidden = true;
  }
  shown = next;
  shown.element.hidden = false;
  shown.show(rest, session);
  if (moved) main.focus({ preventScroll: true });
}

// Whether the service let us in. Without a key, or still loading, the page says so and offers what helps.
async function begin() {
  try {
    session = await call("GET", "/v1/session");
  } catch (error) {
    replace(notice, error.message, " ", h("button", { type: "button", onclick: retry }, "Try again"));
    notice.hidden = false;
    if (error.status === 401) askForKey(reload);
    if (error.status === 503) setTimeout(retry, 1500);  // the model is still loading
    return false;
  }
  notice.hidden = !session.draining;
  if (session.draining) setText(notice, "An operator has drained the service: it takes no new queries.");
  setText(document.getElementById("model"), session.model);
  const { key } = session;
  setText(document.getElementById("key"), key ? `Key: ${key.name} (${key.role})` : "Key: none needed");
  document.getElementById("key").title = key?.tasks ? `Only for ${key.tasks.join(", ")}` : "";
  return true;
}

function retry() {
  route({ moved: false });
}

// Another key may see other things: everything is built anew.
async function reload() {
  shown?.hide();
  for (const section of built.values()) section.element.remove();
  built.clear();
  session = null;
  shown = null;
  setText(document.getElementById("key"), "Key");
  await route({ moved: false });
}

function showTheme() {
  setText(document.getElementById("theme"), `Theme: ${window.moepagerTheme.current()}`);
}

replace(document.getElementById("sections"), SECTIONS.map(([name, title]) =>
  h("li", {}, h("a", { href: `#/${name}`, "data-name": name }, title))));
document.getElementById("theme").addEventListener("click", () => window.moepagerTheme.next());
document.getElementById("key").addEventListener("click", () => askForKey(reload));
document.addEventListener("theme", showTheme);
document.addEventListener("key-refused", () => {
  if (session !== null) askForKey(reload);  // revoked while the page was open
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();  // the hash is the section's
  main.focus();
});
window.addEventListener("hashchange", () => route());
showTheme();
route({ moved: false });
