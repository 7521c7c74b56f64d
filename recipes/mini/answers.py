"""Answers of a chat model to many generated conversations at once, by kiloq's own engine."""

from collections.abc import Sequence
from pathlib import Path

from minigen.exchange import Sample

from kiloq import LLM, SamplingParams
from kiloq.errors import KiloqError

MAX_TOKENS = 120


def answers(model: Path, asked: Sequence[Sample], *, temperature: float, seed: int = 0) -> list[str]:
    """What the model says where each conversation has its last answer."""
    llm = LLM(model, max_batch=32)
    prompts = []
    for number, sample in enumerate(asked):
        params = SamplingParams.for_model(
            llm.generation,
            temperature=temperature,
            seed=seed + number,
            repetition_penalty=1.0,
            max_tokens=MAX_TOKENS,
        )
        prompts.append(llm.prompt_of(sample.messages[:-1], params, tools=sample.tools))
    said = [""] * len(prompts)
    for number, result in llm.as_completed(prompts):
        if isinstance(result, KiloqError):
            raise result
        said[number] = result.text
    return said
