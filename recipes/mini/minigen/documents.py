"""Generated pre-training documents: stories, drills and dialogues as plain text."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minigen.dialogue import conversation
from minigen.drills import drill
from minigen.exchange import Sample
from minigen.react import rendered
from minigen.stories import story

SPEAKERS = {"en": ("User", "Assistant"), "zh": ("用户", "助手"), "ko": ("사용자", "도우미")}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A kind of generated document in one language, and how much of it."""

    name: str
    lang: str
    max_bytes: int
    make: Callable[[random.Random, str], str]


def dialogue(rng: random.Random, lang: str) -> str:
    """Two conversations of the training side, written as a play with two speakers."""
    return "\n\n".join(as_text(conversation(rng, lang, heldout=False)) for _ in range(2))


def as_text(sample: Sample) -> str:
    """A conversation without control tokens; the ReAct form keeps its own words."""
    user, assistant = SPEAKERS[sample.lang]
    names = {"user": user, "assistant": assistant, "system": "System"}
    return "\n".join(f"{names[role]}: {text}" for role, text in rendered(sample))


MEGABYTES = {
    "stories": {"en": 2.5, "zh": 3.0, "ko": 4.0},
    "dialogues": {"en": 4.0, "zh": 4.0, "ko": 4.5},
    "drills": {"en": 1.2, "zh": 1.2, "ko": 1.2},
}
MAKERS: dict[str, Callable[[random.Random, str], str]] = {"stories": story, "dialogues": dialogue, "drills": drill}
PARTS = tuple(
    Part(name=f"kiloq-{kind}-{lang}", lang=lang, max_bytes=int(size * 1e6), make=MAKERS[kind])
    for kind, sizes in MEGABYTES.items()
    for lang, size in sizes.items()
)


def generated_documents(part: Part, *, seed: int, max_bytes: int) -> Iterator[str]:
    """Different documents of a part until the wished size is reached; the same for the same seed."""
    rng, seen, size = random.Random(f"{seed}:{part.name}"), set[str](), 0
    while size < max_bytes:
        text = part.make(rng, part.lang)
        if text not in seen:
            seen.add(text)
            size += len(text.encode())
            yield text
