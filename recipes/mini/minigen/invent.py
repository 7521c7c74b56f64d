"""Names, words and numbers put together from syllables: what nobody can know by heart, so that copying is learned."""

import random
from typing import Any

from minigen.templates import phrases

NAMES: dict[str, Any] = dict(phrases("names"))
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def person(rng: random.Random, lang: str) -> str:
    """A given name: one of the stories' people, a real one, or one put together."""
    kind = rng.random()
    if kind < 0.25:
        grammar = phrases(f"stories_{lang}")
        return rng.choice(phrases(f"ask_{lang}")["names"] + grammar["names_he"] + grammar["names_she"])
    if kind < 0.5:
        return str(rng.choice(NAMES[lang]["first"]))
    made = _joined(rng, lang)
    if lang == "en":
        return made.capitalize()
    if rng.random() < 0.6:
        return f"{rng.choice(NAMES[lang]['surname'])}{made}"
    return f"{rng.choice('小阿')}{made[-1]}" if lang == "zh" and rng.random() < 0.3 else made


def word(rng: random.Random, lang: str) -> str:
    """A word that means nothing, in the language's script or in Latin letters."""
    script = lang if rng.random() < 0.6 else "en"
    made = _joined(rng, script)
    return made + rng.choice(NAMES[script]["end"]) if rng.random() < 0.3 else made


def code(rng: random.Random) -> str:
    """A number of some digits, or letters and digits as on a ticket."""
    digits = "".join(rng.choices("0123456789", k=rng.randint(2, 6)))
    if rng.random() < 0.5:
        return digits.lstrip("0") or "7"
    letters = "".join(rng.choices(LETTERS.upper(), k=rng.randint(1, 3)))
    return f"{letters}{rng.choice(('', '-'))}{digits}"


def place(rng: random.Random, lang: str) -> str:
    """A town or a country that does not exist."""
    return str(rng.choice(NAMES[lang]["place"])).replace("{name}", _joined(rng, lang).capitalize())


def anything(rng: random.Random, lang: str) -> str:
    """Something to be repeated to the letter: a word, a name, a code, or several words."""
    kind = rng.random()
    if kind < 0.3:
        return word(rng, lang)
    if kind < 0.5:
        return person(rng, lang)
    if kind < 0.75:
        return code(rng)
    return " ".join(word(rng, lang) for _ in range(rng.randint(2, 4)))


def _joined(rng: random.Random, lang: str) -> str:
    parts = NAMES[lang]
    middle = rng.choice(parts["start"]) if lang == "en" and rng.random() < 0.4 else ""
    return f"{rng.choice(parts['start'])}{middle}{rng.choice(parts['end'])}"
