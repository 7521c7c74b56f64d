"""Laws of SamplingParams: every value is checked once, at the door, and the message names field, value and range."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from kiloq.engine.params import SamplingParams
from kiloq.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Defaults:
    max_tokens: int | None = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.8
    repetition_penalty: float = 1.1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_tokens", 0, "max_tokens is 0; it must be at least 1"),
        ("max_tokens", 2.5, "whole number"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "finite"),
        ("temperature", True, "finite number"),
        pytest.param("temperature", 10**400, "finite number", id="beyond floats"),
        ("logit_bias", {5: -(10**5000)}, "finite number"),
        ("logit_bias", {10**5000: 1}, "64 bits"),
        pytest.param("max_tokens", 10**5000, "64 bits", id="no id can show it"),
        ("top_k", -1, "at least 0"),
        pytest.param("top_k", -(10**5000), "64 bits", id="nor this"),
        ("top_p", 1.5, "between 0 and 1"),
        ("min_p", -1, "between 0 and 1"),
        ("repetition_penalty", 0, "between 0.001 and 1,000,000,000"),
        ("repetition_penalty", 1e300, "between 0.001 and 1,000,000,000"),
        ("presence_penalty", 3, "between -2 and 2"),
        ("frequency_penalty", -3, "between -2 and 2"),
        ("logit_bias", {5: 200}, r"logit_bias\[5\] is 200"),
        ("logit_bias", {"5": 1}, "whole number"),
        ("logit_bias", [5], "map token ids"),
        ("seed", 2**63, "between"),
        ("n", 0, "between 1 and 128"),
        ("stop", ("",), "at least one character"),
        ("stop", 5, "list"),
        ("stop_ids", (-1,), "at least 0"),
        ("ignore_eos", 1, "true or false"),
        ("logprobs", 21, "between 0 and 20"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        SamplingParams(**{field: value})
    assert field in str(caught.value)


def test_lists_become_tuples_and_one_stop_string_becomes_a_tuple_of_one() -> None:
    params = SamplingParams(stop="\n\n", stop_ids=[1, 2])
    assert params.stop == ("\n\n",)
    assert params.stop_ids == (1, 2)


def test_whole_numbers_become_floats_where_floats_are_meant() -> None:
    params = SamplingParams(temperature=1, top_p=1, repetition_penalty=2, presence_penalty=-1, logit_bias={3: 4})
    floats = (params.temperature, params.top_p, params.min_p, params.repetition_penalty, params.presence_penalty)
    assert {type(value) for value in (*floats, params.frequency_penalty, params.logit_bias[3])} == {float}


def test_the_callers_mapping_is_copied() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[3] = 99.0
    assert params.logit_bias == {3: 1.0}


def test_a_model_gives_the_defaults_and_the_caller_overrides_them() -> None:
    params = SamplingParams.for_model(Defaults(), temperature=0, seed=7)
    assert (params.max_tokens, params.top_p, params.repetition_penalty) == (512, 0.8, 1.1)
    assert params.is_greedy
    assert params.has_penalties
    assert params.seed == 7


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(RequestError, match="Did you mean 'temperature'"):
        SamplingParams.for_model(Defaults(), temprature=0.5)


def test_params_import_no_torch() -> None:
    code = "import kiloq.engine.params, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
