// The turns of a conversation as elements. Each is given its message and what may be done with it.

import { copyFrom, el, icon, iconButton } from "./dom.js";
import { formatNumber, t } from "./i18n.js";
import { LiveMarkdown } from "./live-markdown.js";
import { render } from "./markdown.js";

export const composing = (event) => event.isComposing || event.keyCode === 229; // an input method is at work

export function userTurn(message, resend) {
  const turn = el("article", { class: "turn turn-user", "aria-label": t("you") });
  const show = () => {
    const copy = iconButton("copy", t("copy"), () => copyFrom(copy, message.content));
    const edit = iconButton("edit", t("edit"), () => turn.edit());
    const bubble = el("div", { class: "bubble", dir: "auto" }, message.content);
    turn.replaceChildren(bubble, el("div", { class: "turn-actions" }, copy, edit));
    return edit;
  };
  turn.edit = () => {
    turn.replaceChildren(editor(message.content, resend, () => show().focus()));
    turn.querySelector("textarea").focus();
  };
  show();
  return turn;
}

function editor(content, resend, cancel) {
  const area = el("textarea", { "aria-label": t("editLabel"), value: content, rows: 1 });
  const go = () => area.value.trim() && resend(area.value);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !composing(event)) {
      event.preventDefault();
      go();
    } else if (event.key === "Escape" && !composing(event)) {
      event.stopPropagation();
      cancel();
    }
  });
  return el(
    "div",
    { class: "editor" },
    area,
    el(
      "div",
      { class: "editor-foot" },
      el("span", { class: "muted" }, t("editHint")),
      el("button", { type: "button", class: "plain", on: { click: cancel } }, t("cancel")),
      el("button", { type: "button", class: "primary", on: { click: go } }, t("resend")),
    ),
  );
}

// An answer; while it comes, `update` shows what is new, and `finish` gives it its foot.
export class AnswerTurn {
  constructor(message, regenerate) {
    this.message = message;
    this.regenerate = regenerate;
    this.thoughts = el("div", { class: "thoughts" });
    this.thinking = el("span", {}, t("reasoning"));
    this.fold = el("details", { class: "fold", hidden: true }, el("summary", {}, icon("chevron"), this.thinking), this.thoughts);
    this.prose = el("div", { class: "prose", dir: "auto" });
    this.calls = el("div", { class: "calls" });
    this.pulse = el("div", { class: "pulse", role: "img", "aria-label": t("waiting") }, el("i"), el("i"), el("i"));
    this.foot = el("div", { class: "turn-foot" });
    this.element = el(
      "article",
      { class: "turn turn-answer", "aria-label": t("answer") },
      this.fold, this.prose, this.calls, this.pulse, this.foot,
    );
    this.live = null;
  }

  update() {
    const { content, reasoning, calls } = this.message;
    this.live ??= { prose: new LiveMarkdown(this.prose), thoughts: new LiveMarkdown(this.thoughts) };
    this.element.setAttribute("aria-busy", "true");
    this.pulse.hidden = Boolean(content || calls.length);
    this.thinking.textContent = content || calls.length ? t("reasoning") : t("reasoningNow");
    this.fold.hidden = !reasoning;
    if (reasoning && !content) this.live.thoughts.update(reasoning);
    if (content) this.live.prose.update(content);
    if (calls.length) this.#showCalls();
  }

  finish() {
    const { content, reasoning } = this.message;
    this.element.removeAttribute("aria-busy");
    this.pulse.hidden = true;
    this.fold.hidden = !reasoning;
    this.thinking.textContent = t("reasoning");
    if (this.live) {
      this.live.prose.finish(content);
      this.live.thoughts.finish(reasoning);
    } else {
      this.prose.replaceChildren(render(content));
      this.thoughts.replaceChildren(render(reasoning));
    }
    this.#showCalls();
    this.foot.replaceChildren(this.#actions(), ...this.#notes());
  }

  #showCalls() {
    for (const [at, call] of this.message.calls.entries()) {
      const shown = this.calls.children[at] ?? this.calls.appendChild(folded("", ""));
      shown.querySelector("summary span").textContent = t("calls", { name: call.name });
      shown.querySelector(".detail").textContent = call.arguments;
      shown.querySelector("pre").textContent = pretty(call.arguments);
    }
  }

  #actions() {
    const copy = iconButton("copy", t("copy"), () => copyFrom(copy, this.message.content));
    const raw = iconButton("code", t("raw"), () => {
      const plain = raw.getAttribute("aria-pressed") !== "true";
      raw.setAttribute("aria-pressed", String(plain));
      this.prose.replaceChildren(
        plain ? el("pre", { class: "raw", tabindex: "0" }, this.message.content) : render(this.message.content),
      );
    }, { "aria-pressed": "false" });
    const again = this.regenerate && iconButton("again", t("regenerate"), this.regenerate);
    return el("div", { class: "turn-actions" }, copy, raw, again);
  }

  #notes() {
    const { ending, content, calls } = this.message;
    const names = { stopped: "stopped", cut: "cutOff", length: "tooLong", "": "cutOff" };
    const name = Object.hasOwn(names, ending) ? names[ending] : !content && !calls.length ? "empty" : null;
    const stats = statsText(this.message.stats);
    return [stats && el("p", { class: "stats" }, stats), name && el("p", { class: "note" }, t(name))].filter(Boolean);
  }
}

function statsText(stats) {
  if (!stats) return "";
  const { first, speed, prompt, cached, answer } = stats;
  const parts = [];
  if (answer !== null) parts.push(t("statTokens", { count: formatNumber(answer) }));
  if (speed !== null) parts.push(t("statSpeed", { count: formatNumber(speed, speed < 100 ? 1 : 0) }));
  if (first !== null) parts.push(t("statFirst", { count: formatNumber(first, 2) }));
  if (prompt !== null) {
    parts.push(t(cached ? "statCached" : "statPrompt", { count: formatNumber(prompt), cached: formatNumber(cached ?? 0) }));
  }
  return parts.join(" · ");
}

// A tool's result as it was given.
export function resultTurn(message) {
  const fold = folded(t("result", { name: message.name }), message.content);
  return el("article", { class: "turn turn-result", "aria-label": t("result", { name: message.name }) }, fold);
}

// Where a person types what the called tools answered.
export function resultsForm(calls, send) {
  const fields = calls.map((call) => {
    const area = el("textarea", { rows: 2, spellcheck: "false" });
    return { call, area, label: el("label", {}, title(t("resultLabel", { name: call.name }), call.arguments), area) };
  });
  const submit = (event) => {
    event.preventDefault();
    send(fields.map(({ call, area }) => ({ id: call.id, name: call.name, content: area.value })));
  };
  return el(
    "form",
    { class: "results", on: { submit } },
    ...fields.map(({ label }) => label),
    el("button", { type: "submit", class: "primary" }, t("sendResults")),
  );
}

function folded(name, content) {
  const body = el("pre", { tabindex: "0" }, content);
  const summary = el("summary", {}, icon("chevron"), el("span", {}, name), el("span", { class: "detail" }, content));
  return el("details", { class: "fold" }, summary, body);
}

// Two calls of one tool are told apart by their arguments.
function title(name, detail) {
  return el("span", {}, name, el("span", { class: "detail" }, detail));
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
