"""Simple stories from a grammar: somebody, a wish or a problem, help, an ending."""

import random

from minigen import invent
from minigen.templates import particle, phrases, pick

KIDS = {
    "en": {"he": "boy", "she": "girl"},
    "zh": {"he": "小男孩", "she": "小女孩"},
    "ko": {"he": "소년", "she": "소녀"},
}
PRONOUNS = {
    ("en", "he"): ("he", "his", "him"),
    ("en", "she"): ("she", "her", "her"),
    ("zh", "he"): ("他", "他的", "他"),
    ("zh", "she"): ("她", "她的", "她"),
    ("ko", "he"): ("그", "그의", "그를"),
    ("ko", "she"): ("그녀", "그녀의", "그녀를"),
}
LISTS = ("thing", "color", "job", "fruit", "place")


def story(rng: random.Random, lang: str) -> str:
    """A whole story of about 100 to 250 words."""
    grammar = phrases(f"stories_{lang}")
    slots = cast(rng, lang)
    plots = rng.sample(grammar["plots"], 2 if rng.random() < 0.15 else 1)
    parts = [pick(rng, grammar["opening"], **slots)]
    parts += [pick(rng, detail, **slots) for detail in rng.sample(grammar["detail"], rng.choice((0, 1, 1, 2)))]
    if rng.random() < 0.5:
        parts.append(pick(rng, grammar["weather"], **slots))
    body = [pick(rng, plot, **slots) for plot in plots]
    ending = pick(rng, grammar["ending"], **slots)
    joint = "" if lang == "zh" else " "
    opening = joint.join(parts)
    if rng.random() < 0.6:
        return "\n\n".join([opening, *body, ending])
    return joint.join([opening, *body, ending])


def cast(rng: random.Random, lang: str) -> dict[str, str]:
    """Who and what a story is about; every slot of the grammar."""
    grammar = phrases(f"stories_{lang}")
    sex = rng.choice(("he", "she"))
    hero, friend = rng.sample(grammar["names_he"] + grammar["names_she"], 2)
    hero = rng.choice([n for n in grammar[f"names_{sex}"] if n != friend])
    if rng.random() < 0.35:
        made = invent.person(rng, lang)
        # The Korean grammar writes the particles of a name that ends in a vowel.
        hero = made if lang != "ko" or particle(made, "은/는") == "는" else hero
    animal, other = rng.sample(grammar["animals"], 2)
    slots = {name: rng.choice(grammar[f"{name}s"]) for name in LISTS}
    he, his, him = PRONOUNS[lang, sex]
    human = rng.random() < 0.6
    small_animal = f"小{animal}" if lang == "zh" else animal
    slots |= {"hero": hero, "friend": friend, "animal": animal, "animal2": other, "kid": KIDS[lang][sex]}
    slots |= {"who": KIDS[lang][sex] if human else small_animal, "one": "一个" if human else "一只"}
    return slots | {"he": he, "his": his, "him": him, "He": he.capitalize(), "His": his.capitalize()}
