"""Constraints: an answer matches what was asked of its form, whatever the model, and nothing else changes."""

import contextlib
import datetime
import json
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq.engine import Engine, EngineConfig
from kiloq.engine.params import Constraint, SamplingParams
from kiloq.errors import RequestError
from kiloq.tokenizer.vocabulary import IM_END

SCHEMAS = {
    "enum": {"enum": ["red", "grün", 7, None, True, 'q"\\']},
    "nested": {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "bounded array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False, "minItems": 2},
    "integers": {"type": "integer", "minimum": -12, "exclusiveMaximum": 40},
    "numbers": {"type": "number", "minimum": 0.5, "maximum": 2.25},
    "multiple": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 7},
    "date": {"type": "string", "format": "date"},
    "unicode": {"type": "string", "minLength": 3, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[가-힣]{2,3}-[0-9]+$", "maxLength": 9},
    "refs": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "object", "required": ["x"], "maxProperties": 1}]},
    "optional": {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
        "additionalProperties": False,
    },
    "true": True,
}


def answers(lab, engine: Engine, params: SamplingParams, *, prompt: int = 0) -> list[tuple[str, str]]:
    """Text and reason of each answer."""
    engine.add(lab.ids(9, seed=prompt), params, request_id="r")
    told = lab.run(engine)
    engine.check_integrity()
    return [
        ("".join(event.text for event in events), str(events[-1].finish_reason)) for _, events in sorted(told.items())
    ]


def held(kind: str, source: str = "", **more: object) -> SamplingParams:
    wishes = {"max_tokens": 150, "seed": 5, "skip_special": False, **more}
    return SamplingParams(constraint=Constraint(kind, source), **wishes)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_whole_answer_is_valid_for_its_schema(lab, name, temperature):
    schema = SCHEMAS[name]
    stop = lab.tokenizer().im_end_id
    params = held("json_schema", json.dumps(schema), temperature=temperature, n=8, stop_ids=(stop,), skip_special=True)
    whole = 0
    for text, reason in answers(lab, lab.engine(), params):
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
            whole += 1
        else:
            assert reason == "length"
    assert whole or temperature == 0 or name == "refs"


def test_a_json_object_is_one(lab):
    ended = [text for text, reason in answers(lab, lab.engine(), held("json_object", n=16)) if reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_a_regular_expression_matches_the_whole_answer(lab):
    pattern = r"(ab|[0-9]{2,4}|é+)x?"
    found = answers(lab, lab.engine(), held("regex", pattern, n=16))
    assert all(re.fullmatch(pattern, text) for text, reason in found if reason == "stop")
    assert any(reason == "stop" for _, reason in found)


@pytest.mark.parametrize("text", ['a"b\\c\n\t/#', "\x01\x7f", "é中文🎉 ", "<tool_call>\n{}", "/*", "x" * 140])
def test_a_choice_of_one_is_recited(lab, text):
    assert answers(lab, lab.engine(), held("choice", json.dumps([text]), temperature=1.0)) == [(text, "stop")]


def test_all_choices_are_drawn_and_nothing_else(lab):
    words = ["yes", "no", "yesterday", "not"]
    params = held("choice", json.dumps(words), temperature=2.0, n=128, stop_ids=(lab.tokenizer().im_end_id,))
    assert {text for text, _ in answers(lab, lab.engine(), params)} == set(words)


def test_a_grammar_may_name_a_control_token_and_text_never_becomes_one(lab):
    grammar = f'start: "a" {IM_END} "b"'
    assert answers(lab, lab.engine(), held("lark", grammar)) == [(f"a{IM_END}b", "stop")]
    assert answers(lab, lab.engine(), held("choice", json.dumps([IM_END]))) == [(IM_END, "stop")]
    engine = lab.engine()
    engine.add([1], held("choice", json.dumps([IM_END])))
    ids = [token_id for events in lab.run(engine).values() for event in events for token_id in event.token_ids]
    assert lab.tokenizer().im_end_id not in ids


def test_stop_ids_come_only_where_the_constraint_lets_an_answer_end(lab):
    stop = lab.tokenizer().im_end_id
    pushed = {"logit_bias": {stop: 100.0}, "stop_ids": (stop,)}
    assert answers(lab, lab.engine(), held("regex", "[ab]{3,5}", n=4, **pushed)) == [
        (text, "stop") for text, _ in answers(lab, lab.engine(), held("regex", "[ab]{3,3}", n=4))
    ]


def test_what_can_go_on_goes_on_where_nothing_may_end_it(lab):
    assert answers(lab, lab.engine(), held("regex", "a*", max_tokens=12)) == [("a" * 12, "length")]


def test_a_stop_string_ends_a_constrained_answer(lab):
    assert answers(lab, lab.engine(), held("choice", '["one, two"]', stop=(",",))) == [("one", "stop")]


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("regex", "a(", "unclosed group"),
        ("lark", "start: foo", "foo"),
        ("lark", "", "Empty"),
        ("json_schema", '{"type": "objectt"}', "objectt"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", "false", "false"),
        ("json_schema", '{"enum": []}', "empty"),
        ("json_schema", '{"$ref": "http://127.0.0.1/x"}', "http://127.0.0.1/x"),
        ("lark", f"start: {IM_END}", "no token"),  # it ends the answer, so it is no part of one
        ("choice", '[""]', "nothing ends"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_by_what_is_wrong(lab, kind, source, said):
    engine = lab.engine()
    with pytest.raises(RequestError, match=re.escape(said)):
        engine.add([1], held(kind, source, stop_ids=(lab.tokenizer().im_end_id,) if IM_END in source else ()))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("kind", "source"),
    [("json_schema", "{"), ("json_schema", "3"), ("choice", "[]"), ("choice", "[1]"), ("choice", '"a"'), ("glob", "*")],
)
def test_a_constraint_is_checked_when_it_is_made(kind, source):
    with pytest.raises(RequestError):
        Constraint(kind, source)


def test_a_constraint_needs_a_tokenizer(lab):
    engine = Engine(lab.model(), EngineConfig())
    with pytest.raises(RequestError, match="tokenizer"):
        engine.add([1], held("json_object"))


def test_a_request_without_a_constraint_draws_the_same_beside_one_that_has_one(lab):
    free = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    alone, beside = lab.engine(), lab.engine()
    for engine in (alone, beside):
        engine.add(lab.ids(7), free, request_id="free")
    beside.add(lab.ids(7), held("json_schema", json.dumps(SCHEMAS["date"])), request_id="held")
    told = lab.run(beside)
    assert "".join(event.text for event in told["free", 0]) == "".join(e.text for e in lab.run(alone)["free", 0])
    datetime.date.fromisoformat(json.loads("".join(event.text for event in told["held", 0])))


def test_log_probabilities_are_those_of_the_unmasked_model(lab):
    observed = lab.Observed()
    engine = lab.engine(observer=observed)
    engine.add(lab.ids(5), held("choice", '["abc"]', logprobs=1), request_id="r")
    events = lab.run(engine)["r", 0]
    for step, event in enumerate(event for event in events if event.token_ids):
        raw = observed.rows["r", 0, 5 + step].log_softmax(0)
        assert event.logprobs[0].logprob == pytest.approx(raw[event.token_ids[0]].item(), abs=1e-4)
        assert event.logprobs[0].top_logprobs[0][0] == int(raw.argmax())


FORMS = [
    ("json_schema", json.dumps(SCHEMAS["nested"])),
    ("json_schema", json.dumps(SCHEMAS["refs"])),
    ("regex", "(ab|[0-9]{2,4}|é+)*x?"),
    ("choice", '["one", "once", "two hundred"]'),
    ("lark", f'start: "a" {IM_END}? /[bc]{{2,30}}/'),
]


def every_answer(lab, engine: Engine, constraints: dict[int, Constraint | None], **wishes: object) -> dict:
    """Ids, text and ending of each; prompt and seed come from its number."""
    for i, constraint in constraints.items():
        params = SamplingParams(constraint=constraint, max_tokens=24, seed=i, n=2, ignore_eos=True, **wishes)
        engine.add(lab.ids(10 + i, seed=i), params, request_id=str(i))
    told = lab.run(engine)
    engine.check_integrity()
    return {
        key: (
            [token_id for event in events for token_id in event.token_ids],
            "".join(event.text for event in events),
            events[-1].finish_reason,
        )
        for key, events in told.items()
    }


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([None, *FORMS]), min_size=1, max_size=5), st.sampled_from(["tight", "lookup", "draft"]))
def test_an_answer_is_the_same_whatever_runs_beside_it_and_however_it_is_guessed(lab, forms, how):
    wishes = {"temperature": 0.9, "top_p": 0.95, "stop_ids": (lab.tokenizer().im_end_id,)}
    constraints = {i: form and Constraint(*form) for i, form in enumerate(forms)}
    alone: dict = {}
    for i, constraint in constraints.items():
        alone |= every_answer(lab, lab.engine(), {i: constraint}, **wishes)
    if how == "tight":  # blocks for about two sequences: the others wait or are computed again
        engine = lab.engine(kv_memory=lab.model().config.kv_bytes_per_token(4) * 80, max_batch=6)
    else:
        draft = lab.model() if how == "draft" else None
        engine = Engine(lab.model(), EngineConfig(), tokenizer=lab.tokenizer(), draft=draft)
        engine._speculation._draft_cost = 0.0
        wishes["speculation"] = {"lookup": "prompt-lookup"}.get(how, how)
    assert every_answer(lab, engine, constraints, **wishes) == alone


def test_a_draft_that_knows_the_grammar_guesses_right(lab):
    engine = Engine(lab.model(), EngineConfig(), tokenizer=lab.tokenizer(), draft=lab.model())
    engine._speculation._draft_cost = 0.0
    answers(lab, engine, held("choice", json.dumps(["a long text to be recited " * 3]), speculation="draft"))
    assert engine.stats.guessed_right > 0.9 * engine.stats.guessed > 0


def test_what_a_grammar_cannot_follow_ends_that_request_alone(lab):
    engine = lab.engine()
    properties = {f"p{i}": {"type": "integer"} for i in range(900)}  # more ways to go on than a row may have
    engine.add(lab.ids(3), held("regex", "[ab]{5}"), request_id="good")
    engine.add(
        lab.ids(3), held("json_schema", json.dumps({"type": "object", "properties": properties})), request_id="bad"
    )
    told = lab.run(engine)
    assert told["good", 0][-1].finish_reason == "stop"
    last = told["bad", 0][-1]
    assert last.finish_reason == "error"
    assert isinstance(last.error, RequestError)
    engine.check_integrity()


def chain(length: int) -> str:
    """A schema whose references lead one to the next."""
    links = {f"d{i}": {"required": ["a"], "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {}}})


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", chain(3000)),
        ("json_schema", chain(6000)),
        ("json_schema", nested(300)),
        ("json_schema", nested(900)),
        ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(20_000)]})),
        (
            "json_schema",
            json.dumps({"type": "array", "minItems": 10**9, "items": {"minLength": 10**9, "type": "string"}}),
        ),
        ("json_schema", json.dumps({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}})),
        ("json_schema", json.dumps({"$ref": "file:///etc/passwd"})),
        ("json_schema", json.dumps({"type": "string", "pattern": "(.*a){25}.{12}$"})),
        ("regex", "(a|b)*a(a|b){20}c"),
        ("regex", "((a{1,99}){1,99}){1,99}"),
        ("regex", "(" * 5000 + ")" * 5000),
        ("lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(9000)) + 'r9000: "a"'),
        ("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000),
        ("lark", 'start: ("a" "b"){100000}'),
        ("choice", json.dumps([f"{i:09x}" for i in range(30_000)])),
    ],
)
def test_a_hostile_grammar_is_held_or_refused_and_the_engine_goes_on(lab, kind, source):
    engine = lab.engine()
    with contextlib.suppress(RequestError):
        engine.add(lab.ids(3), held(kind, source, max_tokens=5), request_id="hostile")
    lab.run(engine)
    assert answers(lab, engine, held("choice", '["well"]')) == [("well", "stop")]


def test_a_source_may_not_be_of_any_length():
    with pytest.raises(RequestError, match="500,001"):
        Constraint("regex", "a" * 500_001)


def test_text_that_a_form_forces_takes_fewer_steps_and_is_the_same(lab):
    schema = {"properties": {"a_long_name": {"enum": ["this", "that"]}}, "required": ["a_long_name"], "type": "object"}
    plain, guessing = lab.engine(), lab.engine()
    params = {"n": 3, "temperature": 1.0, "max_tokens": 60}
    texts = [
        answers(lab, engine, held("json_schema", json.dumps(schema), speculation=speculation, **params))
        for engine, speculation in ((plain, "none"), (guessing, "prompt-lookup"))
    ]
    assert texts[0] == texts[1]
    assert guessing.stats.steps < 0.7 * plain.stats.steps
