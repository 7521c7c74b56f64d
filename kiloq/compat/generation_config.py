"""Generation settings under the names of transformers and Qwen v1. Knows no model."""

import dataclasses
import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from kiloq.checkpoint import GenerationDefaults, resolve
from kiloq.engine import SamplingParams
from kiloq.errors import RequestError
from kiloq.tokenizer import Tokenizer


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """Assignable settings. `stop_words_ids` are id sequences; `max_length` counts the prompt and yields to
    `max_new_tokens`. An unknown name is an error, in `from_pretrained` and `with_changes` as in an assignment."""

    chat_format: str = "raw"
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    stop_words_ids: list[list[int]] = field(default_factory=list)
    max_window_size: int = 6144
    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        trust_remote_code: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **changes: object,
    ) -> "GenerationConfig":
        """The settings of a folder or hub id, with changes on top."""
        folder = resolve(str(name), revision=revision, cache_dir=cache_dir)
        tokenizer = Tokenizer.load(folder)
        return cls.of(GenerationDefaults.from_files(folder, tokenizer), tokenizer).with_changes(changes)

    @classmethod
    def of(cls, defaults: GenerationDefaults, tokenizer: Tokenizer) -> "GenerationConfig":
        """What a checkpoint says, in the words of this door."""
        first = tokenizer.end_of_text_id if tokenizer.end_of_text_id in defaults.stop_ids else defaults.stop_ids[0]
        return cls(
            chat_format=defaults.chat_format,
            eos_token_id=first,
            pad_token_id=defaults.pad_id,
            stop_words_ids=[[stop] for stop in defaults.stop_ids if stop != first],
            max_window_size=defaults.max_window,
            max_new_tokens=defaults.max_tokens,
            do_sample=defaults.temperature > 0,
            temperature=defaults.temperature or 1.0,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            repetition_penalty=defaults.repetition_penalty,
        )

    def with_changes(self, changes: dict[str, object]) -> "GenerationConfig":
        """A copy with some settings changed."""
        known = [item.name for item in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise RequestError(
                    f"'{name}' is not a generation setting here."
                    + (f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(known)}.")
                )
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # to_params checks the values

    def to_params(self, tokenizer: Tokenizer, *, prompt_length: int) -> SamplingParams:
        """What the engine is asked. Stop words of one token end by id, longer ones wherever their text appears."""
        eos = [] if self.eos_token_id is None else self.eos_token_id
        ends = [*eos] if isinstance(eos, list) else [eos]
        ends += [word[0] for word in self.stop_words_ids if len(word) == 1]
        if self.chat_format == "chatml":
            ends += [tokenizer.im_end_id, tokenizer.im_start_id]
        room = self.max_new_tokens
        if room is None and self.max_length is not None:
            room = max(self.max_length - prompt_length, 1)
        return SamplingParams(
            max_tokens=room,
            temperature=self.temperature if self.do_sample else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            n=self.num_return_sequences,
            seed=self.seed,
            stop=tuple(tokenizer.decode(word) for word in self.stop_words_ids if len(word) > 1),
            stop_ids=tuple(dict.fromkeys(ends)),
            ignore_eos=True,  # the stop ids above are all there are
            skip_special=False,  # stop words may name special tokens
        )

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write generation_config.json."""
        path = Path(folder) / "generation_config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
