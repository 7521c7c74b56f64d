"""Questions about words: capitals, opposites, translation, groups, letters."""

import random

from minigen import invent
from minigen.exchange import Exchange
from minigen.templates import LANGUAGES, phrases, pick, rows

COLUMN = {lang: index + 1 for index, lang in enumerate(LANGUAGES)}  # of words.tsv


def capitals(rng: random.Random, lang: str) -> Exchange:
    """The capital of a country, or the country of a capital."""
    words, row, offset = phrases(f"ask_{lang}"), rng.choice(rows("capitals")), COLUMN[lang] - 1
    country, capital = row[offset], row[offset + 3]
    kind = "capital" if rng.random() < 0.75 or country == capital else "capital_of"
    user = pick(rng, words[kind], country=country, capital=capital)
    answer = pick(rng, words[f"{kind}_answer"], country=country, capital=capital)
    expect = capital if kind == "capital" else country
    return Exchange(topic=kind, user=user, answer=sentence(answer), expect=expect.removeprefix("the "), value=country)


def opposites(rng: random.Random, lang: str) -> Exchange:
    """The opposite of a word."""
    words, row, offset = phrases(f"ask_{lang}"), rng.choice(rows("opposites")), 2 * (COLUMN[lang] - 1)
    pair = [row[offset], row[offset + 1]]
    rng.shuffle(pair)
    user = pick(rng, words["opposite"], word=pair[0])
    answer = pick(rng, words["opposite_answer"], word=pair[0], other=pair[1])
    return Exchange(topic="opposite", user=user, answer=answer, expect=pair[1], value=pair[1])


def translation(rng: random.Random, lang: str, word: tuple[str, str, str] | None = None) -> Exchange:
    """A word or short phrase into another language, or from one; the answer is in the language of the question."""
    words = phrases(f"ask_{lang}")
    entry = word or translatable(rng)
    other = rng.choice([x for x in LANGUAGES if x != lang])
    source, result = entry[COLUMN[lang] - 1], entry[COLUMN[other] - 1]
    target = rng.choice(words[f"language_{other}"])
    kind = "translate"
    if rng.random() < 0.3:
        source, result, kind, target = result, source, "meaning", words[f"language_{lang}"][0]
    bare = source.rstrip("?？")
    user = pick(rng, words[kind], word=bare, target=target)
    answer = pick(rng, words["translate_answer"], word=bare, target=target, result=result)
    return Exchange(topic="translation", user=user, answer=answer, expect=result, value="\t".join(entry))


def translatable(rng: random.Random) -> tuple[str, str, str]:
    """A word, or in one case of five a short phrase, in the three languages."""
    if rng.random() < 0.2:
        row = rng.choice(rows("phrases"))
        return row[0], row[1], row[2]
    row = rng.choice(rows("words"))
    return row[1], row[2], row[3]


def group_name(group: str, lang: str, *, many: bool) -> str:
    """What a group of words is called."""
    row = next(r for r in rows("groups") if r[0] == group)
    if lang == "en":
        return row[2] if many else row[1]
    return row[3] if lang == "zh" else row[4]


def members(group: str, lang: str) -> list[str]:
    """The words of a group in one language."""
    return [r[COLUMN[lang]] for r in rows("words") if r[0] == group]


def grouping(rng: random.Random, lang: str) -> Exchange:
    """Which of two groups a word belongs to, the odd one out of four, or examples of a group."""
    words, kind = phrases(f"ask_{lang}"), rng.choice(("category", "category", "odd_one", "odd_one", "example"))
    # Neighbouring groups such as food and fruit would make the question unfair.
    group, other = rng.sample(
        ["animal", "color", "vehicle", "clothes", "body", "job", rng.choice(("fruit", "vegetable", "drink"))], 2
    )
    if kind == "category":
        word = rng.choice(members(group, lang))
        names = [group_name(group, lang, many=False), group_name(other, lang, many=False)]
        first, second = rng.sample(names, 2)
        user = pick(rng, words[kind], word=word, first=first, second=second)
        answer = sentence(pick(rng, words["category_answer"], word=word, result=names[0]))
        return Exchange(topic="category", user=user, answer=answer, expect=names[0], key=f"{word}:{other}")
    name = group_name(group, lang, many=True)
    if kind == "odd_one":
        odd, shown = rng.choice(members(other, lang)), rng.sample(members(group, lang), 3)
        four = rng.sample([*shown, odd], 4)
        listed = join(four, lang)
        user = pick(rng, words[kind], list=listed)
        # One word after the other first: a small model cannot compare four groups that it has not named.
        single = group_name(other, lang, many=True)
        work = join([f"{w}: {single if w == odd else name}" for w in four], lang)
        work = f"{work}\n{name} 3, {single} 1: {odd}"
        answer = sentence(pick(rng, words["odd_one_answer"], result=odd, group=name))
        return Exchange(topic="odd_one", user=user, answer=f"{work}\n{answer}", expect=odd)
    n = rng.randint(2, 5)
    user = pick(rng, words[kind], n=n, group=name)
    end = {"en": ".", "zh": "。", "ko": "입니다."}[lang]
    return Exchange(topic="example", user=user, answer=sentence(join(rng.sample(members(group, lang), n), lang) + end))


def letters(rng: random.Random, lang: str) -> Exchange:
    """Spelling, reversing, first and last letter, length of a short word."""
    words = phrases(f"ask_{lang}")
    kind = rng.choice(("spell", "reverse", "first_letter", "last_letter", "length"))
    limit = 5 if kind == "reverse" else 7
    column = COLUMN["ko"] if lang == "ko" and kind != "spell" else COLUMN["en"]
    pool = [r[column] for r in rows("words") if 2 <= len(r[column]) <= limit and " " not in r[column]]
    word = rng.choice(pool)
    if rng.random() < 0.4:
        made = invent.word(rng, lang if column == COLUMN["ko"] else "en")
        word = made if len(made) <= limit else word
    spelled = "-".join(word.upper())
    result = {
        "spell": spelled,
        "reverse": word[::-1],
        "first_letter": word[0],
        "last_letter": word[-1],
        "length": str(len(word)),
    }[kind]
    user = pick(rng, words[kind], word=word)
    answer = pick(rng, words[f"{kind}_answer"], word=word, result=result)
    if kind in ("reverse", "last_letter"):  # spelled first: letters are not seen inside a token
        answer = f"{spelled}\n{spelled[::-1]}\n{answer}" if kind == "reverse" else f"{spelled}\n{answer}"
    if kind == "length":  # counted aloud
        answer = ", ".join(f"{number} {letter}" for number, letter in enumerate(word.upper(), 1)) + f"\n{answer}"
    return Exchange(topic="letters", user=user, answer=answer, key=f"{kind}:{word}", expect=result)


def join(items: list[str], lang: str) -> str:
    """A list as the language writes it."""
    return "、".join(items) if lang == "zh" else ", ".join(items)


def sentence(text: str) -> str:
    """A first letter in upper case, for answers that open with a slot."""
    return text[:1].upper() + text[1:]
