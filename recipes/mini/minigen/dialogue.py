"""Whole conversations: one question or a scene of several turns, with or without a system prompt or tools."""

import random
from dataclasses import replace

from minigen.exchange import Exchange, Message, Sample, draw
from minigen.personas import persona
from minigen.react import react, tool_call
from minigen.scenes import MULTI
from minigen.topics import any_topic


def conversation(rng: random.Random, lang: str, *, heldout: bool) -> Sample:
    """One conversation of the training side or of the held-out test, whose last answer can be checked."""
    kind = rng.choices(("single", "multi", "persona", "react", "tool_call"), (53, 34, 7, 4, 2))[0]
    while True:
        sample = _compose(rng, lang, kind, heldout=heldout)
        if sample.heldout == heldout and (sample.expect or not heldout):
            return sample


def _compose(rng: random.Random, lang: str, kind: str, *, heldout: bool) -> Sample:
    if kind == "persona":
        return persona(rng, lang, heldout=heldout)
    if kind in ("react", "tool_call"):
        return (react if kind == "react" else tool_call)(rng, lang)
    if kind == "single":
        turns = [draw(rng, lang, any_topic, heldout=heldout)]
    else:
        turns = rng.choices([m for _, m in MULTI], [w for w, _ in MULTI])[0](rng, lang, heldout)
    sample = as_sample(turns, lang)
    return sample if heldout else replace(sample, heldout=any(t.heldout for t in turns))


def as_sample(turns: list[Exchange], lang: str) -> Sample:
    """Turns as one conversation, which is held out if its last turn is."""
    messages: list[Message] = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    last = turns[-1]
    topic = last.topic if len(turns) == 1 else f"multi/{last.topic}"
    return Sample(topic=topic, lang=lang, messages=messages, expect=last.expect, heldout=last.heldout)
