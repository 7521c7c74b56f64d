"""One model, ready to answer: text and conversations in, text out. Knows no HTTP, files or terminals."""

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, overload

import torch

from kiloq.chat import (
    ChatFormat,
    Message,
    Recall,
    Tool,
    chat_format_for,
    parse_messages,
    parse_tools,
    render,
    trim_history,
)
from kiloq.checkpoint import bundled, load_model, open_checkpoint, read_adapter
from kiloq.errors import KiloqError, RequestError
from kiloq.quant.linear import is_packed

from .engine import Engine
from .events import Event
from .limits import EngineConfig
from .params import SamplingParams
from .results import Answers, Piece, Result, joined

Conversation = Sequence[Message | Mapping[str, object]]
Tools = Sequence[Tool | Mapping[str, object]]
Prompt = tuple[Sequence[int], SamplingParams]


class LLM:
    """A checkpoint, its tokenizer and formats, and an engine. Without a name, the bundled model.

    `draft` names a smaller model of the same vocabulary, which guesses what this one will say. `adapters` are folders
    of LoRA adapters in PEFT's format by the names that requests use; all share the model.

    One thread at a time; several streams may be read in turns.
    """

    def __init__(  # noqa: PLR0913  # the options of a door, each with a default
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str | None = None,
        kv_dtype: str = "auto",
        max_context: int | None = None,
        kv_memory: int | None = None,
        max_batch: int | None = None,
        seed: int = 0,
        draft: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
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
        self._load = partial(load_model, checkpoint, quantization=quantization)
        self._place = _Place(dtype, torch.device(device))
        self.model = self._load(dtype=dtype, device=device)
        self._draft = None if draft is None else load_model(open_checkpoint(draft), dtype=dtype, device=device)
        self._adapters = {name: read_adapter(folder, self.config) for name, folder in (adapters or {}).items()}
        self.engine = self._new_engine()
        self._readers: dict[str, Callable[[Event], None]] = {}  # who waits for which request

    @cached_property
    def format(self) -> ChatFormat:
        """How conversations are laid out; CheckpointError for a model whose template is not ChatML."""
        return chat_format_for(self.config.family, self.folder)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights stand for; packed ones compute in fp32 whatever theirs."""
        return torch.bfloat16 if is_packed(self.model) else next(self.model.parameters()).dtype

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        adapter: str = "",
    ) -> list[Result]:
        """Continue each prompt, text or ids, as it stands; results in the order of the prompts."""
        listed: Sequence[object] = [prompts] if isinstance(prompts, str) else prompts
        params = params or SamplingParams.for_model(self.generation)
        return self._all([(self._prompt_ids(prompt, i), params) for i, prompt in enumerate(listed)], adapter)

    @overload
    def chat(
        self, messages: Conversation, params: SamplingParams | None = ..., *, tools: Tools = ..., adapter: str = ...
    ) -> Result: ...
    @overload
    def chat(
        self,
        messages: Sequence[Conversation],
        params: SamplingParams | None = ...,
        *,
        tools: Tools = ...,
        adapter: str = ...,
    ) -> list[Result]: ...
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        *,
        tools: Tools = (),
        adapter: str = "",
    ) -> Result | list[Result]:
        """Answer one conversation, or each of several. The text is all that the model wrote, thoughts and calls too."""
        several = bool(messages) and all(isinstance(one, Sequence) and not isinstance(one, str) for one in messages)
        conversations: Sequence[object] = messages if several else [messages]
        results = self._all([self.prompt_of(one, params, tools=tools) for one in conversations], adapter)
        return results if several else results[0]

    def stream(
        self,
        messages: Conversation | str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        tools: Tools = (),
        adapter: str = "",
    ) -> Generator[Piece]:
        """The answer to a conversation, or the continuation of a text or ids, as it is made. Closing it ends it."""
        if isinstance(messages, str) or (messages and isinstance(messages[0], int)):
            params = params or SamplingParams.for_model(self.generation)
            pieces = self._pieces(self._prompt_ids(messages, 0), params, adapter)
        else:
            pieces = self._pieces(*self.prompt_of(messages, params, tools=tools), adapter)
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
        return self.whole_prompt_of(kept, params, tools=known_tools, thinking=thinking)

    def whole_prompt_of(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
        recall: Recall | None = None,
    ) -> Prompt:
        """As `prompt_of`, with every message: one that is too long is the engine's to refuse, with the numbers."""
        rendered = render(messages, self.tokenizer, self.format, tools=tools, thinking=thinking, recall=recall)
        if not params.ignore_eos:  # a base model's own stop ids may not know where a turn ends
            params = dataclasses.replace(params, stop_ids=(*params.stop_ids, self.tokenizer.im_end_id))
        if tools or any(message.role == "tool" for message in messages):
            params = dataclasses.replace(params, stop=(*params.stop, *self.format.tool_stop))
        return rendered.ids, params

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Load the checkpoint again for another device or type. The cache is emptied."""
        if self._readers:
            raise RequestError("an answer is being made; read it to its end or close it before the model moves.")
        before = self._place
        place = _Place(dtype or before.dtype, device or before.device)
        if place == before:
            return
        del self.engine, self.model  # what comes may stand where they are
        torch.cuda.empty_cache()  # the next cache is as large as what the device reports as free allows
        try:
            self.model = self._load(dtype=place.dtype, device=place.device)
            self._place = place
        except KiloqError:
            self.model = self._load(dtype=before.dtype, device=before.device)
            raise
        finally:
            self.engine = self._new_engine()

    def as_completed(self, prompts: Iterable[Prompt], adapter: str = "") -> Iterator[tuple[int, Result | KiloqError]]:
        """Answer many prompts; each one's number and its result, or why it has none, in the order they finish."""
        coming = enumerate(prompts)
        running: dict[str, Answers] = {}
        try:
            while True:
                # Enough to keep the engine busy, and not all of a file that may be long; a refused one takes no place.
                while len(running) < 4 * self.engine.max_batch and (one := next(coming, None)) is not None:
                    number, (prompt_ids, params) = one
                    answers = Answers(number, tuple(prompt_ids), params)
                    try:
                        running[self._open(answers.prompt_ids, params, answers.add, adapter)] = answers
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
        stop_ids = self.generation.stop_ids
        return Engine(
            self.model,
            self._limits,
            tokenizer=self.tokenizer,
            stop_ids=stop_ids,
            draft=self._draft,
            adapters=self._adapters,
        )

    def _prompt_ids(self, prompt: object, number: int) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence):
            ids = [token_id for token_id in prompt if isinstance(token_id, int)]
            if len(ids) == len(prompt):
                return ids
        raise RequestError(f"prompts[{number}] is {prompt!r:.80}; it must be text or a list of token ids.")

    def _all(self, prompts: Sequence[Prompt], adapter: str) -> list[Result]:
        results: list[Result | None] = [None] * len(prompts)
        for number, outcome in self.as_completed(prompts, adapter):
            if isinstance(outcome, KiloqError):
                outcome.args = (f"prompts[{number}]: {outcome}",) if len(prompts) > 1 else outcome.args
                raise outcome
            results[number] = outcome
        return [result for result in results if result is not None]

    def _pieces(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str) -> Generator[Piece]:
        events: deque[Event] = deque()
        request_id = self._open(prompt_ids, params, events.append, adapter)
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
                    yield joined(held.pop(event.index))
        finally:
            self._close(request_id)

    def _open(
        self, prompt_ids: Sequence[int], params: SamplingParams, reader: Callable[[Event], None], adapter: str
    ) -> str:
        request_id = self.engine.add(prompt_ids, params, adapter=adapter)
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


class _Place(NamedTuple):
    """How a checkpoint was asked to be loaded."""

    dtype: str | torch.dtype
    device: torch.device
