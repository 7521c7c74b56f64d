"""The baseline of the model card is a probability distribution, and learns."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "mini"))

from ngram import Trigram


def documents() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 7, size=rng.integers(1, 40)).tolist() for _ in range(300)] + [[1, 2], [5]]


@pytest.mark.parametrize("context", [(0, 1), (3, 3), (6, 2)])
def test_probabilities_of_the_next_token_sum_to_one(context: tuple[int, int]) -> None:
    for model in (Trigram(documents(), 7), Trigram([[1, 2, 3, 1, 2]], 7)):  # the second never saw most contexts
        after_two = sum(np.exp(model.log_probabilities([*context, w])[1]) for w in range(7))
        after_one = sum(np.exp(model.log_probabilities([context[1], w])[0]) for w in range(7))
        assert [after_two, after_one] == pytest.approx([1.0, 1.0])


def test_a_pattern_is_learned() -> None:
    model = Trigram([[1, 2, 3] * 50], 7)
    assert np.exp(model.log_probabilities([1, 2, 3])[1]) > 0.9
