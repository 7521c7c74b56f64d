"""Drills: short tables of facts as a school book prints them, for pre-training."""

import random

from minigen import invent
from minigen.exchange import Exchange
from minigen.numbers import OPERATIONS, compute, operands, worked
from minigen.templates import LANGUAGES, phrases, pick, rows
from minigen.words import COLUMN, group_name, join, members


def drill(rng: random.Random, lang: str) -> str:
    """One page of one kind of drill."""
    return rng.choice(PAGES)(rng, lang)


def sums(rng: random.Random, lang: str) -> str:
    """Calculations of the training side, one a line."""
    lines: list[str] = []
    while len(lines) < rng.randint(8, 20):
        operation = rng.choice(OPERATIONS)
        a, b = operands(rng, operation)
        result = str(compute(operation, a, b))
        if not Exchange(topic="", user="", answer="", key=f"{operation}:{a}:{b}", expect=result).heldout:
            lines.append(f"{worked(operation, a, b)} = {result}")
    return "\n".join(lines)


def table(rng: random.Random, lang: str) -> str:
    """A multiplication table."""
    n = rng.randint(1, 12)
    products = [(m, n * m) for m in range(1, 13)]
    known = [
        f"{n} × {m} = {p}"
        for m, p in products
        if not Exchange(topic="", user="", answer="", key=f"multiply:{n}:{m}", expect=str(p)).heldout
    ]
    return "\n".join(known)


def capitals(rng: random.Random, lang: str) -> str:
    """Countries and their capitals in sentences."""
    offset = LANGUAGES.index(lang)
    chosen = rng.sample(rows("capitals"), rng.randint(4, 10))
    ask = phrases(f"ask_{lang}")["capital_answer"][:2]
    lines = [pick(rng, ask, country=r[offset], capital=r[offset + 3]) for r in chosen]
    return "\n".join(line[:1].upper() + line[1:] for line in lines)


def vocabulary(rng: random.Random, lang: str) -> str:
    """Words in the three languages, the page's own language first."""
    group = rng.choice(rows("words"))[0]
    chosen = [r for r in rows("words") if r[0] == group]
    order = [lang, *rng.sample([x for x in LANGUAGES if x != lang], 2)]
    rng.shuffle(chosen)
    return "\n".join(" = ".join(r[COLUMN[x]] for x in order) for r in chosen[: rng.randint(6, 16)])


def sentences(rng: random.Random, lang: str) -> str:
    """Short phrases in the three languages."""
    order = [lang, *rng.sample([x for x in LANGUAGES if x != lang], 2)]
    chosen = rng.sample(rows("phrases"), rng.randint(5, 10))
    return "\n".join(" = ".join(r[LANGUAGES.index(x)] for x in order) for r in chosen)


def opposites(rng: random.Random, lang: str) -> str:
    """Words and their opposites."""
    offset = 2 * LANGUAGES.index(lang)
    chosen = rng.sample(rows("opposites"), rng.randint(6, 12))
    return "\n".join(" - ".join(rng.sample([r[offset], r[offset + 1]], 2)) for r in chosen)


def groups(rng: random.Random, lang: str) -> str:
    """What belongs to a group."""
    lines = []
    for row in rng.sample(rows("groups"), 4):
        shown = rng.sample(members(row[0], lang), 5)
        lines.append(f"{group_name(row[0], lang, many=True)}: {join(shown, lang)}")
    return "\n".join(lines)


def counting(rng: random.Random, lang: str) -> str:
    """Counting in steps."""
    start, step = rng.randint(0, 50), rng.choice((1, 1, 1, 2, 3, 5, 10))
    return ", ".join(str(start + i * step) for i in range(rng.randint(8, 20)))


def sorted_lists(rng: random.Random, lang: str) -> str:
    """Lists of numbers and the same in order, up or down."""
    lines, down = [], rng.random() < 0.5
    while len(lines) < 8:
        numbers = rng.sample(range(1, 100), rng.randint(2, 5))
        shown, ordered = (", ".join(map(str, x)) for x in (numbers, sorted(numbers, reverse=down)))
        if not Exchange(topic="", user="", answer="", key=shown, expect=ordered).heldout:
            lines.append(f"{shown} → {ordered}")
    return "\n".join(lines)


def compared(rng: random.Random, lang: str) -> str:
    """Pairs of numbers with the sign between them."""
    pairs = [rng.sample(range(1, 100), 2) for _ in range(12)]
    return "\n".join(f"{a} {'<' if a < b else '>'} {b}" for a, b in pairs)


def spelled(rng: random.Random, lang: str) -> str:
    """Words letter by letter, and how many letters they have."""
    column = COLUMN[rng.choice((lang, "en"))]
    lines = []
    for _ in range(10):
        word = rng.choice(rows("words"))[column] if rng.random() < 0.7 else invent.word(rng, lang)
        lines.append(f"{word}: {'-'.join(word.upper())}: {len(word)}")
    return "\n".join(lines)


def copied(rng: random.Random, lang: str) -> str:
    """Strange words, names and codes, each written again, or a line of them and one asked for by its place."""
    if rng.random() < 0.5:
        return "\n".join(f"{text} = {text}" for text in (invent.anything(rng, lang) for _ in range(10)))
    lines = []
    for _ in range(6):
        items = [invent.word(rng, lang) for _ in range(rng.randint(2, 5))]
        at = rng.randrange(len(items))
        lines.append(f"{join(items, lang)}: {at + 1} = {items[at]}")
    return "\n".join(lines)


def registers(rng: random.Random, lang: str) -> str:
    """A list of people with a number or a town each, and some of them asked for again."""
    known = {
        invent.person(rng, lang): rng.choice((invent.code(rng), invent.place(rng, lang), invent.word(rng, lang)))
        for _ in range(rng.randint(3, 6))
    }
    lines = [f"{who}: {value}" for who, value in known.items()]
    asked = [f"{who}? {known[who]}" for who in rng.sample(list(known), len(known))]
    return "\n".join(lines + asked)


def sorts(rng: random.Random, lang: str) -> str:
    """Words and the groups they belong to."""
    lines = []
    for _ in range(12):
        group = rng.choice(rows("groups"))[0]
        lines.append(f"{rng.choice(members(group, lang))}: {group_name(group, lang, many=True)}")
    return "\n".join(lines)


def days(rng: random.Random, lang: str) -> str:
    """Days of the week or months in a row, from anywhere."""
    names = phrases(f"ask_{lang}")[rng.choice(("days", "months"))]
    start = rng.randrange(len(names))
    return " → ".join(names[(start + i) % len(names)] for i in range(rng.randint(3, len(names))))


PAGES = (
    sums, sums, sums, table, capitals, vocabulary, vocabulary, vocabulary, sentences, opposites, groups, counting,
    sorted_lists, sorted_lists, compared, spelled, spelled, copied, copied, copied, registers, registers, sorts, days,
)  # fmt: skip
