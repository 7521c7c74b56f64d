// A small menu beside the button that opened it, and notes at the edge of the page. Nothing of conversations.

import { byId, el } from "./dom.js";

// entries: [[name, press, class]]
export function openMenu(button, entries) {
  const items = entries.map(([name, press, kind]) =>
    el("button", { type: "button", role: "menuitem", class: kind, on: { click: () => (menu.hidePopover(), press()) } }, name),
  );
  const menu = el("div", { class: "menu", role: "menu", popover: "auto", "aria-label": button.getAttribute("aria-label") }, ...items);
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
  });
  menu.addEventListener("toggle", (event) => {
    if (event.newState !== "closed") return;
    button.setAttribute("aria-expanded", "false");
    if (menu.contains(document.activeElement) || document.activeElement === document.body) button.focus();
    menu.remove();
  });
  button.after(menu);
  menu.showPopover();
  const beside = button.getBoundingClientRect();
  menu.style.top = `${Math.min(beside.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
  menu.style.left = `${Math.max(8, Math.min(beside.left, innerWidth - menu.offsetWidth - 8))}px`;
  button.setAttribute("aria-expanded", "true");
  items[0].focus();
}

const STAYS = 9000; // milliseconds

// action: [name, press]
export function toast(text, action) {
  const note = el("div", { class: "toast" }, el("span", {}, text));
  const close = () => note.remove();
  if (action) {
    const [name, press] = action;
    note.append(el("button", { type: "button", class: "plain", on: { click: () => (close(), press()) } }, name));
  }
  const rests = () => !note.matches(":hover, :focus-within");
  const later = () => setTimeout(() => (rests() ? close() : later()), STAYS);
  byId("toasts").replaceChildren(note);
  later();
}
