"""Conversations under a system prompt: another name, another language, one-word answers."""

import random
from dataclasses import replace

from minigen import invent, numbers, words
from minigen.exchange import Message, Sample, draw
from minigen.templates import LANGUAGES, phrases, pick, talk_section


def persona(rng: random.Random, lang: str, *, heldout: bool) -> Sample:
    """A conversation whose answers obey its system prompt."""
    kind = rng.choice(("name", "short", "language", "helper", "repeat_end"))
    text = phrases(f"persona_{lang}")
    if kind == "name":
        system, turns = _named(rng, lang)
    elif kind == "short":
        exchange = draw(rng, lang, rng.choice((numbers.arithmetic, words.capitals, words.opposites)), heldout=heldout)
        exchange = replace(exchange, expect=exchange.expect.removeprefix("= "))
        system, turns = pick(rng, text["short_system"]), [(exchange.user, exchange.expect)]
    elif kind == "language":
        system, turns = _other_language(rng, lang)
    else:
        exchange = draw(rng, lang, rng.choice((numbers.arithmetic, words.capitals, words.translation)), heldout=heldout)
        tail = pick(rng, text["end_word"])
        ends = kind == "repeat_end"
        system = pick(rng, text["end_system"], tail=tail) if ends else pick(rng, text["helper_system"])
        turns = [(exchange.user, f"{exchange.answer} {tail}" if ends else exchange.answer)]
    messages: list[Message] = [{"role": "system", "content": system}]
    for user, answer in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    checked = kind in ("short", "helper", "repeat_end")
    expect, held = (exchange.expect, exchange.heldout) if checked else ("", False)
    return Sample(topic=f"persona/{kind}", lang=lang, messages=messages, expect=expect, heldout=held)


def _named(rng: random.Random, lang: str) -> tuple[str, list[tuple[str, str]]]:
    """Plays somebody with a name and a part, and says so when asked."""
    text = phrases(f"persona_{lang}")
    name, role = rng.choice((rng.choice(text["names"]), invent.person(rng, lang))), rng.choice(text["roles"])
    system = pick(rng, text["name_system"], name=name, role=role)
    section = rng.choice(("name", "who", "greeting"))
    turns = [(pick(rng, talk_section(lang, section)[0]), pick(rng, text[f"name_{section}"], name=name, role=role))]
    if rng.random() < 0.3:
        fact = draw(rng, lang, words.capitals, heldout=False)
        turns.append((fact.user, fact.answer))
    return system, turns


def _other_language(rng: random.Random, lang: str) -> tuple[str, list[tuple[str, str]]]:
    """Told to answer in one language, asked in another."""
    target = rng.choice([x for x in LANGUAGES if x != lang])
    system = pick(
        rng, phrases(f"persona_{lang}")["language_system"], target=phrases(f"ask_{lang}")[f"language_{target}"][0]
    )
    section = rng.choice(
        ("greeting", "thanks", "how_are_you", "name", "who", "maker", "bye", "season", "ability", "feel_bad")
    )
    user = pick(rng, talk_section(lang, section)[0])
    return system, [(user, pick(rng, talk_section(target, section)[1]))]
