"""One model, ready to answer: text and conversations in, text out. Knows no HTTP, files or terminals."""

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import torch

from kiloq.chat import ChatFormat, Message, Tool, chat_format_for, parse_messages, parse_tools, render, trim_history
from kiloq.checkpoint import bundled, load_model, open_checkpoint
from kiloq.errors import KiloqError, RequestError

from .engine import Engine, EngineConfig
from .events import Event, FinishReason, Usage
from .params import SamplingParams
from .sampler import Sampled

Conversation = Sequence[Message | Mapping[str, object]]
Tools = Sequence[Tool | Mapping[str, object]]
Prompt = tuple[Sequence[int], SamplingParams]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One answer. `token_ids` and `text` are without the token or string that ended it; `stop_id` names the token."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_id: int | None
    logprobs: tuple[Sampled, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """All answers to one prompt."""

    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first answer."""
        return self.choices[0].text


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next part of answer `index`; the last one of an answer has its reason, the last of all has the usage."""

    text: str
    token_ids: tuple[int, ...]
    index: int
    logprobs: tuple[Sampled, ...] = ()
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    usage: Usage | None = None


class LLM:
    """A checkpoint, its tokenizer and formats, and an engine. Without a name, the bundled model.

    One thread at a time; several streams may be read in turns.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        kv_dtype: str = "auto",
        max_context: int | None = None,
        kv_memory: int | None = None,
        max_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        checkpoint = open_checkpoint(bundled() if model is None else model)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._limits = EngineConfig(
            max_context=max_context, max_batch=max_batch, kv_dtype=kv_dtype, kv_memory=kv_memory, seed=seed
        )
        self.folder = checkpoint.folder
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.generation = checkpoint.generation
        self.model = load_model(checkpoint, dtype=dtype, device=device)
        self.engine = self._new_engine()
        self._readers: dict[str, Callable[[Event], None]] = {}  # who waits for which request

    @cached_property
    def format(self) -> ChatFormat:
        """How conversations are laid out; CheckpointError for a model whose template is not ChatML."""
        return chat_format_for(self.config.family, self.folder)

    def generate(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]], params: SamplingParams | None = None
    ) -> list[Result]:
        """Continue each prompt, text or ids, as it stands; results in the order of the prompts."""
        listed: Sequence[object] = [prompts] if isinstance(prompts, str) else prompts
        params = params or SamplingParams.for_model(self.generation)
        return self._all([(self._prompt_ids(prompt, i), params) for i, prompt in enumerate(listed)])

    @overload
    def chat(self, messages: Conversation, params: SamplingParams | None = ..., *, tools: Tools = ...) -> Result: ...
    @overload
    def chat(
        self, messages: Sequence[Conversation], params: SamplingParams | None = ..., *, tools: Tools = ...
    ) -> list[Result]: ...
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        *,
        tools: Tools = (),
    ) -> Result | list[Result]:
        """Answer one conversation, or each of several. The text is all that the model wrote, thoughts and calls too."""
        several = bool(messages) and all(isinstance(one, Sequence) and not isinstance(one, str) for one in messages)
        conversations: Sequence[object] = messages if several else [messages]
        results = self._all([self.prompt_of(one, params, tools=tools) for one in conversations])
        return results if several else results[0]

    def stream(
        self, messages: Conversation | str | Sequence[int], params: SamplingParams | None = None, *, tools: Tools = ()
    ) -> Generator[Piece]:
        """The answer to a conversation, or the continuation of a text or ids, as it is made. Closing it ends it."""
        if isinstance(messages, str) or (messages and isinstance(messages[0], int)):
            params = params or SamplingParams.for_model(self.generation)
            pieces = self._pieces(self._prompt_ids(messages, 0), params)
        else:
            pieces = self._pieces(*self.prompt_of(messages, params, tools=tools))
        next(pieces)  # queue it now: a mistake shows here, and closing what has not begun would free nothing
        return pieces

    def prompt_of(
        self,
        messages: object,
        params: SamplingParams | None = None,
        *,
        tools: object = (),
        thinking: bool | None = None,
        window: int | None = None,  # the prompt is shorter; the model's own by default
    ) -> Prompt:
        """Ids of a conversation, less its oldest rounds if it is too long, and parameters that end where turns do."""
        params = params or SamplingParams.for_model(self.generation)
        parsed, known_tools = parse_messages(messages), parse_tools(tools)
        room = params.max_tokens or self.engine.max_context // 4
        window = self.generation.max_window if window is None else window
        window = min(window, self.engine.max_context - room + 1)
        kept = trim_history(parsed, self.tokenizer, self.format, window, tools=known_tools, thinking=thinking)
        rendered = render(kept, self.tokenizer, self.format, tools=known_tools, thinking=thinking)
        if not params.ignore_eos:  # a base model's own stop ids may not know where a turn ends
            params = dataclasses.replace(params, stop_ids=(*params.stop_ids, self.tokenizer.im_end_id))
        if known_tools:
            params = dataclasses.replace(params, stop=(*params.stop, *self.format.tool_stop))
        return rendered.ids, params

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Move or convert the model in place. Its cache is emptied."""
        if self._readers:
            raise RequestError("an answer is being made; read it to its end or close it before the model moves.")
        self.model.to(device=device, dtype=dtype)
        del self.engine  # its cache may stand where the next one will
        torch.cuda.empty_cache()  # the next one is as large as what the device reports as free allows
        self.engine = self._new_engine()

    def as_completed(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Result | KiloqError]]:
        """Answer many prompts; each one's number and its result, or why it has none, in the order they finish."""
        coming = enumerate(prompts)
        running: dict[str, _Answers] = {}
        try:
            while True:
                # Enough to keep the engine busy, and not all of a file that may be long; a refused one takes no place.
                while len(running) < 4 * self.engine.max_batch and (one := next(coming, None)) is not None:
                    number, (prompt_ids, params) = one
                    answers = _Answers(number, tuple(prompt_ids), params)
                    try:
                        running[self._open(answers.prompt_ids, params, answers.add)] = answers
                    except RequestError as error:
                        yield number, error
                if not running:
                    return
                if all(answers.outcome is None for answers in running.values()):  # `prompts` may have used the engine
                    self._step()
                for request_id, answers in list(running.items()):
                    if answers.outcome is not None:
                        self._close(request_id)
                        del running[request_id]
                        yield answers.number, answers.outcome
        finally:
            for request_id in running:
                self._close(request_id)

    def _new_engine(self) -> Engine:
        return Engine(self.model, self._limits, tokenizer=self.tokenizer, stop_ids=self.generation.stop_ids)

    def _prompt_ids(self, prompt: object, number: int) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence):
            ids = [token_id for token_id in prompt if isinstance(token_id, int)]
            if len(ids) == len(prompt):
                return ids
        raise RequestError(f"prompts[{number}] is {prompt!r:.80}; it must be text or a list of token ids.")

    def _all(self, prompts: Sequence[Prompt]) -> list[Result]:
        results: list[Result | None] = [None] * len(prompts)
        for number, outcome in self.as_completed(prompts):
            if isinstance(outcome, KiloqError):
                raise type(outcome)(f"prompts[{number}]: {outcome}") if len(prompts) > 1 else outcome
            results[number] = outcome
        return [result for result in results if result is not None]

    def _pieces(self, prompt_ids: Sequence[int], params: SamplingParams) -> Generator[Piece]:
        events: deque[Event] = deque()
        request_id = self._open(prompt_ids, params, events.append)
        held: dict[int, list[Event]] = {}  # by answer: what has shown no text yet
        usage = None
        try:
            yield Piece(text="", token_ids=(), index=0)  # taken by `stream`
            while usage is None:
                while not events:
                    self._step()
                event = events.popleft()
                if event.error is not None:
                    raise event.error
                usage = event.usage
                waiting = held.setdefault(event.index, [])
                waiting.append(event)
                if event.text or event.finish_reason:
                    yield _piece(held.pop(event.index))
        finally:
            self._close(request_id)

    def _open(self, prompt_ids: Sequence[int], params: SamplingParams, reader: Callable[[Event], None]) -> str:
        request_id = self.engine.add(prompt_ids, params)
        self._readers[request_id] = reader
        return request_id

    def _close(self, request_id: str) -> None:
        del self._readers[request_id]
        self.engine.cancel(request_id)

    def _step(self) -> None:
        # Events go to whoever steps the engine: without this, a reader whose last one went elsewhere waits for ever.
        assert self.engine.has_work, "an answer is awaited, but the engine has none: its events were taken elsewhere"
        for event in self.engine.step():
            reader = self._readers.get(event.request_id)
            if reader is not None:  # nobody listens to what was closed
                reader(event)


class _Answers:
    """The events of one request, until it has its outcome."""

    def __init__(self, number: int, prompt_ids: tuple[int, ...], params: SamplingParams) -> None:
        self.number = number
        self.prompt_ids = prompt_ids
        self.outcome: Result | KiloqError | None = None
        self._with_logprobs = params.logprobs is not None
        self._events: list[list[Event]] = [[] for _ in range(params.n)]

    def add(self, event: Event) -> None:
        self._events[event.index].append(event)
        if event.error is not None:
            self.outcome = event.error
        elif event.usage is not None:
            choices = tuple(self._choice(_piece(events)) for events in self._events)
            self.outcome = Result(prompt_ids=self.prompt_ids, choices=choices, usage=event.usage)

    def _choice(self, whole: Piece) -> Choice:
        assert whole.finish_reason is not None
        return Choice(
            text=whole.text,
            token_ids=whole.token_ids,
            finish_reason=whole.finish_reason,
            stop_id=whole.stop_id,
            logprobs=whole.logprobs if self._with_logprobs else None,
        )


def _piece(events: Sequence[Event]) -> Piece:
    """Consecutive events of one answer as one."""
    last = events[-1]
    return Piece(
        text="".join(event.text for event in events),
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        index=last.index,
        logprobs=tuple(one for event in events for one in event.logprobs),
        finish_reason=last.finish_reason,
        stop_id=last.stop_id,
        usage=last.usage,
    )
