"""Practice: many small facts in one answer, and longer texts to be copied. Trained on, never asked in the skill test.

A table's fact comes up a few times only in questions about one word; a question about six of them is six facts.
"""

import random

from minigen import invent
from minigen.exchange import Exchange
from minigen.templates import LANGUAGES, phrases, pick, rows
from minigen.words import COLUMN, group_name, join, members


def translating(rng: random.Random, lang: str) -> Exchange:
    """Several words into another language, or out of one."""
    other = rng.choice([x for x in LANGUAGES if x != lang])
    source, target = rng.sample((lang, other), 2)
    chosen = rng.sample(rows("words"), rng.randint(3, 7))
    pairs = [(r[COLUMN[source]], r[COLUMN[target]]) for r in chosen]
    name = pick(rng, phrases(f"ask_{lang}")[f"language_{target}"])
    return _several(rng, lang, "words", pairs, target=name)


def opposites(rng: random.Random, lang: str) -> Exchange:
    """The opposites of several words."""
    offset = 2 * (COLUMN[lang] - 1)
    chosen = rng.sample(rows("opposites"), rng.randint(3, 6))
    sides = [rng.sample((r[offset], r[offset + 1]), 2) for r in chosen]
    return _several(rng, lang, "opposites", [(one, other) for one, other in sides])


def grouping(rng: random.Random, lang: str) -> Exchange:
    """What several words are."""
    pairs: list[tuple[str, str]] = []
    for _ in range(rng.randint(3, 7)):
        group = rng.choice(rows("groups"))[0]
        pairs.append((rng.choice(members(group, lang)), group_name(group, lang, many=True)))
    return _several(rng, lang, "kinds", pairs)


def spelling(rng: random.Random, lang: str) -> Exchange:
    """Several words letter by letter."""
    column = COLUMN[rng.choice(("en", lang))]
    made = [
        rng.choice(rows("words"))[column] if rng.random() < 0.5 else invent.word(rng, rng.choice(("en", lang)))
        for _ in range(rng.randint(2, 5))
    ]
    return _several(rng, lang, "letters", [(word, "-".join(word.upper())) for word in made])


def dictation(rng: random.Random, lang: str) -> Exchange:
    """A longer text to be written again: a sentence, or a row of words, names and numbers that mean nothing."""
    if rng.random() < 0.4:
        text = join([invent.anything(rng, lang) for _ in range(rng.randint(3, 6))], lang)
    elif rng.random() < 0.3:
        text = join([str(rng.randint(1, 999)) for _ in range(rng.randint(4, 10))], lang)
    else:
        wording = phrases(f"ask_{lang}")["extract_intro"]
        text = pick(
            rng,
            wording,
            name=invent.person(rng, lang),
            age=rng.randint(6, 80),
            city=invent.place(rng, lang),
            job=rng.choice(members("job", lang)),
        )
    user = pick(rng, phrases(f"practice_{lang}")["dictation"], text=text)
    return Exchange(topic="practice", user=user, answer=text)


def _several(rng: random.Random, lang: str, kind: str, pairs: list[tuple[str, str]], **slots: object) -> Exchange:
    """A list of words, and one line of the answer for each."""
    listed = join([one for one, _ in pairs], lang)
    user = pick(rng, phrases(f"practice_{lang}")[kind], list=listed, **slots)
    return Exchange(topic="practice", user=user, answer="\n".join(f"{one}: {other}" for one, other in pairs))
