"""How people really type: no capitals, no full stop, doubled marks, a polite word more or less."""

import random
import re
from dataclasses import replace

from minigen.exchange import Exchange

POLITE = {
    "en": (
        ("Please ", ""),
        ("Hi, ", ""),
        ("Hey, ", ""),
        ("", ", thanks"),
        ("", ", please"),
        ("Ok, ", ""),
        ("So, ", ""),
        ("Excuse me, ", ""),
    ),
    "zh": (
        ("请问，", ""),
        ("你好，", ""),
        ("", "谢谢！"),
        ("麻烦问一下，", ""),
        ("那", ""),
        ("嗯，", ""),
        ("我想问一下，", ""),
    ),
    "ko": (
        ("저기요, ", ""),
        ("안녕하세요. ", ""),
        ("", " 감사합니다."),
        ("혹시 ", ""),
        ("그럼 ", ""),
        ("음, ", ""),
        ("질문이요. ", ""),
    ),
}
# Questions that a polite word may come before or after; others are small talk, or quote a text.
POLITE_TOPICS = (
    "arithmetic", "spoken", "word_problem", "counting", "comparing", "units", "calendar", "capital", "capital_of",
    "opposite", "translation", "category", "odd_one", "example", "fact", "sorting", "adding_up", "unknown",
)  # fmt: skip


def roughen(rng: random.Random, lang: str, exchange: Exchange) -> Exchange:
    """The same question as somebody else would have typed it; its key, and so its side of the split, stays."""
    if rng.random() < 0.45:
        return exchange
    text = exchange.user.strip()
    if exchange.topic in POLITE_TOPICS and rng.random() < 0.3:
        before, after = rng.choice(POLITE[lang])
        if before:
            text = before + (_lower_first(text) if lang == "en" else text)
        elif after:
            text = (text.rstrip(".?!") if lang == "en" else text) + after
    if rng.random() < 0.3:
        text = re.sub(r"[.?!。？！]$", "", text)
    elif rng.random() < 0.1:
        text = re.sub(r"([?!？！])$", r"\1\1", text)
    elif lang == "zh" and rng.random() < 0.2:
        text = text.replace("？", "?").replace("！", "!").replace("，", ",")
    if lang == "en" and exchange.topic not in ("letters", "copy", "extraction", "memory") and rng.random() < 0.25:
        text = text.lower()
    if lang == "en" and rng.random() < 0.1:
        text = (
            text.replace("What's", "Whats")
            .replace("I'm", "Im")
            .replace("don't", "dont")
            .replace("you", "u" if rng.random() < 0.2 else "you")
        )
    return replace(exchange, user=text.strip() or exchange.user, key=exchange.key or exchange.user)


def _lower_first(text: str) -> str:
    return text if text[:2] in ("I ", "I'") or text[1:2].isupper() else text[:1].lower() + text[1:]
