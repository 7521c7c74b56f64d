"""What a load test asks, and what it makes of outcomes. No server."""

import json
import statistics
from array import array

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiloq.bench.percentiles import percentile
from kiloq.bench.serve_exchange import Ask, Outcome
from kiloq.bench.serve_load import (
    LengthMix,
    Wording,
    arrivals,
    asks,
    parse_lengths,
    with_departures,
)
from kiloq.bench.serve_report import Spread, load_figures, load_record, load_table
from kiloq.errors import ConfigError


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=200),
    st.sampled_from([1, 25, 50, 90, 95, 99, 100]),
)
def test_percentiles_are_numpys_nearest_rank(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == numpy.percentile(values, percent, method="inverted_cdf")


def test_lengths_have_their_medians_and_their_seeds() -> None:
    mix = parse_lengths("sharegpt")
    drawn = mix.draw(4000, 1)
    assert drawn == mix.draw(4000, 1)
    assert drawn != mix.draw(4000, 2)
    prompts, answers = zip(*drawn, strict=True)
    assert statistics.median(prompts) == pytest.approx(80, rel=0.1)
    assert statistics.median(answers) == pytest.approx(160, rel=0.1)
    assert max(prompts) == 1024
    assert min(prompts) >= 1


def test_a_scaled_mix_is_the_same_mix() -> None:
    for whole, half in zip(LengthMix().draw(50, 3), parse_lengths("sharegpt:0.5").draw(50, 3), strict=True):
        assert half == pytest.approx([length / 2 for length in whole], abs=1)


def test_fixed_lengths_are_fixed() -> None:
    assert set(parse_lengths("128x64").draw(9, 0)) == {(128, 64)}


@pytest.mark.parametrize("text", ["", "sharegpt:0", "sharegpt:x", "0x5", "12", "axb", "1x2x3", "sharegpt:nan"])
def test_lengths_that_mean_nothing_are_one_clear_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--lengths"):
        parse_lengths(text)


def test_arrivals_are_a_poisson_process_with_a_seed() -> None:
    times = arrivals(5000, 4.0, 7)
    assert times == arrivals(5000, 4.0, 7)
    assert times != arrivals(5000, 4.0, 8)
    assert times == sorted(times)
    gaps = numpy.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # of an exponential law


def test_no_two_prompts_begin_alike_and_words_follow_the_measured_cost() -> None:
    wording = Wording(model="m", fields={}).calibrated((10, 40), (60, 140))
    assert wording.words_for(200) == 90  # two tokens a word and 20 around
    asked = asks(wording, [(200, 5)] * 50, 0)
    texts = [json.loads(ask.body)["messages"][0]["content"] for ask in asked]
    assert {len(text.split()) for text in texts} == {90}
    assert len({tuple(text.split()[:8]) for text in texts}) == 50
    assert asked == asks(wording, [(200, 5)] * 50, 0)


def test_a_share_of_the_clients_departs_at_every_moment() -> None:
    asked = [Ask("/", b"", 50)] * 3000
    left = [a for a in with_departures(asked, 0.3, 0) if a.patience is not None or a.enough is not None]
    assert len(left) == pytest.approx(900, rel=0.1)
    assert sum(a.patience == 0 for a in left) == pytest.approx(300, rel=0.2)
    assert sum(a.enough is not None for a in left) == pytest.approx(300, rel=0.2)
    assert all(0 < a.enough < 50 for a in left if a.enough is not None)
    assert with_departures(asked, 0, 0) == asked


def outcome(began: float, *times: float, state: str = "done", ended: float | None = None) -> Outcome:
    found = Outcome(Ask("/", b"", 4), began, array("d", times), ended if ended is not None else times[-1])
    found.state, found.answer_tokens, found.prompt_tokens = state, len(times), 10
    return found


def test_figures_are_what_they_are_called() -> None:
    outcomes = [
        outcome(0, 1, 2, 3, 4),
        outcome(0, 2, 3, 4, 5),
        outcome(0, 1, 1.5, state="left"),
        outcome(2, state="lost", ended=3),
        outcome(4, 9, 10),  # three times the median wait is 6; this waited 5
    ]
    figures = load_figures(outcomes, client_cpu_s=1)
    assert (figures.done, figures.left, figures.lost, figures.refused) == (3, 1, 1, 0)
    assert (figures.starved, figures.short) == (0, 1)
    assert figures.seconds == 10
    assert figures.answer_tok_s == pytest.approx(12 / 10)
    assert figures.prompt_tok_s == pytest.approx(5)
    assert figures.busy_tok_s == pytest.approx(9 / 4)  # until the last request began
    assert figures.first_token == Spread(p50=2, p95=5, p99=5, max=5)
    assert figures.between_tokens == Spread(p50=1, p95=1, p99=1, max=1)
    assert figures.whole_answer == Spread(p50=5, p95=6, p99=6, max=6)
    assert figures.client_cpu == pytest.approx(0.1)


def test_who_waits_over_three_times_the_median_is_starved() -> None:
    figures = load_figures([outcome(0, 1, 2), outcome(0, 1, 2), outcome(0, 3.01, 4)], client_cpu_s=0)
    assert figures.starved == 1
    crowd = [outcome(0, 6, 7) for _ in range(9)]
    later = [outcome(50, 51, 52), outcome(60, 61, 62), outcome(70, 74, 75)]
    figures = load_figures(crowd + later, client_cpu_s=0)
    assert figures.starved == 1  # four seconds are long among those who came later
    assert figures.first_token_at_once == Spread(p50=6, p95=6, p99=6, max=6)
    assert figures.first_token_later == Spread(p50=1, p95=4, p99=4, max=4)
    assert "1 waited over 3 times the median" in load_table(figures)


def test_a_record_is_json_with_every_request() -> None:
    outcomes = [outcome(0, 1, 2), outcome(0, state="lost", ended=1)]
    record = json.loads(json.dumps(load_record(load_figures(outcomes, client_cpu_s=0), outcomes, {"seed": 1})))
    assert record["figures"]["first_token"] == {"p50": 1, "p95": 1, "p99": 1, "max": 1}
    assert [row["state"] for row in record["requests"]] == ["done", "lost"]
    assert record["requests"][1]["first_token_s"] is None
