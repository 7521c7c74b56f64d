// The field where messages are written, and the button that is either send or stop.

import { byId } from "./dom.js";
import { composing } from "./turns.js";

export class Composer {
  constructor(chat, { editLast }) {
    this.chat = chat;
    this.area = byId("composer-text");
    this.sendButton = byId("send");
    this.stopButton = byId("stop");
    this.area.addEventListener("keydown", (event) => this.#key(event, editLast));
    this.area.addEventListener("input", () => this.#show());
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.stopButton.addEventListener("click", () => chat.stop());
    for (const type of ["turns", "end"]) chat.addEventListener(type, () => this.#show());
    this.#show();
  }

  focus() {
    this.area.focus();
  }

  // Where a keyboard would jump up at once, the person decides.
  focusGently() {
    if (matchMedia("(pointer: fine)").matches) this.focus();
  }

  #key(event, editLast) {
    if (composing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && !this.area.value) {
      event.preventDefault();
      editLast();
    }
  }

  #send() {
    const text = this.area.value;
    if (!text.trim() || this.chat.answering) return;
    this.area.value = "";
    this.chat.send(text);
    this.focusGently();
  }

  #show() {
    const running = Boolean(this.chat.answering);
    const stopFocused = document.activeElement === this.stopButton;
    this.stopButton.hidden = !running;
    this.sendButton.hidden = running;
    this.sendButton.disabled = !this.area.value.trim();
    if (stopFocused && !running) this.focus();
  }
}
