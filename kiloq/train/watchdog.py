"""Notices steps that jump out of line. Knows no model: it sees each step's loss and gradient norm, in order."""

import statistics
from collections.abc import Mapping, Sequence

_WINDOW = 64  # steps that are looked back at
_LEAST = 16  # steps before anything is judged
_SPREADS = 8.0  # median distances from the median; about five standard deviations of a normal curve
_FACTORS = {"loss": 1.25, "grad_norm": 4.0}  # and at least this many times the median: norms vary more than losses


def spike(history: Mapping[str, Sequence[float]], values: Mapping[str, float]) -> str | None:
    """What of `values` stands far above its own recent past, in words; None where nothing does.

    A running median and the median distance from it are not moved by the spikes themselves.
    """
    for name, factor in _FACTORS.items():
        past = history.get(name, ())
        if len(past) < _LEAST:
            continue
        middle = statistics.median(past)
        spread = statistics.median(abs(value - middle) for value in past)
        if values[name] > max(middle + _SPREADS * spread, middle * factor):
            return f"{name} {values[name]:.3g} where the last {len(past)} steps had {middle:.3g}"
    return None


def remember(history: dict[str, list[float]], values: Mapping[str, float]) -> None:
    """Add a step to `history`, which holds the last 64. Spikes too: a run that has moved on is not held to its past."""
    for name in _FACTORS:
        history[name] = [*history.get(name, ()), values[name]][-_WINDOW:]
