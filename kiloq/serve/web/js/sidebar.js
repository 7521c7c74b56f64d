// The list of conversations, and what can be done with each of them as a whole.

import { exportText, titleOf } from "./conversation.js";
import { byId, el, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { openMenu, toast } from "./menu.js";
import { preference, setPreference } from "./store.js";

const DAY = 86_400_000;
const narrow = matchMedia("(max-width: 52rem)");

export class Sidebar {
  #closed = preference("sidebarClosed", false);
  #drawn = false; // over the page, on a narrow one

  constructor(chat, { opened }) {
    this.chat = chat;
    this.opened = opened;
    this.root = byId("sidebar");
    chat.addEventListener("list", () => this.show());
    byId("new-chat").addEventListener("click", () => this.#open(null));
    byId("open-sidebar").addEventListener("click", () => this.#toggle(true));
    byId("close-sidebar").addEventListener("click", () => this.#toggle(false));
    byId("scrim").addEventListener("click", () => this.#toggle(false));
    byId("export-all").addEventListener("click", () => download("kiloq-conversations", chat.sorted));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this.#import(event.target));
    this.root.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.#drawn) this.#toggle(false);
    });
    narrow.addEventListener("change", () => this.#place());
    this.#place();
  }

  show() {
    byId("title").textContent = titleOf(this.chat.current) || t("untitled");
    document.title = titleOf(this.chat.current) || "kiloq";
    const lists = [];
    let group = "";
    for (const conversation of this.chat.sorted) {
      const age = new Date().setHours(0, 0, 0, 0) - conversation.updated;
      const name = t(age <= 0 ? "today" : age < 6 * DAY ? "week" : "older");
      if (name !== group) lists.push(el("h2", {}, name), el("ul", { "aria-label": name }));
      group = name;
      lists.at(-1).append(this.#row(conversation));
    }
    byId("chat-list").replaceChildren(...(lists.length ? lists : [el("p", { class: "muted" }, t("noChats"))]));
  }

  #row(conversation) {
    const title = titleOf(conversation) || t("untitled");
    const isCurrent = conversation === this.chat.current;
    const open = el(
      "button",
      { type: "button", class: "row-open", "aria-current": isCurrent && "page", on: { click: () => this.#open(conversation.id) } },
      el("span", { dir: "auto" }, title),
    );
    const more = iconButton("more", t("actionsFor", { title }), () => this.#menu(more, row, conversation), {
      class: "row-more",
      "aria-haspopup": "menu",
      "aria-expanded": "false",
    });
    const row = el("li", { class: "row" }, open, more);
    return row;
  }

  #menu(button, row, conversation) {
    openMenu(button, [
      [t("rename"), () => this.#rename(row, conversation)],
      [t("exportOne"), () => download(titleOf(conversation) || "kiloq", [conversation])],
      [t("remove"), () => this.#remove(conversation), "danger"],
    ]);
  }

  #rename(row, conversation) {
    const field = el("input", { type: "text", "aria-label": t("renameLabel"), value: titleOf(conversation), maxlength: 200 });
    let open = true;
    const close = (keep) => {
      if (!open) return;
      open = false;
      if (keep) this.chat.rename(conversation.id, field.value);
      else this.show();
      byId("chat-list").querySelector("[aria-current]")?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.stopPropagation();
      close(event.key === "Enter");
    });
    field.addEventListener("blur", () => close(true));
    row.replaceChildren(field);
    field.select();
    field.focus();
  }

  #remove(conversation) {
    const title = titleOf(conversation) || t("untitled");
    this.chat.remove(conversation.id);
    byId("new-chat").focus();
    toast(t("removed", { title }), [t("undo"), () => this.chat.restore(conversation)]);
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    const count = file ? this.chat.import(await file.text()) : null;
    if (file) toast(count === null ? t("importBad") : t("imported", { count }));
  }

  #open(id) {
    if (narrow.matches) this.#toggle(false);
    this.chat.open(id);
    this.opened();
  }

  #toggle(shown) {
    document.documentElement.classList.add("moving"); // from now on: a page that opens does not move
    if (narrow.matches) this.#drawn = shown;
    else {
      this.#closed = !shown;
      setPreference("sidebarClosed", this.#closed);
    }
    this.#place();
    byId(shown ? "close-sidebar" : "open-sidebar").focus();
  }

  #place() {
    if (!narrow.matches) this.#drawn = false;
    const shown = narrow.matches ? this.#drawn : !this.#closed;
    document.documentElement.classList.toggle("sidebar-closed", this.#closed);
    document.documentElement.classList.toggle("sidebar-drawn", this.#drawn);
    this.root.inert = !shown;
    document.querySelector("main").inert = this.#drawn;
    byId("open-sidebar").hidden = shown && !narrow.matches;
    byId("open-sidebar").setAttribute("aria-expanded", String(shown));
  }
}

function download(name, conversations) {
  const url = URL.createObjectURL(new Blob([exportText(conversations)], { type: "application/json" }));
  const link = el("a", { href: url, download: `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
