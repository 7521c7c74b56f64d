"""Tokens drawn natively are those of the slow twin, on every instruction set."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kiloq.ops import cpu
from kiloq.ops.draw import BAD_LOGITS, NOTHING_ALLOWED, Wish, draw, draw_one

WISHES = {
    "greedy": Wish(temperature=0.0),
    "whole": Wish(temperature=1.0),
    "hot": Wish(temperature=3.0),
    "cold": Wish(temperature=1e-9),
    "top_k": Wish(temperature=0.8, top_k=5),
    "top_k of one": Wish(temperature=1.0, top_k=1),
    "top_k beyond": Wish(temperature=1.0, top_k=10**6),
    "half of all": Wish(temperature=1.0, top_k=900),
    "nucleus": Wish(temperature=1.0, top_p=0.8),
    "whole nucleus": Wish(temperature=2.0, top_p=0.9999),
    "empty nucleus": Wish(temperature=1.0, top_p=0.0),
    "min_p": Wish(temperature=1.0, min_p=0.05),
    "all three": Wish(temperature=0.7, top_k=20, top_p=0.8, min_p=0.01),
}
SIZES = (1, 5, 64, 1000, 4099)


def logits(size: int, kind: str) -> NDArray[np.float32]:
    random = np.random.default_rng(size)
    peaked = random.standard_normal(size) * 4
    made = {
        "peaked": peaked,
        "flat": random.standard_normal(size) * 0.01,
        "ties": np.round(peaked / 4) * 2,
        "equal": np.zeros(size),
        "holes": np.where((np.arange(size) % 3 == 0) & (np.arange(size) > 0), -np.inf, peaked),
    }
    return made[kind].astype(np.float32)


@pytest.fixture(params=cpu.NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param not in cpu.available():
        pytest.skip(f"this machine has no {request.param}")
    with cpu.using(request.param):
        yield


def drawn(row: NDArray[np.float32], wish: Wish, uniforms: NDArray[np.float64]) -> tuple[list[int], list[int]]:
    """Natively, and by the twin."""
    wishes = [replace(wish, uniform=float(uniform)) for uniform in uniforms]
    rows = np.broadcast_to(row, (len(wishes), row.size)).copy()
    return draw(rows, wishes), [draw_one(row, one) for one in wishes]


@pytest.mark.parametrize("kind", ["peaked", "flat", "holes"])
@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
@pytest.mark.parametrize("size", SIZES)
def test_the_same_number_draws_the_twins_token(native: None, size: int, wish: Wish, kind: str) -> None:
    ours, theirs = drawn(logits(size, kind), wish, np.linspace(0, 1, 100, endpoint=False))
    # Sums that round differently may move a draw to a neighbour.
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 3


@pytest.mark.parametrize("kind", ["ties", "equal"])
@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_tokens_of_equal_weight_are_drawn_equally_often(native: None, wish: Wish, kind: str) -> None:
    row = logits(1000, kind)
    ours, theirs = drawn(row, wish, np.linspace(0, 1, 2000, endpoint=False))
    for level in np.unique(row):
        found, expected = (np.count_nonzero(row[tokens] == level) for tokens in (ours, theirs))
        assert abs(found - expected) <= 2, level
    counts = np.bincount(ours, minlength=row.size)
    for level in np.unique(row[ours]):
        some = counts[(row == level) & (counts > 0)]
        assert some.max() - some.min() <= 2, level


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_shifts_and_grammars_count_as_in_the_twin_and_leave_the_logits(native: None, wish: Wish) -> None:
    row, random = logits(1000, "peaked"), np.random.default_rng(1)
    shifts = (np.arange(0, 1000, 7), random.uniform(0.5, 2, 143), random.uniform(-3, 3, 143))
    allowed = random.uniform(size=1000) < 0.3
    before = row.copy()
    for asked in (
        replace(wish, shifts=shifts),
        replace(wish, allowed=allowed),
        replace(wish, shifts=shifts, allowed=allowed),
    ):
        ours, theirs = drawn(row, asked, np.linspace(0, 1, 60, endpoint=False))
        assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 2
        assert asked.allowed is None or allowed[ours].all()
    assert np.array_equal(row, before)


@pytest.mark.parametrize("wish", [WISHES["greedy"], WISHES["nucleus"], WISHES["top_k"]])
@pytest.mark.parametrize("place", [0, 15, 16, 63, 64, 998, 999])
def test_what_is_no_number_is_told_wherever_it_stands(native: None, wish: Wish, place: int) -> None:
    rows = np.stack([logits(1000, "peaked")] * 6)
    rows[1, place], rows[2, place], rows[3] = np.nan, np.inf, -np.inf
    rows[4, place] = -np.nan
    rows[5, place] = -np.inf
    ours = draw(rows, [wish] * 6)
    assert ours[1:5] == [BAD_LOGITS] * 4
    assert min(ours[0], ours[5]) >= 0
    assert ours == [draw_one(row, wish) for row in rows]


def test_a_grammar_without_a_way_on_is_told(native: None) -> None:
    row = logits(100, "holes")
    for allowed in (np.zeros(100, np.bool_), row == -np.inf):
        wish = Wish(temperature=1.0, allowed=allowed)
        assert draw(row[None], [wish]) == [draw_one(row, wish)] == [NOTHING_ALLOWED]


def test_a_real_vocabulary_and_rows_of_all_kinds_together(native: None) -> None:
    size = 151_936
    rows = np.stack([logits(size, kind) for kind in ("peaked", "flat", "ties", "equal", "holes")])
    for name in ("greedy", "whole", "nucleus", "all three", "half of all"):
        wishes = [replace(WISHES[name], uniform=0.37)] * len(rows)
        ours = draw(rows, wishes)
        for row, token, wish in zip(rows, ours, wishes, strict=True):
            twin = draw_one(row, wish)
            assert row[token] == pytest.approx(row[twin], abs=2e-3), name


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_what_has_no_weight_is_never_drawn_however_the_sums_round(native: None, wish: Wish) -> None:
    row = logits(151_936, "holes")
    uniforms = [0.0, 1 - 1e-15, float(np.nextafter(1, 0))]
    drawn = draw(np.stack([row] * 3), [replace(wish, uniform=uniform) for uniform in uniforms])
    assert np.isfinite(row[drawn]).all()
