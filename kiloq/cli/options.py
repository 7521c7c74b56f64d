"""Options that several commands share, so that one letter means one thing everywhere. Knows no model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import CycloptsError, Parameter

if TYPE_CHECKING:
    from kiloq.engine import LLM, SamplingParams

DEMONSTRATION = (
    "This is kiloq-mini-chat, a small demonstration model that knows little. For a real one: -m Qwen/Qwen3-0.6B"
)

Model = Annotated[
    str | None,
    Parameter(name=["--model", "-m"], help="A folder or a hub id; without it, the bundled demonstration model."),
]
System = Annotated[str | None, Parameter(name=["--system", "-s"], help="The system prompt.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print the result as JSON.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is held in memory."""

    model: Model = None
    device: Annotated[str, Parameter(help="cpu, cuda, cuda:1, or auto.")] = "auto"
    dtype: Annotated[str, Parameter(help="float32, bfloat16, float16, or auto (as stored).")] = "auto"
    quantize: Annotated[
        str | None, Parameter(help="int4 or int8: fewer bits for the weights, rounded while they are loaded.")
    ] = None
    kv_dtype: Annotated[str, Parameter(help="Keys and values: auto, float32, bfloat16, or int8 (half the size).")] = (
        "auto"
    )
    max_context: Annotated[
        int | None, Parameter(help="Tokens of prompt and answer together; default: what the model allows.")
    ] = None
    draft: Annotated[
        str | None, Parameter(help="A smaller model of the same vocabulary, whose guesses make answers faster.")
    ] = None

    def load(
        self,
        *,
        max_batch: int | None = None,
        short_steps: bool = False,
        adapters: Mapping[str, Path] | None = None,
        seed: int = 0,
    ) -> "LLM":
        """Load the model; this is where torch is imported. `adapters` are LoRA folders by name."""
        from kiloq.engine import LLM

        return LLM(
            self.model,
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantize,
            kv_dtype=self.kv_dtype,
            max_context=self.max_context,
            max_batch=max_batch,
            short_steps=short_steps,
            draft=self.draft,
            adapters=adapters,
            seed=seed,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen; what is not given comes from the model's own generation_config.json."""

    temperature: Annotated[float | None, Parameter(help="0 always takes the likeliest token.")] = None
    top_k: Annotated[int | None, Parameter(help="Choose among the k likeliest tokens; 0 is no limit.")] = None
    top_p: Annotated[float | None, Parameter(help="Choose among the likeliest tokens that hold this share.")] = None
    repetition_penalty: Annotated[float | None, Parameter(help="Above 1, what was said is less likely again.")] = None
    max_tokens: Annotated[int | None, Parameter(help="The longest answer.")] = None
    seed: Annotated[int | None, Parameter(help="The same seed gives the same answer.")] = None
    speculation: Annotated[
        str | None, Parameter(help="Guess tokens ahead: auto, none, prompt-lookup or draft. Answers stay the same.")
    ] = None

    def given(self) -> dict[str, object]:
        """The options that a person set, by the names that SamplingParams gives them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def params(self, llm: "LLM") -> "SamplingParams":
        from kiloq.engine import SamplingParams

        return SamplingParams.for_model(llm.generation, **self.given())


def refuse_option(word: str) -> None:
    """For arguments that may be `-`: anything else that begins with a dash is a mistyped option."""
    if word.startswith("-") and word != "-":
        raise CycloptsError(msg=f"there is no option {word}.")
