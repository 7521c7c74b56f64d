"""Which numbers a setting takes, beside its type: `Annotated[int, Range(1)]`. Knows no recipe."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, None: without end."""

    low: float
    high: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the value is one of them."""
        return self.low <= value and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"


Count = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
"""What the generators of numpy and torch both take."""
Share = Annotated[float, Range(0, 1)]
