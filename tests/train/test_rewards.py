import pytest

from kiloq.chat import Message
from kiloq.errors import ConfigError
from kiloq.train.rewards import Attempt, Check, RewardConfig, combined, last_number


def attempt(text: str, expected: str = "1,012", *, tokens: int = 4, finished: bool = True) -> Attempt:
    return Attempt(
        messages=(Message(role="user", content="?"),),
        expected=expected,
        text=text,
        ids=(1,),
        num_tokens=tokens,
        is_finished=finished,
    )


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ("exact", " 1,012\n", "It is 1,012"),
        ("number", "1000 + 12 = 1012.", "1012 is not 12"),
        ("contains", "it is 1,012 then", "it is 1012"),
        ("finished", "anything", None),
    ],
)
def test_a_check_tells_good_from_bad(check: Check, good: str, bad: str | None) -> None:
    reward = combined([RewardConfig(check=check)])
    wrong = attempt("", finished=False) if bad is None else attempt(bad)
    assert reward([attempt(good), wrong]) == [1.0, 0.0]


def test_rewards_are_weighed_and_added() -> None:
    reward = combined(
        [RewardConfig(check="matches", pattern=r"\d+"), RewardConfig(check="short", tokens=8, weight=0.5)]
    )
    assert reward([attempt("12", tokens=2), attempt("x", tokens=100)]) == [1.0 + 0.5 * 0.75, 0.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7.", 7),
        ("-1.5", -1.5),
        ("1,234,567 of 2", 2),
        ("12,345", 12345),
        ("1,2", 2),
        ("none", None),
        ("12-4", 4),
        ("it is .5", 0.5),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_a_check_without_what_it_needs_is_refused() -> None:
    with pytest.raises(ConfigError, match="pattern belongs to matches"):
        RewardConfig(check="matches")
    with pytest.raises(ConfigError, match="pattern belongs to matches"):
        RewardConfig(check="exact", tokens=3)
    with pytest.raises(ConfigError, match="no regular expression"):
        RewardConfig(check="matches", pattern="(")
    with pytest.raises(ConfigError, match=r"no \[\[reward\]\]"):
        combined([])
