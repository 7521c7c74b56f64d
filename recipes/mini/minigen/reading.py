"""Questions about a given text: extraction and sentiment; poems; going on with a story."""

import json
import random

from minigen import invent
from minigen.exchange import Exchange
from minigen.stories import cast
from minigen.templates import phrases, pick, rows
from minigen.words import COLUMN

NAMED_STARTS = 9  # how many of the story starts speak of the hero by name
EXTRACTED = {"en": ("name", "age", "city"), "zh": ("姓名", "年龄", "城市"), "ko": ("이름", "나이", "도시")}


def person(rng: random.Random, lang: str) -> dict[str, str]:
    """Somebody to write a sentence about."""
    jobs = [r[COLUMN[lang]] for r in rows("words") if r[0] == "job"][:12]
    city = invent.place(rng, lang) if rng.random() < 0.2 else rng.choice(rows("capitals"))[COLUMN[lang] + 2]
    return {"name": invent.person(rng, lang), "age": str(rng.randint(6, 80)), "city": city, "job": rng.choice(jobs)}


def extraction(rng: random.Random, lang: str) -> Exchange:
    """The name, age or city out of a sentence, or all three as JSON."""
    words, who = phrases(f"ask_{lang}"), person(rng, lang)
    text = pick(rng, words["extract_intro"], **who)
    kind = rng.choice(("name", "age", "city", "all"))
    user = pick(rng, words[f"extract_{kind}"], text=text)
    answer = who.get(kind, "")
    if kind == "all":
        values = (who["name"], int(who["age"]), who["city"])
        answer = json.dumps(dict(zip(EXTRACTED[lang], values, strict=True)), ensure_ascii=False)
    return Exchange(topic="extraction", user=user, answer=answer, key=":".join(who.values()), expect=answer)


def comprehension(rng: random.Random, lang: str) -> Exchange:
    """Who, where, what or which colour in a sentence."""
    words, story = phrases(f"ask_{lang}"), phrases(f"stories_{lang}")
    slots = {
        "name": invent.person(rng, lang),
        "color": rng.choice(story["colors"]),
        "thing": rng.choice(story["things"]),
        "city": rng.choice(rows("capitals"))[COLUMN[lang] + 2],
    }
    text = pick(rng, words["comprehension_text"], **slots)
    kind = rng.choice(list(slots))
    user = pick(rng, words[f"comprehension_{kind}"], text=text, **slots)
    answer = slots[kind]
    if lang == "ko" and kind == "color" and not answer.endswith(("색", "빛")):
        answer += "색"  # the stories use the form that stands before a noun
    return Exchange(topic="comprehension", user=user, answer=answer, key=text, expect=answer)


def sentiment(rng: random.Random, lang: str) -> Exchange:
    """Whether a short review is positive or negative."""
    words, side = phrases(f"ask_{lang}"), rng.choice(("positive", "negative"))
    text = pick(rng, words[f"{side}_text"])
    answer = words[side][0]
    return Exchange(
        topic="sentiment", user=pick(rng, words["sentiment"], text=text), answer=answer, key=text, expect=answer
    )


def poem(rng: random.Random, lang: str) -> Exchange:
    """A classical quatrain by title, by author or at will; its author; the line that follows."""
    words = phrases(f"ask_{lang}")
    title, author, first, second = rng.choice(rows("poems"))
    kind = rng.choice(("title", "title", "author", "random", "who", "next"))
    lines = [
        half.strip("，。") for half in (first + second).replace("，", "\n").replace("。", "\n").split("\n") if half
    ]
    index = rng.randrange(3)
    user = pick(rng, words[f"poem_{kind}"], title=title, author=author, line=lines[index])
    if kind == "who":
        answer, expect = pick(rng, words["poem_who_answer"], title=title, author=author), author
    elif kind == "next":
        # The poem's own mark: a comma after its first and third line.
        answer = expect = lines[index + 1]
        answer += "。" if index != 1 else "，"
    else:
        answer = expect = f"《{title}》\n{author}\n{first}\n{second}"
    exact = kind in ("title", "who", "next")
    return Exchange(topic="poem", user=user, answer=answer.rstrip("，"), expect=expect if exact else "")


def any_poem(rng: random.Random, lang: str) -> Exchange:
    """Some quatrain, whatever was asked."""
    title, author, first, second = rng.choice(rows("poems"))
    user = pick(rng, phrases(f"ask_{lang}")["poem_random"])
    return Exchange(
        topic="poem", user=user, answer=f"《{title}》\n{author}\n{first}\n{second}", value=f"{title}\t{author}"
    )


def continue_story(rng: random.Random, lang: str) -> Exchange:
    """An opening sentence, and two or three sentences that follow from it."""
    grammar, talk = phrases(f"stories_{lang}"), phrases(f"story_talk_{lang}")
    slots, joint = cast(rng, lang), "" if lang == "zh" else " "
    index = rng.randrange(len(talk["start"]))
    start = pick(rng, talk["start"][index], **slots)
    then = pick(rng, talk["then"][index], **slots)
    user = pick(rng, talk["ask"], start=start)
    # An ending speaks of the hero, so it fits only where the opening named one.
    ending = joint + pick(rng, grammar["ending"], **slots) if "{hero" in talk["start"][index] else ""
    return Exchange(topic="continue_story", user=user, answer=then + ending)


def tell_story(rng: random.Random, lang: str) -> Exchange:
    """A very short story on request, often about a wished animal or person."""
    grammar, talk = phrases(f"stories_{lang}"), phrases(f"story_talk_{lang}")
    slots, joint = cast(rng, lang), "" if lang == "zh" else " "
    # Later openings bring their own hero; only the first nine go with one who was named before.
    index = rng.randrange(NAMED_STARTS)
    wish = rng.choices(("animal", "person", "any"), (45, 25, 30))[0]
    if wish == "animal":
        user, opening = pick(rng, talk["tell_about"], **slots), pick(rng, talk["animal_opening"], **slots)
    else:
        ask = talk["tell_about_person"] if wish == "person" else talk["tell"]
        user, opening = pick(rng, ask, **slots), pick(rng, grammar["opening"], **slots)
    body = [pick(rng, talk[part][index], **slots) for part in ("start", "then")]
    answer = joint.join([opening, *body, pick(rng, grammar["ending"], **slots)])
    return Exchange(topic="tell_story", user=user, answer=answer, value=slots["hero"])
