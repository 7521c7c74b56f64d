"""Follow-ups: questions whose answer lies in an earlier turn."""

import random
from collections.abc import Sequence

from minigen import invent
from minigen.exchange import Exchange
from minigen.numbers import compute, worked
from minigen.templates import LANGUAGES, phrases, pick, rows
from minigen.words import COLUMN, members, sentence

FACTS = ("name", "age", "city", "number", "color", "animal", "food", "word", "friend", "job")


def fact_value(rng: random.Random, lang: str, fact: str) -> str:
    """Something a user may tell about themselves or ask to be remembered."""
    if fact in ("name", "friend"):
        return invent.person(rng, lang)
    if fact in ("age", "number"):
        return str(rng.randint(6, 70) if fact == "age" else rng.randint(1, rng.choice((99, 999, 9999, 99999))))
    if fact == "city":
        return rng.choice(rows("capitals"))[COLUMN[lang] + 2]
    if fact == "word":
        return rng.choice((rng.choice(rows("words"))[COLUMN[lang]], invent.word(rng, lang)))
    group = rng.choice(("fruit", "food")) if fact == "food" else fact
    return rng.choice(members(group, lang)[:15])


def tell(rng: random.Random, lang: str, fact: str, value: str) -> Exchange:
    """The turn that states a fact."""
    talk = phrases(f"memory_{lang}")
    answer = sentence(pick(rng, talk[f"{fact}_noted"], value=value))
    return Exchange(topic="memory", user=pick(rng, talk[f"{fact}_tell"], value=value), answer=answer)


def recall(rng: random.Random, lang: str, fact: str, value: str) -> Exchange:
    """The later turn that asks for it."""
    talk = phrases(f"memory_{lang}")
    answer = sentence(pick(rng, talk[f"{fact}_recall"], value=value))
    return Exchange(
        topic="memory", user=pick(rng, talk[f"{fact}_ask"]), answer=answer, expect=value, key=f"recall:{fact}:{value}"
    )


def by_name(rng: random.Random, lang: str, name: str) -> Exchange:
    """A greeting or goodbye that uses the name that was told."""
    talk, kind = phrases(f"memory_{lang}"), rng.choice(("name_bye", "name_hello"))
    answer = pick(rng, talk[f"{kind}_answer"], value=name)
    return Exchange(topic="memory", user=pick(rng, talk[kind]), answer=answer, expect=name, key=f"{kind}:{name}")


def unknown_fact(rng: random.Random, lang: str) -> Exchange:
    """Asked for something that was never told: the honest answer."""
    talk, fact = phrases(f"memory_{lang}"), rng.choice(("name", "age", "city", "color"))
    return Exchange(topic="memory", user=pick(rng, talk[f"{fact}_ask"]), answer=pick(rng, talk["not_told"]))


def first_question(rng: random.Random, lang: str, asked: Sequence[Exchange]) -> Exchange:
    """What the user said first, or just before."""
    talk, first = phrases(f"memory_{lang}"), rng.random() < 0.6
    said = asked[0 if first else -1].user
    user = pick(rng, talk["first_ask" if first else "previous_ask"])
    answer = pick(rng, talk["first_answer" if first else "previous_answer"], said=said)
    return Exchange(topic="recall_question", user=user, answer=answer, expect=said)


def next_step(rng: random.Random, lang: str, value: int) -> Exchange:
    """An operation on the result of the turn before."""
    operation = rng.choice(("add", "add", "subtract", "multiply", "multiply"))
    n = rng.randint(1, 20) if operation == "add" else rng.randint(1, max(1, min(value, 20)))
    n = rng.randint(2, 10) if operation == "multiply" else n
    if operation == "subtract" and n > value:
        operation = "add"
    if operation == "multiply" and (value > 12 or value == 0):
        operation = "add"
    result = compute(operation, value, n)
    user = pick(rng, phrases(f"memory_{lang}")[f"then_{operation}"], n=n)
    answer = pick(rng, phrases(f"ask_{lang}")["result"], formula=worked(operation, value, n), result=result)
    key = f"{operation}:{value}:{n}"
    return Exchange(topic="chain", user=user, answer=answer, key=key, expect=f"= {result}", value=str(result))


def say_in(rng: random.Random, lang: str, entry: Sequence[str], used: str) -> Exchange:
    """The word of the turn before, in the language that is left."""
    left = next(x for x in LANGUAGES if x not in (lang, used))
    target = rng.choice(phrases(f"ask_{lang}")[f"language_{left}"])
    source, result = entry[LANGUAGES.index(lang)].rstrip("?？"), entry[LANGUAGES.index(left)]
    user = pick(rng, phrases(f"memory_{lang}")["and_in"], target=target)
    answer = pick(rng, phrases(f"ask_{lang}")["translate_answer"], word=source, target=target, result=result)
    return Exchange(topic="translation", user=user, answer=answer, expect=result, key=f"{lang}:{left}:{source}")


def and_country(rng: random.Random, lang: str) -> Exchange:
    """ "And Japan?" after a capital was asked."""
    row, offset = rng.choice(rows("capitals")), LANGUAGES.index(lang)
    country, capital = row[offset], row[offset + 3]
    user = pick(rng, phrases(f"memory_{lang}")["and_country"], country=country)
    answer = sentence(pick(rng, phrases(f"ask_{lang}")["capital_answer"], country=country, capital=capital))
    return Exchange(topic="capital", user=user, answer=answer, expect=capital)


def spell_it(rng: random.Random, lang: str, word: str) -> Exchange:
    """The spelling of an English word that was just said."""
    result = "-".join(word.upper())
    answer = pick(rng, phrases(f"ask_{lang}")["spell_answer"], word=word, result=result)
    return Exchange(
        topic="letters", user=pick(rng, phrases(f"memory_{lang}")["spell_it"]), answer=answer, expect=result
    )


def about_it(rng: random.Random, lang: str, kind: str, value: str) -> Exchange:
    """The hero of the story, or the author or title of the poem, that was just told."""
    talk = phrases(f"memory_{lang}")
    answer = pick(rng, talk[f"{kind}_answer"], value=value)
    return Exchange(topic=kind, user=pick(rng, talk[kind]), answer=answer, expect=value, key=f"{kind}:{value}")


def again(rng: random.Random, lang: str, last: Exchange) -> Exchange:
    """The last answer once more."""
    talk = phrases(f"memory_{lang}")
    return Exchange(topic="again", user=pick(rng, talk["again"]), answer=last.answer, expect=last.answer)
