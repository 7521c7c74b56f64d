"""A model with the calls of transformers and of Qwen v1: chat, chat_stream, generate on padded tensors, logits."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiloq.checkpoint.merge import weights_of
from kiloq.checkpoint.writer import save_streamed
from kiloq.engine import LLM, SamplingParams
from kiloq.engine.results import Choice, Piece
from kiloq.errors import KiloqError, RequestError

from .arguments import Device, WithoutEffect, check_names, device_of, dtype_of
from .context import History, conversation
from .generation_config import GenerationConfig
from .tokenizer import QwenTokenizer

_REMEMBERED = 256  # answers whose ids are kept, so that a history of texts renders as it was generated

# Arguments of transformers that choose nothing here; the cache is the engine's own.
_GENERATE_WITHOUT_EFFECT = frozenset({"use_cache", "token_type_ids", "synced_gpus"})
_CALL_WITHOUT_EFFECT: WithoutEffect = {
    "use_cache": None,
    "token_type_ids": None,
    "return_dict": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "past_key_values": (None,),
    "inputs_embeds": (None,),
    "position_ids": (None,),
}


@dataclass(frozen=True)
class CausalLMOutput:
    """logits: [N, S, vocab], zero where the input is padding."""

    logits: Tensor
    loss: Tensor | None = None


class CausalLM:
    """One loaded checkpoint. Answers come from the engine, so a chat's next turn computes only its new tokens."""

    def __init__(self, llm: LLM, generation_config: GenerationConfig) -> None:
        self.llm = llm
        self.config = llm.config
        self.generation_config = generation_config
        self._said: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.dtype

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.llm.model.parameters()

    def eval(self) -> "CausalLM":
        """Nothing to do: a loaded model is in evaluation mode."""
        return self

    def to(
        self,
        device: Device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,  # it changes no value
    ) -> "CausalLM":
        """Move the model to a device or convert it to a type, in place, when it is not answering."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        target = None if device is None else torch.device(device_of(device))
        self.llm.to(target, None if dtype is None else getattr(torch, dtype_of(dtype)))
        return self

    def cuda(self, device: Device | None = None) -> "CausalLM":
        return self.to("cuda" if device is None else device)

    def cpu(self) -> "CausalLM":
        return self.to("cpu")

    def half(self) -> "CausalLM":
        return self.to(torch.float16)

    def bfloat16(self) -> "CausalLM":
        return self.to(torch.bfloat16)

    def float(self) -> "CausalLM":
        return self.to(torch.float32)

    def chat(
        self,
        tokenizer: QwenTokenizer,
        query: str,
        history: History | None = None,
        system: str | None = None,
        append_history: bool = True,
        stream: bool | None = None,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **changes: object,
    ) -> tuple[str, list[tuple[str, str]]]:
        """The answer, and a new history with it. A stop word that ended the answer stays in it, as in the original.

        The order is that of the first release; a later one left `append_history` out and refused `stream` of any value.
        """
        if stream:
            raise RequestError("chat gives whole answers; for an answer as it is made, call chat_stream.")
        settings = self._settings(generation_config, changes, stop_words_ids)
        prompt_ids, params = self._prompt(query, history, system, settings)
        result = self.llm.generate([prompt_ids], params)[0]
        ids = self._visible(result.choices[0])
        response = tokenizer.decode(ids).strip()
        self._remember(response, ids)
        pairs = [(str(question), str(reply)) for question, reply in history or ()]
        return response, [*pairs, (query, response)] if append_history else pairs

    def chat_stream(
        self,
        tokenizer: QwenTokenizer,
        query: str,
        history: History | None = None,
        system: str | None = None,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        logits_processor: None = None,
        generation_config: GenerationConfig | None = None,
        **changes: object,
    ) -> Iterator[str]:
        """The answer so far, each time longer. Closing the iterator ends the answer."""
        if logits_processor is not None:
            raise RequestError(
                "logits_processor is not supported; repetition_penalty, min_p and the like are settings."
            )
        settings = self._settings(generation_config, changes, stop_words_ids)
        pieces = self.llm.stream(*self._prompt(query, history, system, settings))
        decoder = self.llm.tokenizer.stream_decoder(errors="ignore")
        text, ids = "", []
        try:
            for piece in pieces:
                more = self._visible(piece)
                ids += more
                shown = text + "".join(decoder.push(token_id) for token_id in more)
                if shown != text:
                    text = shown
                    yield text
        finally:
            pieces.close()
            self._remember(text.strip(), ids)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        return_dict_in_generate: bool = False,
        **changes: object,
    ) -> Tensor:
        """Prompts [N, S] with their continuations, [N * num_return_sequences, S + longest], padded on the right.

        Padding of the prompts is what the mask leaves out; without a mask, pad tokens at the left.
        """
        prompts = input_ids if inputs is None else inputs
        if prompts is None:
            raise RequestError("generate needs input_ids, a tensor of prompts [N, S].")
        if return_dict_in_generate:
            raise RequestError("return_dict_in_generate is not supported; generate returns the tensor of sequences.")
        changes = {name: value for name, value in changes.items() if name not in _GENERATE_WITHOUT_EFFECT}
        settings = self._settings(generation_config, changes, stop_words_ids)
        mask = self._mask(prompts, attention_mask, settings)
        rows = [row[kept].tolist() for row, kept in zip(prompts, mask, strict=True)]
        asked = [(row, settings.to_params(self.llm.tokenizer, prompt_length=prompts.shape[1])) for row in rows]
        ended: list[list[Tensor]] = [[] for _ in rows]
        for number, outcome in self.llm.as_completed(asked):
            if isinstance(outcome, KiloqError):
                raise outcome
            for choice in outcome.choices:
                stop = () if choice.stop_id is None else (choice.stop_id,)
                added = torch.tensor((*choice.token_ids, *stop), dtype=prompts.dtype, device=prompts.device)
                ended[number].append(torch.cat([prompts[number], added]))
        sequences = [sequence for row in ended for sequence in row]
        return nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=self._pad_id(settings))

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **others: object,
    ) -> CausalLMOutput:
        """Logits of whole sequences [N, S]; with labels, the mean loss of each next token that is not -100.

        What follows padding is nobody's next token, so a padded row has the loss that it has alone.
        """
        check_names(CausalLM.__call__, others, _CALL_WITHOUT_EFFECT)
        _check_two_dimensional(input_ids)
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        lengths: list[int] = kept.sum(1).tolist()
        starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        flat = self.llm.model.logits(input_ids[kept], starts)  # [T, vocab]
        logits = flat.new_zeros(*input_ids.shape, flat.shape[-1])
        logits[kept] = flat
        if labels is None:
            return CausalLMOutput(logits)
        targets = labels[:, 1:].masked_fill(~kept[:, :-1], -100)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return CausalLMOutput(logits, loss)

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int | str = 5_000_000_000, safe_serialization: bool = True
    ) -> None:
        """Write a checkpoint folder of the same family, as safetensors, in the type that the model has now."""
        if not safe_serialization:
            raise RequestError("save_pretrained writes safetensors only; leave safe_serialization out.")
        weights, dtype = weights_of(self.llm.checkpoint), self.llm.dtype
        save_streamed(
            folder,
            read=lambda name: weights.read(name, dtype=dtype),
            dtype=dtype,
            config=self.llm.config,
            tokenizer=self.llm.tokenizer,
            generation=self.llm.generation,
            max_shard_bytes=_bytes(max_shard_size),
        )

    def _settings(
        self,
        given: GenerationConfig | None,
        changes: dict[str, object],
        stop_words_ids: Sequence[Sequence[int]] | None,
    ) -> GenerationConfig:
        settings = (given or self.generation_config).with_changes(changes)
        if stop_words_ids is None:
            return settings
        words = [*settings.stop_words_ids, *map(list, stop_words_ids)]
        return dataclasses.replace(settings, stop_words_ids=words)

    def _prompt(
        self, query: str, history: History | None, system: str | None, settings: GenerationConfig
    ) -> tuple[Sequence[int], SamplingParams]:
        if settings.chat_format != "chatml":
            raise RequestError(
                f"chat needs chat_format 'chatml', but this model has {settings.chat_format!r}. "
                "Load a -Chat model, or use generate."
            )
        messages = [
            dataclasses.replace(message, token_ids=self._said.get(message.content))
            if message.role == "assistant"
            else message
            for message in conversation(query, history, system)
        ]
        params = settings.to_params(self.llm.tokenizer, prompt_length=0)
        return self.llm.prompt_of(messages, params, window=settings.max_window_size)

    def _visible(self, answer: Choice | Piece) -> list[int]:
        """Its ids, with the token that ended it if that is part of the text."""
        stop_id = answer.stop_id
        shows = stop_id is not None and stop_id not in self.llm.tokenizer.control_ids
        return [*answer.token_ids, stop_id] if shows and stop_id is not None else [*answer.token_ids]

    def _remember(self, text: str, ids: Sequence[int]) -> None:
        self._said[text] = tuple(ids)
        self._said.move_to_end(text)
        if len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)

    def _mask(self, prompts: Tensor, attention_mask: Tensor | None, settings: GenerationConfig) -> Tensor:
        _check_two_dimensional(prompts)
        if attention_mask is not None:
            return attention_mask.bool()
        if len(prompts) == 1 and settings.pad_token_id == settings.eos_token_id:
            return torch.ones_like(prompts, dtype=torch.bool)  # a prompt of its own may begin with end-of-text
        return prompts.ne(self._pad_id(settings)).cumsum(1) > 0

    def _pad_id(self, settings: GenerationConfig) -> int:
        return self.llm.generation.pad_id if settings.pad_token_id is None else settings.pad_token_id


def _check_two_dimensional(ids: Tensor) -> None:
    if ids.dim() != 2:
        raise RequestError(f"input_ids has shape {list(ids.shape)}; it must be [rows, tokens].")


def _bytes(size: int | str) -> int:
    """5_000_000_000, "5GB" or "2048MB"."""
    if isinstance(size, int):
        return size
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = size.strip()[:-2], size.strip()[-2:].upper()
    if unit not in units or not number.strip().isdigit():
        raise RequestError(f"max_shard_size is {size!r}; write it like '2048MB' or '5GB'.")
    return int(number) * units[unit]
