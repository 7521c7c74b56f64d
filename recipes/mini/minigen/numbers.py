"""Questions with numbers: the four operations, counting, comparing, units, days and months."""

import random

from minigen import invent
from minigen.exchange import Exchange
from minigen.templates import phrases, pick

OPERATIONS = ("add", "subtract", "multiply", "divide")
SIGNS = {"add": "+", "subtract": "-", "multiply": "×", "divide": "÷"}


def compute(operation: str, a: int, b: int) -> int:
    """The exact result of one of the four operations."""
    if operation == "divide":
        assert a % b == 0, (a, b)
        return a // b
    return {"add": a + b, "subtract": a - b, "multiply": a * b}[operation]


def worked(operation: str, a: int, b: int) -> str:
    """A calculation up to its last equals sign; with two digits on both sides it goes by tens and ones.

    A small model cannot see a carry in advance, but it can write down the two easy steps.
    """
    text = f"{a} {SIGNS[operation]} {b}"
    tens, ones = b - b % 10, b % 10
    if operation == "multiply" and 10 < b < 20 and a > 1:
        return f"{text} = {a * 10} + {a * (b - 10)}"
    if a < 10 or max(a, b) > 99 or not tens or not ones or compute(operation, a, b) < 0:
        return text
    if operation == "add" and a % 10:
        return f"{text} = {a - a % 10 + tens} + {a % 10 + ones}"
    return f"{text} = {a - tens} - {ones}" if operation == "subtract" else text


def operands(rng: random.Random, operation: str) -> tuple[int, int]:
    """Two numbers inside the world of the model: sums and differences up to 100, the tables up to 12."""
    if operation == "add":
        a = rng.randint(0, 99)
        return a, rng.randint(0, 100 - a if rng.random() < 0.8 else 99)
    if operation == "subtract":
        a = rng.randint(1, 100)
        return a, rng.randint(0, a)
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    return (a, b) if operation == "multiply" else (a * b, b)


def arithmetic(rng: random.Random, lang: str) -> Exchange:
    """A bare calculation or one asked in words."""
    operation = rng.choice(OPERATIONS)
    a, b = operands(rng, operation)
    result, words = compute(operation, a, b), phrases(f"ask_{lang}")
    user = pick(rng, words[operation] + words["calculate"], a=a, b=b, formula=formula(rng, operation, a, b))
    answer = pick(rng, words["result"], formula=worked(operation, a, b), result=result)
    if operation == "divide":  # the product first: it tells whether something is left over
        answer = f"{b} × {result} = {a}\n{answer}"
    key = f"{operation}:{a}:{b}"
    return Exchange(topic="arithmetic", user=user, answer=answer, key=key, expect=f"= {result}", value=str(result))


def spoken(rng: random.Random, lang: str) -> Exchange:
    """A small calculation with its numbers in words."""
    operation = rng.choice(("add", "subtract", "multiply"))
    limit = 10 if operation == "multiply" else 20
    a, b = rng.randint(1, limit), rng.randint(1, limit)
    a, b = (max(a, b), min(a, b)) if operation == "subtract" else (a, b)
    words, result = phrases(f"ask_{lang}"), compute(operation, a, b)
    user = pick(rng, words[f"{operation}_words"], a=words["numerals"][a], b=words["numerals"][b])
    answer = pick(rng, words["result"], formula=worked(operation, a, b), result=result)
    return Exchange(topic="spoken", user=user, answer=answer, key=f"{operation}:{a}:{b}", expect=str(result))


def beyond(rng: random.Random, lang: str) -> Exchange:
    """What the four operations also give: a remainder, a number below zero, round hundreds, or too large a number."""
    words, kind = phrases(f"ask_{lang}"), rng.choice(("remainder", "negative", "hundreds", "too_large"))
    if kind == "remainder":
        operation, b = "divide", rng.randint(2, 10)
        a = b * rng.randint(1, 9) + rng.randint(1, b - 1)
        text = f"{a} ÷ {b} = {a // b}"
        work = f"{b} × {a // b} = {a - a % b}, {a} - {a - a % b} = {a % b}"
        answer, expect = f"{work}\n{pick(rng, words['remainder'], formula=text, rest=a % b)}", text
    elif kind == "too_large":
        operation = rng.choice(("add", "subtract", "multiply"))
        b, a = sorted(rng.randint(120, 99_999) for _ in range(2))
        answer, expect = pick(rng, words["too_large"]), ""
    else:
        operation = "subtract" if kind == "negative" else rng.choice(("add", "subtract"))
        b, a = sorted(rng.sample(range(1, 21), 2)) if kind == "negative" else sorted(rng.choices(range(1, 10), k=2))
        a, b = (b, a) if kind == "negative" else (100 * a, 100 * b)
        expect = str(compute(operation, a, b))
        answer = pick(rng, words["result"], formula=f"{a} {SIGNS[operation]} {b}", result=expect)
        if kind == "negative":
            answer = f"{a} < {b}, {b} - {a} = {b - a}\n{answer}"
    user = pick(rng, words[operation][:2] + words["calculate"], a=a, b=b, formula=formula(rng, operation, a, b))
    return Exchange(topic="beyond", user=user, answer=answer, key=f"{operation}:{a}:{b}", expect=expect)


def formula(rng: random.Random, operation: str, a: int, b: int) -> str:
    """The calculation as people type it."""
    sign = {"multiply": rng.choice("×*x"), "divide": rng.choice("÷/")}.get(operation, SIGNS[operation])
    space = rng.choice((" ", " ", ""))
    return f"{a}{space}{sign}{space}{b}"


def word_problem(rng: random.Random, lang: str) -> Exchange:
    """A short story with a sum or a difference."""
    operation = rng.choice(("add", "subtract"))
    a = rng.randint(2, 30)
    b = rng.randint(1, a - 1) if operation == "subtract" else rng.randint(1, 30)
    words, result = phrases(f"ask_{lang}"), compute(operation, a, b)
    name, thing = invent.person(rng, lang), rng.choice(words["countable"])
    user = pick(rng, words[f"problem_{operation}"], a=a, b=b, name=name, thing=thing)
    text = f"{worked(operation, a, b)} = {result}"
    answer = pick(rng, words["problem_answer"], formula=text, result=result, name=name, thing=thing)
    return Exchange(topic="word_problem", user=user, answer=answer, key=f"{operation}:{a}:{b}", expect=str(result))


def counting(rng: random.Random, lang: str) -> Exchange:
    """Counting up, down or in steps, and the number before or after another."""
    words, kind = phrases(f"ask_{lang}"), rng.choice(("up", "down", "next", "before", "even", "odd", "sequence"))
    n = rng.randint(1, 99)
    if kind in ("next", "before"):
        result = n + 1 if kind == "next" else n - 1
        answer = f"{n - 1}, {n}, {n + 1}\n{pick(rng, words[f'{kind}_answer'], n=n, result=result)}"
        user = pick(rng, words[kind], n=n)
        return Exchange(
            topic="counting", user=user, answer=answer, key=f"{kind}:{n}", expect=str(result), value=str(result)
        )
    if kind == "sequence":
        step, start = rng.choice((1, 2, 3, 5, 10)), rng.randint(0, 40)
        shown = ", ".join(str(start + i * step) for i in range(4))
        result = start + 4 * step
        last = start + 3 * step
        work = f"{start + step} - {start} = {step}, {last} + {step} = {result}"
        answer = f"{work}\n{pick(rng, words['sequence_answer'], result=result)}"
        user = pick(rng, words["sequence"], shown=shown)
        return Exchange(topic="counting", user=user, answer=answer, key=f"sequence:{start}:{step}", expect=str(result))
    start, count = rng.choice((1, rng.randint(2, 12), rng.randint(2, 90))), rng.randint(3, 12)
    if kind in ("even", "odd"):
        last = rng.choice((10, 20))
        series = list(range(2 if kind == "even" else 1, last + 1, 2))
        user = pick(rng, words[kind], last=last)
    else:
        series = list(range(start, start + count))
        series = series if kind == "up" else series[::-1]
        user = pick(rng, words["count"], first=series[0], last=series[-1])
    answer = ", ".join(map(str, series)) + pick(rng, words["stop"])
    if kind in ("up", "down"):  # the direction is decided once
        answer = f"{series[0]} {'<' if kind == 'up' else '>'} {series[-1]}\n{answer}"
    key = f"{kind}:{series[0]}:{series[-1]}"
    return Exchange(topic="counting", user=user, answer=answer, key=key, expect=", ".join(map(str, series)))


def comparing(rng: random.Random, lang: str) -> Exchange:
    """Which of two numbers is larger or smaller; even or odd; the largest of three."""
    words, kind = phrases(f"ask_{lang}"), rng.choice(("larger", "smaller", "parity", "largest", "smallest"))
    numbers = rng.sample(range(1, 100), 3)
    a, b, c = numbers
    if kind == "parity":
        side = "even" if a % 2 == 0 else "odd"
        answer = pick(rng, words[f"is_{side}"], n=a)
        return Exchange(
            topic="comparing", user=pick(rng, words["parity"], n=a), answer=answer, key=f"parity:{a}", expect=answer
        )
    best = {"larger": max(a, b), "smaller": min(a, b), "largest": max(numbers), "smallest": min(numbers)}[kind]
    other = a + b - best if kind in ("larger", "smaller") else 0
    answer = pick(rng, words[f"{kind}_answer"], result=best, other=other)
    work = compared(a, b)
    if not other:  # the winner of the first two against the third
        work += f", {compared(max(a, b) if kind == 'largest' else min(a, b), c)}"
    answer = f"{work}\n{answer}"
    user = pick(rng, words[kind], a=a, b=b, c=c)
    return Exchange(
        topic="comparing", user=user, answer=answer, key=f"{kind}:{a}:{b}", expect=str(best), value=str(best)
    )


def compared(a: int, b: int) -> str:
    """Two different numbers with the sign between them."""
    return f"{a} {'<' if a < b else '>'} {b}"


def units(rng: random.Random, lang: str) -> Exchange:
    """Whole-number conversions such as metres to centimetres."""
    words = phrases(f"ask_{lang}")
    large, small, factor = rng.choice(words["units"]).split(",")
    n = rng.randint(1, 12)
    source, target, given, value = large, small, n, n * int(factor)
    if rng.random() < 0.25:
        source, target, given, value = small, large, value, n
    shown, result = quantity(given, source, lang), quantity(value, target, lang)
    user = pick(rng, words["convert"], n=given, source=source, target=target, shown=shown)
    tens, ones = int(factor) // 10 * 10, int(factor) % 10
    steps = f" = {n * tens} + {n * ones}" if given == n > 1 and tens and ones else ""
    work = f"{given} {'×' if given == n else '÷'} {factor}{steps} = {value}"
    answer = f"{work}\n{pick(rng, words['convert_answer'], shown=shown, result=result)}"
    if lang == "ko":
        user, answer = user.replace("몇 일", "며칠"), answer.replace("몇 일", "며칠")
    return Exchange(topic="units", user=user, answer=answer, key=f"{given}:{source}:{target}", expect=str(value))


def quantity(value: int, unit: str, lang: str) -> str:
    """A number with its unit, as the language writes it."""
    if lang != "en":
        return f"{value}{unit}"
    return f"{value} {singular(unit) if value == 1 else unit}"


def singular(unit: str) -> str:
    """An English unit for one of it."""
    return {"feet": "foot", "inches": "inch", "centuries": "century"}.get(unit, unit.removesuffix("s"))


def calendar(rng: random.Random, lang: str) -> Exchange:
    """Days of the week and months: next, before, order, how many."""
    words = phrases(f"ask_{lang}")
    kind = rng.choice(("day", "month"))
    names, direction = words[f"{kind}s"], rng.choice(("after", "before"))
    index = rng.randrange(len(names))
    result = names[(index + (1 if direction == "after" else -1)) % len(names)]
    user = pick(rng, words[f"{kind}_{direction}"], name=names[index])
    # The three in a row first: they are the same whichever side is asked for.
    row = " → ".join(names[(index + i) % len(names)] for i in (-1, 0, 1))
    answer = f"{row}\n{pick(rng, words[f'{kind}_{direction}_answer'], name=names[index], result=result)}"
    return Exchange(topic="calendar", user=user, answer=answer, expect=result, value=result)
