// What a conversation asks of the model: system prompt, sampling, tools. Changes count from the next answer on.

import { parseTools, readSettings } from "./conversation.js";
import { el, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { toast } from "./menu.js";
import { setPreference } from "./store.js";

// The server's bounds; [name, text, minimum, maximum, step].
const NUMBERS = [
  ["temperature", "temperature", 0, 2, 0.1],
  ["top_p", "topP", 0, 1, 0.05],
  ["top_k", "topK", 0, null, 1],
  ["repetition_penalty", "repetition", 0.001, null, 0.05],
  ["max_tokens", "maxTokens", 1, null, 1],
  ["seed", "seed", 0, null, 1],
];

export function openSettings(chat) {
  const close = () => dialog.close();
  const reset = () => {
    chat.changeSettings(Object.fromEntries(Object.keys(chat.current.settings).map((name) => [name, null])));
    dialog.querySelector(".sheet-body").replaceWith(body(chat));
  };
  const keep = () => {
    setPreference("defaults", readSettings(chat.current.settings));
    toast(t("asDefaultsDone"));
  };
  const dialog = el(
    "dialog",
    { class: "sheet", "aria-labelledby": "settings-title" },
    el("header", {}, el("h2", { id: "settings-title" }, t("settingsOf")), iconButton("close", t("done"), close)),
    body(chat),
    el(
      "footer",
      {},
      el("button", { type: "button", class: "plain", on: { click: reset } }, t("reset")),
      el("button", { type: "button", class: "plain", on: { click: keep } }, t("asDefaults")),
      el("button", { type: "button", class: "primary", on: { click: close } }, t("done")),
    ),
  );
  showDialog(dialog);
}

export function showDialog(dialog) {
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  document.body.append(dialog);
  dialog.showModal();
}

function body(chat) {
  return el(
    "div",
    { class: "sheet-body" },
    textField(chat, "system", t("system"), t("systemHint"), 4),
    el(
      "fieldset",
      {},
      el("legend", {}, t("sampling")),
      el("p", { class: "muted" }, t("samplingHint")),
      el("div", { class: "grid" }, ...NUMBERS.map((field) => numberField(chat, ...field)), thinkingField(chat)),
    ),
    toolsField(chat),
  );
}

function textField(chat, name, title, hint, rows) {
  const area = el("textarea", { rows, value: chat.current.settings[name] ?? "", "aria-describedby": `${name}-hint` });
  area.addEventListener("input", () => chat.changeSettings({ [name]: area.value }));
  return el(
    "div",
    { class: "field" },
    el("label", {}, el("span", {}, title), area),
    el("p", { class: "muted", id: `${name}-hint` }, hint),
  );
}

function numberField(chat, name, title, min, max, step) {
  const input = el("input", { type: "number", min, max, step: "any", inputmode: step < 1 ? "decimal" : "numeric" });
  const wrong = el("p", { class: "wrong", id: `${name}-wrong` });
  input.value = chat.current.settings[name] ?? "";
  input.placeholder = t("asModel");
  input.setAttribute("aria-describedby", wrong.id);
  input.addEventListener("input", () => {
    const value = input.valueAsNumber;
    const whole = step < 1 || Number.isSafeInteger(value);
    const isGood = input.value === "" ? input.validity.valid : input.validity.valid && whole;
    wrong.textContent = isGood ? "" : t(max === null ? "atLeast" : "outOfRange", { min, max });
    input.setAttribute("aria-invalid", String(!isGood));
    chat.changeSettings({ [name]: isGood && input.value !== "" ? value : null });
  });
  return el("div", { class: "field" }, el("label", {}, el("span", {}, t(title)), input), wrong);
}

function thinkingField(chat) {
  const select = el(
    "select",
    { on: { change: () => chat.changeSettings({ thinking: select.value }) } },
    ...[["", "asModel"], ["on", "on"], ["off", "off"]].map(([value, name]) => el("option", { value }, t(name))),
  );
  select.value = chat.current.settings.thinking ?? "";
  return el("div", { class: "field" }, el("label", {}, el("span", {}, t("thinking")), select));
}

function toolsField(chat) {
  const field = textField(chat, "tools", t("tools"), t("toolsHint"), 6);
  const area = field.querySelector("textarea");
  const wrong = el("p", { class: "wrong", role: "status" });
  area.classList.add("mono");
  area.spellcheck = false;
  const check = () => {
    let isGood = true;
    try {
      parseTools(area.value);
    } catch {
      isGood = false;
    }
    area.setAttribute("aria-invalid", String(!isGood));
    wrong.textContent = isGood ? "" : t("toolsBad");
  };
  area.addEventListener("input", check);
  check();
  field.append(wrong);
  return field;
}

// Asks for the server's key; `done` is called once there is one.
export function askForKey(wasRefused, done) {
  if (document.querySelector("dialog.key")) return;
  const input = el("input", { type: "password", autocomplete: "off", required: true });
  const form = el(
    "form",
    {},
    el("h2", { id: "key-title" }, t("keyTitle")),
    wasRefused && el("p", { class: "wrong" }, t("keyBad")),
    el("label", {}, el("span", {}, t("keyLabel")), input),
    el("p", { class: "muted" }, t("keyHint")),
    el(
      "footer",
      {},
      el("button", { type: "button", class: "plain", on: { click: () => dialog.close() } }, t("cancel")),
      el("button", { type: "submit", class: "primary" }, t("use")),
    ),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
    done(input.value.trim());
  });
  const dialog = el("dialog", { class: "key", "aria-labelledby": "key-title" }, form);
  showDialog(dialog);
}
