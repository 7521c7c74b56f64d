// Puts the page together.

import { listModels, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { byId, el, icon } from "./dom.js";
import { currentLanguage, LANGUAGES, setLanguage, t, translatePage } from "./i18n.js";
import { toast } from "./menu.js";
import { askForKey, openSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { preference, setPreference, setTabValue, Store, tabValue } from "./store.js";
import { problemText, Transcript } from "./transcript.js";

const THEMES = { auto: "auto", light: "sun", dark: "moon" };

for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
const chat = new Chat(await Store.open());
chat.addEventListener("trouble", ({ detail }) => toast(t(detail)));
await chat.load(tabValue("open"));

const transcript = new Transcript(chat);
const composer = new Composer(chat, { editLast: () => transcript.editLast() });
const sidebar = new Sidebar(chat, { opened: () => composer.focusGently() });
let hasKey = false;

chat.addEventListener("turns", () => {
  setTabValue("open", chat.current.id);
  showModels();
});
chat.addEventListener("key", () => wantKey(() => chat.retry()));
byId("open-settings").addEventListener("click", () => openSettings(chat));
byId("model").addEventListener("change", (event) => chat.changeSettings({ model: event.target.value }));
addEventListener("pagehide", () => chat.saveRunning());
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  composer.focus();
});
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    byId("new-chat").click();
  } else if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open], :popover-open")) {
    chat.stop();
  }
});

function wantKey(then) {
  askForKey(hasKey, (key) => {
    hasKey = true;
    setKey(key);
    then();
    loadModels();
  });
}

async function loadModels() {
  try {
    chat.models = await listModels();
    showModels();
  } catch (problem) {
    if (problem.status === 401) wantKey(() => {});
    else toast(problemText(problem), [t("retry"), loadModels]);
  }
}

function showModels() {
  const select = byId("model");
  select.replaceChildren(...chat.models.map((name) => el("option", { value: name }, name)));
  select.value = chat.model;
  select.hidden = !chat.models.length;
}

function showTheme() {
  const choice = preference("theme", "auto");
  const button = byId("theme");
  button.replaceChildren(icon(THEMES[choice]));
  button.title = t("theme", { name: t(choice) });
  button.setAttribute("aria-label", button.title);
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(preference("theme", "auto")) + 1) % names.length];
  setPreference("theme", next);
  document.documentElement.dispatchEvent(new CustomEvent("kiloq-theme", { detail: next }));
  showTheme();
});

function showLanguage() {
  translatePage();
  showTheme();
  sidebar.show();
  transcript.show();
}

const languages = byId("language");
languages.append(...Object.entries(LANGUAGES).map(([code, name]) => el("option", { value: code, lang: code }, name)));
languages.value = currentLanguage();
languages.addEventListener("change", () => {
  setLanguage(languages.value);
  showLanguage();
});
byId("new-chat-key").textContent = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ K" : "Ctrl K";

showLanguage();
composer.focusGently();
await loadModels();
