// What a conversation is: how one begins, what the model is sent of it, and how one is read from a file.
//
// {id, title, named, created, updated, settings, messages}; a message is one of
// {role: "user", content}, {role: "tool", tool_call_id, name, content} and
// {role: "assistant", content, reasoning, calls: [{id, name, arguments}], ending, stats}.

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "seed"];
const TEXTS = ["model", "system", "tools", "thinking"];
const TITLE_LENGTH = 60;
export const FILE_FORMAT = "kiloq-conversations";

// Not crypto.randomUUID: browsers hide it from pages that come over plain http from another machine.
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(settings = {}) {
  const now = Date.now();
  return { id: newId(), title: "", named: false, created: now, updated: now, settings: { ...settings }, messages: [] };
}

export function newAnswer() {
  return { role: "assistant", content: "", reasoning: "", calls: [], ending: "", stats: null };
}

// The first line of the first question, until a person gives a name.
export function titleOf(conversation) {
  if (conversation.named && conversation.title) return conversation.title;
  const first = conversation.messages.find((message) => message.role === "user")?.content.trim() ?? "";
  const line = Array.from(first.split(/\s*\n/)[0]);
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).join("")}…` : line.join("");
}

// The calls of the last answer that have no result yet.
export function openCalls(conversation) {
  const { messages } = conversation;
  const at = messages.findLastIndex((message) => message.role === "assistant");
  if (at < 0 || messages.slice(at + 1).some((message) => message.role === "user")) return [];
  const given = new Set(messages.slice(at + 1).map((message) => message.tool_call_id));
  return messages[at].calls.filter((call) => !given.has(call.id));
}

// The request for the next answer. History is the raw text of every turn; thoughts are not sent again.
export function requestOf(conversation, model) {
  const { settings, messages } = conversation;
  const request = { model, messages: messages.map(wireMessage), stream: true, stream_options: { include_usage: true } };
  if (settings.system) request.messages.unshift({ role: "system", content: settings.system });
  for (const name of NUMBERS) if (Number.isFinite(settings[name])) request[name] = settings[name];
  if (settings.thinking) request.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  const tools = usableTools(settings.tools);
  if (tools.length) request.tools = tools;
  return request;
}

function usableTools(written) {
  try {
    return parseTools(written);
  } catch {
    return []; // the settings say so
  }
}

function wireMessage(message) {
  if (message.role === "user") return { role: "user", content: message.content };
  if (message.role === "tool") {
    return { role: "tool", tool_call_id: message.tool_call_id, name: message.name, content: message.content };
  }
  const wire = { role: "assistant", content: message.content };
  if (message.calls.length) {
    wire.tool_calls = message.calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  }
  return wire;
}

// Tools as a person writes them: OpenAI's list, one of its entries, or bare functions. Throws a SyntaxError.
export function parseTools(text) {
  if (!text?.trim()) return [];
  const value = JSON.parse(text);
  return (Array.isArray(value) ? value : [value]).map((tool) => {
    const outer = tool?.function ? tool : { type: "function", function: tool };
    if (typeof outer.function?.name !== "string" || !outer.function.name) throw new SyntaxError("name");
    return outer;
  });
}

export function exportText(conversations) {
  return JSON.stringify({ format: FILE_FORMAT, version: 1, conversations }, null, 2);
}

// What a file holds, or null: files come from anywhere, so that only what we know, of the type we know, gets in.
export function importText(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    return null;
  }
  if (file?.format !== FILE_FORMAT || !Array.isArray(file.conversations)) return null;
  return file.conversations.map(readConversation).filter(Boolean);
}

function readConversation(raw) {
  if (typeof raw !== "object" || raw === null || !Array.isArray(raw.messages)) return null;
  const clean = newConversation(readSettings(raw.settings));
  if (/^[\w-]{1,64}$/.test(text(raw.id))) clean.id = raw.id;
  clean.title = text(raw.title);
  clean.named = raw.named === true;
  clean.created = number(raw.created) ?? clean.created;
  clean.updated = number(raw.updated) ?? clean.updated;
  clean.messages = raw.messages.map(readMessage).filter(Boolean);
  return clean;
}

export function readSettings(raw) {
  const settings = {};
  for (const name of NUMBERS) if (number(raw?.[name]) !== null) settings[name] = raw[name];
  for (const name of TEXTS) if (text(raw?.[name])) settings[name] = raw[name];
  return settings;
}

function readMessage(raw) {
  const content = text(raw?.content);
  if (raw?.role === "user") return { role: "user", content };
  if (raw?.role === "tool") {
    return { role: "tool", tool_call_id: text(raw.tool_call_id), name: text(raw.name), content };
  }
  if (raw?.role !== "assistant") return null;
  const calls = (Array.isArray(raw.calls) ? raw.calls : []).map((call) => ({
    id: text(call?.id),
    name: text(call?.name),
    arguments: text(call?.arguments),
  }));
  return { ...newAnswer(), content, reasoning: text(raw.reasoning), calls, ending: text(raw.ending), stats: readStats(raw.stats) };
}

function readStats(raw) {
  if (typeof raw !== "object" || raw === null) return null;
  const names = ["first", "speed", "prompt", "cached", "answer"];
  return Object.fromEntries(names.map((name) => [name, number(raw[name])]));
}

const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
