// All conversations and what can be done with them. Tells its listeners what changed; knows no elements.
//
// Events: "list" (names, order), "turns" (the open conversation; detail.from is the first turn that changed), "answer"
// (its answer grew), "end" (detail.answering), "key" (the server wants one), "trouble" (detail is a text's name).

import { Answering } from "./answering.js";
import { importText, newConversation, openCalls } from "./conversation.js";
import { preference } from "./store.js";

const SAVE_EVERY = 3000; // milliseconds, while an answer comes
const MAX_RETRIES = 5;
const channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("kiloq") : null;

export class Chat extends EventTarget {
  conversations = new Map();
  models = [];
  current = null;
  #answers = new Map(); // conversation id -> Answering
  #problems = new Map(); // conversation id -> ApiProblem
  #retries = new Map();
  #saves = new Map();

  constructor(store) {
    super();
    this.store = store;
    channel?.addEventListener("message", ({ data }) => this.#changedElsewhere(data));
  }

  async load(openId) {
    for (const conversation of await this.store.all()) this.conversations.set(conversation.id, conversation);
    this.current = this.conversations.get(openId) ?? newConversation(preference("defaults", {}));
    if (!this.store.lasting) this.#tell("trouble", "notKept");
  }

  get sorted() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }
  get answering() {
    return this.#answers.get(this.current.id) ?? null;
  }
  get problem() {
    return this.#problems.get(this.current.id) ?? null;
  }
  get retries() {
    return this.#retries.get(this.current.id) ?? 0;
  }
  get mayRetryAlone() {
    return this.retries < MAX_RETRIES;
  }
  get model() {
    const { model } = this.current.settings;
    return this.models.includes(model) ? model : (this.models[0] ?? model ?? "");
  }

  open(id) {
    this.current = this.conversations.get(id) ?? newConversation(preference("defaults", {}));
    this.#tell("list");
    this.#tell("turns", { from: 0 });
  }

  send(text) {
    this.current.messages.push({ role: "user", content: text });
    this.#answer(this.current.messages.length - 1);
  }

  // Another text for a user's turn; everything after it goes.
  edit(index, text) {
    this.answering?.stop();
    this.current.messages.splice(index, Infinity, { role: "user", content: text });
    this.#answer(index);
  }

  // Everything since the question of an answer is asked for once more.
  regenerate(index) {
    this.answering?.stop();
    const { messages } = this.current;
    const from = messages.findLastIndex((message, at) => at < index && message.role === "user") + 1;
    messages.splice(from);
    this.#answer(from);
  }

  sendResults(results) {
    const from = this.current.messages.length;
    for (const { id, name, content } of results) {
      this.current.messages.push({ role: "tool", tool_call_id: id, name, content });
    }
    this.#answer(from);
  }

  // After a problem: what has come of the answer is dropped, and it is asked for again.
  retry({ alone = false } = {}) {
    const { id, messages } = this.current;
    const tries = alone ? this.retries + 1 : 0;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    this.#answer(messages.length);
    this.#retries.set(id, tries);
  }

  stop() {
    this.answering?.stop();
  }

  get waitsForResults() {
    return !this.answering && openCalls(this.current).length > 0;
  }

  rename(id, title) {
    const conversation = this.conversations.get(id);
    conversation.title = title.trim();
    conversation.named = conversation.title !== "";
    this.save(conversation);
    this.#tell("list");
  }

  remove(id) {
    const conversation = this.conversations.get(id);
    this.#answers.get(id)?.stop();
    this.conversations.delete(id);
    this.#attempt(this.store.remove(id), id);
    if (this.current.id === id) this.open(null);
    else this.#tell("list");
    return conversation;
  }

  restore(conversation) {
    this.conversations.set(conversation.id, conversation);
    this.save(conversation);
    this.#tell("list");
  }

  // How many conversations a file brought; null: it is none of ours. Known ones get a copy, nothing is overwritten.
  import(text) {
    const read = importText(text);
    for (const conversation of read ?? []) {
      if (this.conversations.has(conversation.id)) conversation.id = newConversation().id;
      this.conversations.set(conversation.id, conversation);
      this.save(conversation);
    }
    if (read) this.#tell("list");
    return read && read.length;
  }

  changeSettings(changes) {
    const { settings } = this.current;
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === "") delete settings[name];
      else settings[name] = value;
    }
    if (this.conversations.has(this.current.id)) this.save(this.current);
  }

  async #answer(from) {
    const conversation = this.current;
    const { id } = conversation;
    conversation.updated = Date.now();
    this.conversations.set(id, conversation);
    this.#problems.delete(id);
    this.#retries.delete(id);
    const answering = new Answering(conversation, this.model);
    this.#answers.set(id, answering);
    this.save(conversation);
    const running = answering.run(() => {
      this.#saveSoon(conversation);
      if (this.answering === answering) this.#tell("answer");
    });
    this.#tell("list");
    this.#tell("turns", { from });
    const problem = await running;
    this.save(conversation);
    if (this.#answers.get(id) !== answering) return; // another has begun since
    this.#answers.delete(id);
    if (problem) this.#problems.set(id, problem);
    if (this.current !== conversation) return;
    this.#tell("end", { answering });
    if (problem?.status === 401) this.#tell("key");
  }

  #saveSoon(conversation) {
    if (this.#saves.has(conversation.id)) return;
    this.#saves.set(conversation.id, setTimeout(() => this.save(conversation), SAVE_EVERY));
  }

  save(conversation) {
    clearTimeout(this.#saves.get(conversation.id));
    this.#saves.delete(conversation.id);
    if (!this.conversations.has(conversation.id)) return;
    this.#attempt(this.store.put(conversation), conversation.id);
  }

  // When the page goes: what has come so far.
  saveRunning() {
    for (const { conversation } of this.#answers.values()) this.save(conversation);
  }

  async #attempt(writing, id) {
    try {
      await writing;
      channel?.postMessage(id);
    } catch {
      this.#tell("trouble", "full");
    }
  }

  async #changedElsewhere(id) {
    if (this.#answers.has(id)) return;
    const stored = await this.store.get(id);
    if (stored) this.conversations.set(id, stored);
    else this.conversations.delete(id);
    if (stored && this.current.id === id) {
      this.current = stored;
      this.#tell("turns", { from: 0 });
    }
    this.#tell("list");
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
