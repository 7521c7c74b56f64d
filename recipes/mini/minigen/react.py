"""Tool calls in the ReAct form of the first Qwen chat models, and in the <tool_call> form of the later ones.

kiloq's own chat code writes the text of both.
"""

import json
import random
import zlib

from kiloq.chat import hermes, parse_messages, parse_tools
from kiloq.chat.react import compose
from minigen import invent, numbers, words
from minigen.exchange import HELDOUT_ONE_IN, Message, Sample
from minigen.templates import LANGUAGES, phrases, pick, rows, talk_section
from minigen.words import COLUMN

Call = tuple[str, dict[str, object], str, str]  # question, arguments, observation, final answer


def react(rng: random.Random, lang: str) -> Sample:
    """A question with tools at hand: a call, a call that is answered, a second call, or an answer without any."""
    names = rng.sample(sorted(CALLS), rng.choices((1, 2, 3), (40, 42, 18))[0])
    kind = rng.choices(("call", "answered", "follow", "direct"), (34, 32, 22, 12))[0]
    used = rng.choice(("get_weather", "get_time")) if kind == "follow" else names[0]
    names = list(dict.fromkeys([used, *names]))[:3]
    rng.shuffle(names)
    tools = [tool(rng, lang, name) for name in names]
    if kind == "direct":
        question, answer = _direct(rng, lang)
        messages: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Sample(topic="react/direct", lang=lang, messages=messages, tools=tools)
    question, arguments, observation, final = CALLS[used](rng, lang)
    messages = [{"role": "user", "content": question}, _call(rng, lang, used, arguments)]
    if kind != "call":
        messages.append({"role": "tool", "content": observation, "tool_call_id": "call_0"})
        messages.append({"role": "assistant", "content": final})
    if kind == "follow":
        city = _city(rng, lang)
        arguments = {"city": city}
        messages.append({"role": "user", "content": pick(rng, phrases(f"tools_{lang}")["and_city"], city=city)})
        messages.append(_call(rng, lang, used, arguments))
    written = json.dumps(arguments, ensure_ascii=False)
    held = zlib.crc32(f"{used}:{written}".encode()) % HELDOUT_ONE_IN == 0
    expect = _told(arguments, observation) if kind == "answered" else f"{used} {written}"
    return Sample(topic=f"react/{kind}", lang=lang, messages=messages, tools=tools, expect=expect, heldout=held)


def tool_call(rng: random.Random, lang: str) -> Sample:
    """The same in the <tool_call> form, as the plain turns that a chatml prompt of Qwen2.5 has."""
    sample = react(rng, lang)
    while len(sample.tools) > 2:  # three declarations leave too little of the trained length
        sample = react(rng, lang)
    messages, tools = parse_messages(sample.messages), parse_tools(sample.tools)
    turns = hermes.compose(messages, tools, default_system=None, thinking="none")
    plain: list[Message] = [{"role": t.role, "content": "".join(part.text for part in t.parts)} for t in turns]
    kind, expect = sample.topic.split("/")[1], sample.expect
    if kind in ("call", "follow"):
        name, written = expect.split(" ", 1)
        expect = f'{{"name": "{name}", "arguments": {written}}}'
    return Sample(topic=f"tool_call/{kind}", lang=lang, messages=plain, expect=expect, heldout=sample.heldout)


def _told(arguments: dict[str, object], observation: str) -> str:
    """What the final answer must say: the result, or what was done."""
    if observation == "OK":
        return str(next(iter(arguments.values())))
    return str(json.loads(observation)["temperature"]) if observation.startswith("{") else observation


def _call(rng: random.Random, lang: str, used: str, arguments: dict[str, object]) -> Message:
    function = {"name": used, "arguments": json.dumps(arguments, ensure_ascii=False)}
    thought = pick(rng, phrases(f"tools_{lang}")["thought"], tool=used)
    call = {"id": "call_0", "type": "function", "function": function}
    return {"role": "assistant", "content": thought, "tool_calls": [call]}


def tool(rng: random.Random, lang: str, name: str) -> dict[str, object]:
    """A tool's declaration: its description in the language of the question, or in English."""
    description = rng.choice(phrases(f"tools_{rng.choice((lang, lang, 'en'))}")[f"{name}_description"])
    properties = {parameter: {"type": "string"} for parameter in PARAMETERS[name]}
    schema = {"type": "object", "properties": properties, "required": list(PARAMETERS[name])}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def rendered(sample: Sample) -> list[tuple[str, str]]:
    """(role, text) of each turn as kiloq's own v1 prompt writes it."""
    messages, tools = parse_messages(sample.messages), parse_tools(sample.tools)
    turns = compose(messages, tools, default_system=None, thinking="none")
    return [(turn.role, "".join(part.text for part in turn.parts)) for turn in turns]


def calculator(rng: random.Random, lang: str) -> Call:
    """Numbers too large for the model itself."""
    operation = rng.choice(("add", "subtract", "multiply"))
    a, b = rng.randint(10, 9999), rng.randint(10, 999)
    a, b = max(a, b), min(a, b)
    ask = phrases(f"ask_{lang}")
    if rng.random() < 0.3:  # several steps
        c, d = rng.randint(2, 99), rng.randint(2, 99)
        written, value = rng.choice((
            (f"{a} * {c} + {d}", a * c + d), (f"{a} + {b} + {c}", a + b + c),
            (f"{a} + {b} - {d}", a + b - d),
        ))  # fmt: skip
        final = pick(rng, ask["result"], formula=written, result=value)
        return pick(rng, ask["calculate"], formula=written), {"expression": written}, str(value), final
    sign = {"add": "+", "subtract": "-", "multiply": "*"}[operation]
    result = numbers.compute(operation, a, b)
    question = pick(rng, ask[operation][:2] + ask["calculate"], a=a, b=b, formula=f"{a} {sign} {b}")
    final = pick(rng, ask["result"], formula=f"{a} {sign} {b}", result=result)
    return question, {"expression": f"{a} {sign} {b}"}, str(result), final


def weather(rng: random.Random, lang: str) -> Call:
    """The weather of a city."""
    text = phrases(f"tools_{lang}")
    city = _city(rng, lang)
    sky, degrees = rng.choice(text["skies"]), rng.randint(-5, 35)
    question = pick(rng, text["weather_ask"], city=city)
    final = pick(rng, text["weather_final"], city=city, sky=sky, degrees=degrees)
    observation = json.dumps({"city": city, "weather": sky, "temperature": degrees}, ensure_ascii=False)
    return question, {"city": city}, observation, final


def translate(rng: random.Random, lang: str) -> Call:
    """A text into another language."""
    entry = words.translatable(rng)
    other = rng.choice([x for x in LANGUAGES if x != lang])
    source, result = entry[LANGUAGES.index(lang)].rstrip("?？"), entry[LANGUAGES.index(other)]
    ask = phrases(f"ask_{lang}")
    target = ask[f"language_{other}"][0]
    question = pick(rng, ask["translate"], word=source, target=target)
    final = pick(rng, ask["translate_answer"], word=source, target=target, result=result)
    return question, {"text": source, "target": target}, result, final


def _city(rng: random.Random, lang: str) -> str:
    """A capital, or in one case of four a town that does not exist."""
    return invent.place(rng, lang) if rng.random() < 0.25 else rng.choice(rows("capitals"))[COLUMN[lang] + 2]


def clock(rng: random.Random, lang: str) -> Call:
    """The time in a city."""
    text = phrases(f"tools_{lang}")
    city = _city(rng, lang)
    time = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    return (
        pick(rng, text["clock_ask"], city=city),
        {"city": city},
        time,
        pick(rng, text["clock_final"], city=city, time=time),
    )


def search(rng: random.Random, lang: str) -> Call:
    """Something to look up."""
    text = phrases(f"tools_{lang}")
    query, found = rng.choice(text["searches"]).split("=")
    if rng.random() < 0.5:  # what nobody knows by heart has to be copied
        query, found = invent.anything(rng, lang), invent.anything(rng, lang)
    return pick(rng, text["search_ask"], query=query), {"query": query}, found, found


def alarm(rng: random.Random, lang: str) -> Call:
    """An alarm at a time."""
    text = phrases(f"tools_{lang}")
    time = f"{rng.randint(5, 22):02d}:{rng.choice((0, 10, 15, 20, 30, 40, 45, 50)):02d}"
    return pick(rng, text["alarm_ask"], time=time), {"time": time}, "OK", pick(rng, text["alarm_final"], time=time)


def message(rng: random.Random, lang: str) -> Call:
    """A message to somebody."""
    text = phrases(f"tools_{lang}")
    name, content = invent.person(rng, lang), rng.choice((rng.choice(text["contents"]), invent.anything(rng, lang)))
    question = pick(rng, text["message_ask"], name=name, content=content)
    return question, {"to": name, "content": content}, "OK", pick(rng, text["message_final"], name=name)


CALLS = {
    "calculator": calculator,
    "get_weather": weather,
    "translate": translate,
    "get_time": clock,
    "search": search,
    "set_alarm": alarm,
    "send_message": message,
}
PARAMETERS = {
    "calculator": ("expression",),
    "get_weather": ("city",),
    "translate": ("text", "target"),
    "get_time": ("city",),
    "search": ("query",),
    "set_alarm": ("time",),
    "send_message": ("to", "content"),
}


def _direct(rng: random.Random, lang: str) -> tuple[str, str]:
    """Small talk that needs no tool."""
    section = rng.choice(("greeting", "thanks", "who", "name", "how_are_you", "bye", "praise", "joke", "ability"))
    ask, answer = talk_section(lang, section)
    return pick(rng, ask), pick(rng, answer)
