// One answer on its way: the request, what has come of it so far, and how it ended. Knows no page.

import { ApiProblem, streamChat } from "./api.js";
import { newAnswer, requestOf } from "./conversation.js";

export class Answering {
  #controller = new AbortController();

  constructor(conversation, model) {
    this.conversation = conversation;
    this.model = model;
    this.message = newAnswer();
  }

  stop() {
    this.#controller.abort();
  }

  // Adds the answer to the conversation as it comes, and tells `changed`. Returns what went wrong, or null.
  async run(changed) {
    const { conversation, message } = this;
    const request = requestOf(conversation, this.model);
    conversation.messages.push(message);
    const clock = new Clock();
    let problem = null;
    try {
      for await (const chunk of streamChat(request, this.#controller.signal)) {
        clock.read(chunk.usage);
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        if (take(message, choice.delta ?? {})) clock.tick();
        message.ending = choice.finish_reason ?? message.ending;
        changed();
      }
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof ApiProblem)) throw error;
      problem = error.name === "AbortError" ? null : error;
      message.ending = problem ? "cut" : "stopped";
    }
    message.stats = clock.stats();
    const silent = !message.content && !message.reasoning && !message.calls.length;
    const at = conversation.messages.indexOf(message);
    if (silent && at >= 0 && (problem || message.ending === "stopped")) conversation.messages.splice(at, 1);
    return problem;
  }
}

// Adds a delta to a message; whether it said anything.
function take(message, delta) {
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  message.content += delta.content ?? "";
  message.reasoning += reasoning;
  for (const piece of delta.tool_calls ?? []) {
    const call = (message.calls[piece.index] ??= { id: "", name: "", arguments: "" });
    call.id ||= piece.id ?? "";
    call.name += piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
  }
  return Boolean(delta.content || reasoning || delta.tool_calls?.length);
}

class Clock {
  #begin = performance.now();
  #first = 0;
  #last = 0;
  #usage = null;

  // Each chunk, also one that shows nothing: the end of a text may be held back for a while.
  read(usage) {
    this.#last = performance.now();
    this.#usage = usage ?? this.#usage;
  }

  tick() {
    this.#first ||= this.#last;
  }

  stats() {
    if (!this.#first) return null;
    const { prompt_tokens: prompt, completion_tokens: answer, prompt_tokens_details: details } = this.#usage ?? {};
    const seconds = (this.#last - this.#first) / 1000;
    return {
      first: (this.#first - this.#begin) / 1000,
      speed: answer > 1 && seconds > 0 ? (answer - 1) / seconds : null,
      prompt: prompt ?? null,
      cached: details?.cached_tokens ?? null,
      answer: answer ?? null,
    };
  }
}
