// The server's API: which models there are, and an answer as a stream of events. Knows nothing of the page.

import { setTabValue, tabValue } from "./store.js";

const BASE = new URL("v1/", document.baseURI);

// What the server, or the lack of one, says: `status` 0 means that no answer came at all.
export class ApiProblem extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// The key lives as long as the tab does, and in nothing that lasts.
export function setKey(key) {
  setTabValue("key", key);
}

function authorization() {
  const key = tabValue("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers: { ...authorization(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiProblem(0, "");
  }
  if (response.ok) return response;
  const text = await response.text().catch(() => "");
  throw new ApiProblem(response.status, messageOf(text) || response.statusText, seconds(response));
}

function messageOf(text) {
  try {
    return String(JSON.parse(text).error.message);
  } catch {
    return text.slice(0, 300);
  }
}

function seconds(response) {
  const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return Number.isFinite(wait) && wait >= 0 ? Math.min(wait, 600) : null;
}

export async function listModels() {
  const response = await call("models", {});
  const { data } = await response.json();
  return data.map((model) => String(model.id));
}

// Yields the chunks of one answer; the signal ends it, here and on the server.
export async function* streamChat(request, signal) {
  const response = await call("chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiProblem(Number(chunk.error.code) || 500, String(chunk.error.message));
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiProblem) throw error;
    throw new ApiProblem(0, "");
  }
  throw new ApiProblem(0, ""); // it ended without [DONE]: cut off
}

// The `data` of each server-sent event. Lines may end in \n, \r\n or \r, and be cut anywhere by the network.
export async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      // A last \r may be half of \r\n: it waits for what comes next.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
