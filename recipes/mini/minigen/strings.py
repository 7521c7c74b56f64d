"""Small work on given words and numbers: sorting, repeating, joining, finding, changing case; English forms."""

import random

from minigen import invent
from minigen.exchange import Exchange
from minigen.templates import phrases, pick, rows
from minigen.words import COLUMN, join, members

GROUPS = ("animal", "fruit", "color", "vehicle", "food", "clothes")


def sorting(rng: random.Random, lang: str) -> Exchange:
    """Three to five numbers from small to large, or the other way."""
    text, kind = phrases(f"lists_{lang}"), rng.choice(("ascending", "descending"))
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    shown = ", ".join(map(str, numbers))
    # One number after the other is put in its place: each line copies the one before and decides once.
    lines = [
        ", ".join(map(str, sorted(numbers[:count], reverse=kind == "descending")))
        for count in range(1, len(numbers) + 1)
    ]
    user, ordered = pick(rng, text[kind], list=shown), lines[-1]
    return Exchange(topic="sorting", user=user, answer="\n".join(lines), key=shown, expect=ordered)


def adding_up(rng: random.Random, lang: str) -> Exchange:
    """The sum of three small numbers, step by step."""
    a, b, c = (rng.randint(1, 20) for _ in range(3))
    text = phrases(f"lists_{lang}")
    answer = f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}"
    user = pick(rng, text["sum"], a=a, b=b, c=c)
    return Exchange(topic="adding_up", user=user, answer=answer, key=f"{a}:{b}:{c}", expect=str(a + b + c))


def copying(rng: random.Random, lang: str) -> Exchange:
    """Say after me: a word, a phrase, a number, or a word several times."""
    text = phrases(f"lists_{lang}")
    what = rng.choice(
        (
            rng.choice(rows("words"))[COLUMN[lang]],
            rng.choice(rows("phrases"))[COLUMN[lang] - 1],
            *(invent.anything(rng, lang) for _ in range(4)),
        )
    )
    if rng.random() < 0.35:
        n, word = rng.randint(2, 5), rng.choice((rng.choice(rows("words"))[COLUMN[lang]], invent.word(rng, lang)))
        answer = " ".join([word] * n)
        return Exchange(
            topic="copy", user=pick(rng, text["times"], word=word, n=n), answer=answer, key=f"{word}:{n}", expect=answer
        )
    return Exchange(
        topic="copy", user=pick(rng, text["repeat"], text=what), answer=what, key=f"copy:{what}", expect=what
    )


def listing(rng: random.Random, lang: str) -> Exchange:
    """A list of words: how many, which is first or last or n-th, is one of them in it."""
    text = phrases(f"lists_{lang}")
    items = rng.sample(members(rng.choice(GROUPS), lang), rng.randint(3, 5))
    shown, kind = join(items, lang), rng.choice(("how_many", "first", "last", "second", "contains"))
    if kind == "contains":
        present = rng.random() < 0.5
        word = rng.choice(items if present else [w for w in members("home", lang) if w not in items])
        answer = pick(rng, text["yes" if present else "no"], word=word)
        user = pick(rng, text["contains"], word=word, list=shown)
        return Exchange(topic="lines", user=user, answer=answer, key=user, expect=answer)
    result = {"how_many": str(len(items)), "first": items[0], "last": items[-1], "second": items[1]}[kind]
    user = pick(rng, text[kind], list=shown)
    answer = pick(rng, text[f"{kind}_answer"], result=result)
    if kind == "how_many":  # counted aloud first
        answer = join([f"{number} {item}" for number, item in enumerate(items, 1)], lang) + f"\n{answer}"
    return Exchange(topic="lines", user=user, answer=answer, key=user, expect=result, value="\t".join(items))


def english_forms(rng: random.Random, lang: str) -> Exchange:
    """The plural of a noun, the past of a verb, capitals: always about English, asked in any language."""
    text = phrases(f"lists_{lang}")
    kind = rng.choice(("plural", "past", "upper", "lower"))
    if kind in ("plural", "past"):
        word, result = rng.choice(rows(kind))
    else:
        word = rng.choice([r[1] for r in rows("words") if len(r[1]) <= 8])
        word, result = (word, word.upper()) if kind == "upper" else (word.upper(), word)
    user = pick(rng, text[kind], word=word)
    return Exchange(
        topic="copy",
        user=user,
        answer=pick(rng, text["form_answer"], result=result),
        key=f"{kind}:{word}",
        expect=result,
    )


def fact(rng: random.Random, lang: str) -> Exchange:
    """A simple fact of a child's world."""
    row, offset = rng.choice(rows("facts")), 2 * (COLUMN[lang] - 1)
    question = pick(rng, phrases(f"lists_{lang}")["question"], question=pick(rng, row[offset]))
    return Exchange(topic="fact", user=question, answer=row[offset + 1], expect=row[offset + 1])


def details(rng: random.Random, lang: str) -> Exchange:
    """A price, a telephone number, a time or a weekday out of a sentence."""
    text = phrases(f"lists_{lang}")
    ask = phrases(f"ask_{lang}")
    kind = rng.choice(("price", "phone", "time", "day", "code"))
    value = {
        "price": str(rng.randint(1, 200)),
        "phone": f"{rng.randint(100, 999)}-{rng.randint(1000, 9999)}",
        "time": f"{rng.randint(6, 22)}:{rng.choice(('00', '15', '30', '45'))}",
        "day": rng.choice(ask["days"]),
        "code": invent.code(rng),
    }[kind]
    slots = {"value": value, "name": invent.person(rng, lang), "thing": rng.choice(members("clothes", lang))}
    sentence = pick(rng, text[f"{kind}_text"], **slots)
    user = pick(rng, text[f"{kind}_ask"], text=sentence)
    return Exchange(
        topic="extraction", user=user, answer=pick(rng, text[f"{kind}_answer"], value=value), key=sentence, expect=value
    )
