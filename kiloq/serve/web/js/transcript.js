// The open conversation: its turns, the answer that is coming, and what stands in the way.

import { openCalls } from "./conversation.js";
import { byId, el } from "./dom.js";
import { t } from "./i18n.js";
import { StickyScroll } from "./scroll.js";
import { AnswerTurn, resultTurn, resultsForm, userTurn } from "./turns.js";

const SPOKEN = 1500; // characters of a finished answer that a screen reader is given at once

export class Transcript {
  #turns = []; // one for each message
  #live = null;
  #countdown = 0;

  constructor(chat) {
    this.chat = chat;
    this.root = byId("turns");
    this.scroll = new StickyScroll(byId("transcript"), this.root, byId("to-latest"));
    this.after = el("div", { class: "after" });
    chat.addEventListener("turns", ({ detail }) => this.#show(detail.from));
    chat.addEventListener("answer", () => this.#live?.update());
    chat.addEventListener("end", ({ detail }) => this.#end(detail.answering));
  }

  // All of it, as after a change of language.
  show() {
    this.#show(0);
  }

  editLast() {
    this.#turns.findLast((turn) => turn.element.edit)?.element.edit();
  }

  #show(from) {
    const { messages } = this.chat.current;
    for (const turn of this.#turns.splice(from)) turn.element.remove();
    for (let index = from; index < messages.length; index++) this.#turns.push(this.#turn(messages[index], index));
    const elements = this.#turns.slice(from).map((turn) => turn.element);
    if (from === 0) this.root.replaceChildren(...elements, this.after);
    else this.after.before(...elements);
    if (!messages.length) this.root.prepend(greeting());
    else this.root.querySelector(".greeting")?.remove();
    this.#showAfter();
    this.scroll.toEnd();
  }

  #turn(message, index) {
    if (message.role === "user") return { element: userTurn(message, (text) => this.chat.edit(index, text)) };
    if (message.role === "tool") return { element: resultTurn(message) };
    const turn = new AnswerTurn(message, () => this.chat.regenerate(index));
    const running = this.chat.answering?.message === message;
    if (running) {
      this.#live = turn;
      turn.update();
    } else turn.finish();
    return turn;
  }

  #end(answering) {
    const live = this.#live;
    this.#live = null;
    if (live && this.chat.current.messages.includes(live.message)) live.finish();
    else if (live) {
      this.#turns = this.#turns.filter((turn) => turn !== live);
      live.element.remove();
    }
    this.#showAfter();
    announce(answering.message.content.slice(0, SPOKEN) || answering.message.calls.map((call) => t("calls", call)).join());
  }

  // Below the last turn: a problem with its way out, or the results that the model waits for.
  #showAfter() {
    clearInterval(this.#countdown);
    const { chat } = this;
    const last = chat.current.messages.at(-1);
    if (chat.answering) this.after.replaceChildren();
    else if (chat.problem) this.after.replaceChildren(this.#problem(chat.problem));
    else if (chat.waitsForResults) {
      this.after.replaceChildren(resultsForm(openCalls(chat.current), (results) => chat.sendResults(results)));
    } else if (last && last.role !== "assistant") this.after.replaceChildren(this.#retryLine(t("unanswered")));
    else this.after.replaceChildren();
  }

  #problem(problem) {
    const line = this.#retryLine(problemText(problem), "alert");
    if (problem.retryAfter !== null && this.chat.mayRetryAlone) this.#waitAndRetry(line, problem.retryAfter);
    return line;
  }

  #retryLine(text, role) {
    const retry = el("button", { type: "button", class: "plain", on: { click: () => this.chat.retry() } }, t("retry"));
    return el("div", { class: "problem", role }, el("p", {}, text), retry);
  }

  // The server said when to come back: that is waited for, in sight.
  #waitAndRetry(line, seconds) {
    const waits = el("p", { class: "muted", "aria-hidden": "true" });
    line.querySelector("p").after(waits);
    const due = performance.now() + 1000 * Math.max(seconds, 1);
    const tick = () => {
      const left = Math.max(0, Math.ceil((due - performance.now()) / 1000));
      waits.textContent = t("retryIn", { count: left });
      if (left > 0 || this.root.querySelector(".editor")) return; // nobody's half-written text is taken away
      clearInterval(this.#countdown);
      this.chat.retry({ alone: true });
    };
    this.#countdown = setInterval(tick, 250);
    tick();
  }
}

export function problemText(problem) {
  if (problem.status === 0) return t("offline");
  if (problem.status === 503) return `${t("busy")} ${problem.message}`;
  return t(problem.status >= 500 ? "failed" : "problem", { message: problem.message });
}

export function announce(text) {
  byId("announcer").textContent = text;
}

function greeting() {
  return el("div", { class: "greeting" }, el("h2", {}, t("greeting")), el("p", {}, t("privacy")));
}
