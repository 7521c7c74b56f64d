"""How much goes through the model in one step."""

import pytest

from kiloq.bench.shapes import SHAPES, shape_config
from kiloq.engine.limits import step_tokens


@pytest.mark.parametrize(("name", "tokens"), [("qwen2.5-0.5b", 512), ("qwen-1.8b", 256), ("qwen-7b", 64)])
def test_a_short_step_is_what_two_cores_were_measured_to_do_in_about_half_a_second(name: str, tokens: int) -> None:
    assert step_tokens(shape_config(name).num_parameters, 2, short=True) == tokens


@pytest.mark.parametrize("name", SHAPES)
def test_more_threads_take_more_and_no_short_step_is_longer_than_a_whole_one(name: str) -> None:
    size = shape_config(name).num_parameters
    short = [step_tokens(size, threads, short=True) for threads in (1, 2, 4, 8, 64)]
    assert short == sorted(short)
    assert all(32 <= tokens <= step_tokens(size, 1, short=False) for tokens in short)
    assert short[-1] == 512
