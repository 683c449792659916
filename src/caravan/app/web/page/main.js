// The page as a whole: which view is shown, light or dark, the key, and whether the service can be reached.

import { askPage } from "./ask.js";
import { comparePage } from "./compare.js";
import { keyDialog } from "./dialogs.js";
import { documentsPage } from "./documents.js";
import { counted } from "./elements.js";
import { forgetMarks } from "./marks.js";
import { here } from "./routes.js";
import { searchPage } from "./search.js";
import { servedAnew } from "./served.js";
import { currentKey, whenKeyIsNeeded } from "./service.js";
import { trainingPage } from "./training.js";
import { whenLost } from "./trouble.js";

const LOOK = 2000; // milliseconds between two looks for a service that is gone
const root = (name) => document.querySelector(`[data-view="${name}"]`);
const pages = {
  search: searchPage(root("search")),
  compare: comparePage(root("compare")),
  ask: askPage(root("ask")),
  training: trainingPage(root("training")),
  documents: documentsPage(root("documents")),
};
let current = null;

function route() {
  const { name: asked, parameters } = here();
  const name = asked in pages ? asked : "search";
  const arrived = current !== name;
  if (arrived) {
    pages[current]?.hide?.();
    for (const other of Object.keys(pages)) root(other).hidden = other !== name;
    for (const link of document.querySelectorAll("nav [data-page]")) {
      if (link.dataset.page === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const heading = root(name).querySelector("h1");
    document.title = `${heading.textContent} · caravan`;
    // A person who came here by a link hears where; one who has just opened the page begins at its top.
    if (current) heading.focus();
    current = name;
    scrollTo(0, 0);
    servedAnew().catch(() => {}); // another model may have come; the page that is shown says what is wrong
  }
  pages[name].show(parameters);
}

addEventListener("hashchange", () => {
  if (location.hash === "" || location.hash.startsWith("#/")) route();
});

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href^='#']:not([href^='#/'])");
  const target = link && document.getElementById(link.getAttribute("href").slice(1));
  if (!target) return;
  event.preventDefault(); // the address belongs to the pages
  target.focus();
  target.scrollIntoView({ block: "nearest" });
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, dialog");
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const box = pages[current].box;
  if (!box) return;
  event.preventDefault();
  box.focus();
  box.select();
});

document.addEventListener("served", ({ detail: info }) => {
  document.getElementById("served").textContent = `${info.model_id}, ${counted(info.documents, "document")}`;
  document.getElementById("about").textContent = `caravan ${info.version}`;
});

// Light, dark, or as the system has it.

const themeButton = document.getElementById("theme-button");
const themes = { system: "Theme: system", light: "Theme: light", dark: "Theme: dark" };

function showTheme() {
  themeButton.textContent = themes[document.documentElement.dataset.theme] ?? themes.system;
}

themeButton.onclick = () => {
  const names = Object.keys(themes);
  const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  document.documentElement.dataset.theme = next;
  localStorage.setItem("caravan-theme", next);
  showTheme();
};
showTheme();

// The key.

function anotherCaller() {
  forgetMarks();
  servedAnew().then(
    () => pages[current].anew(),
    () => pages[current].anew(),
  );
}

whenKeyIsNeeded(keyDialog);
document.getElementById("key-button").onclick = async () => {
  const why = currentKey() ? "A key is in use." : "Give a key if the service asks for one, or to change documents.";
  try {
    await keyDialog(why);
  } catch {
    return; // left without a key: as before
  }
  anotherCaller();
};

// A service that is gone.

let looking = false;

whenLost(async () => {
  if (looking) return;
  looking = true;
  const banner = document.getElementById("connection");
  banner.textContent = "The service cannot be reached. This page looks for it and goes on when it is back.";
  banner.hidden = false;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, LOOK));
    try {
      if ((await fetch("health", { cache: "no-store" })).ok) break;
    } catch {
      // Not yet.
    }
  }
  looking = false;
  banner.hidden = true;
  anotherCaller();
});

route();
