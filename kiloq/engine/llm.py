"""One model, ready to answer: text and conversations in, text out. Knows no HTTP, files or terminals."""

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
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
from kiloq.checkpoint.merge import with_adapter
from kiloq.errors import KiloqError, RequestError
from kiloq.quant.linear import is_packed

from .engine import Engine
from .limits import EngineConfig
from .params import SamplingParams
from .readers import Prompt, Readers
from .results import Piece, Result
from .sampler import Sampled
from .score import embed_parts, finished, score_parts

Conversation = Sequence[Message | Mapping[str, object]]
Tools = Sequence[Tool | Mapping[str, object]]


class LLM:
    """A checkpoint, its tokenizer and formats, and an engine. Without a name, the bundled model.

    `draft` names a smaller model of the same vocabulary, which guesses what this one will say. `adapters` are folders
    of LoRA adapters in PEFT's format by the names that requests use; all share the model. `merged` is one that is put
    into the weights while they are read, for all requests; a quantised model becomes one of 16 bits by that.
    `short_steps` cuts prompts so that a step takes about half a second on two cores: a large model reads them up to a
    fifth slower, but answers that run go on meanwhile, and end soon when they are cancelled.

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
        short_steps: bool = False,
        seed: int = 0,
        draft: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        merged: str | Path | None = None,
    ) -> None:
        checkpoint = open_checkpoint(bundled() if model is None else model)
        if merged is not None:
            checkpoint = with_adapter(checkpoint, merged)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._limits = EngineConfig(
            max_context=max_context,
            max_batch=max_batch,
            short_steps=short_steps,
            kv_dtype=kv_dtype,
            kv_memory=kv_memory,
            seed=seed,
        )
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.generation = checkpoint.generation
        self._load = partial(load_model, checkpoint, quantization=quantization)
        self._place = _Place(dtype, torch.device(device))
        self.model = self._load(dtype=dtype, device=device)
        self._draft = None if draft is None else load_model(open_checkpoint(draft), dtype=dtype, device=device)
        self._adapters = {name: read_adapter(folder, self.config) for name, folder in (adapters or {}).items()}
        self._readers = Readers(self._new_engine())

    @property
    def engine(self) -> Engine:
        """What answers; whoever steps it takes its events."""
        return self._readers.engine

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
            pieces = self._readers.pieces(self._prompt_ids(messages, 0), params, adapter)
        else:
            pieces = self._readers.pieces(*self.prompt_of(messages, params, tools=tools), adapter)
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
        if self._readers.are_waiting:
            raise RequestError("an answer is being made; read it to its end or close it before the model moves.")
        before = self._place
        place = _Place(dtype or before.dtype, device or before.device)
        if place == before:
            return
        del self._readers, self.model  # what comes may stand where they are
        torch.cuda.empty_cache()  # the next cache is as large as what the device reports as free allows
        try:
            self.model = self._load(dtype=place.dtype, device=place.device)
            self._place = place
        except KiloqError:
            self.model = self._load(dtype=before.dtype, device=before.device)
            raise
        finally:
            self._readers = Readers(self._new_engine())

    def as_completed(self, prompts: Iterable[Prompt], adapter: str = "") -> Iterator[tuple[int, Result | KiloqError]]:
        """Answer many prompts; each one's number and its result, or why it has none, in the order they finish."""
        return self._readers.completed(prompts, adapter)

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """A unit vector for each prompt: the mean of its tokens' final hidden states."""
        return finished(embed_parts(self.model, prompts, max_context=self.engine.max_context))

    def score(self, prompts: Sequence[Sequence[int]], top: int = 0) -> list[list[Sampled]]:
        """How likely each token of each prompt was but the first, and the `top` likeliest in its place."""
        return finished(score_parts(self.model, prompts, top, max_context=self.engine.max_context))

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


class _Place(NamedTuple):
    """How a checkpoint was asked to be loaded."""

    dtype: str | torch.dtype
    device: torch.device
