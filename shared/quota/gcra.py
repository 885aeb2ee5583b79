"""May this call pass? Pure arithmetic on one timestamp per bucket, in microseconds.

A bucket is remembered as the moment at which it will be full again. Spending moves
that moment into the future; waiting lets the present catch up. A burst that straddles
a window's edge gains nothing, because there are no windows.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


@dataclass(frozen=True)
class Quota:
    """How fast a bucket refills, and how much it holds.

    Attributes:
        name: the bucket's name in the contract: "api", "login".
        burst_points: what a full bucket holds, 1 or more.
        refill_s: the seconds that restore one point; kept to the microsecond.
    """

    name: str
    burst_points: int
    refill_s: float

    def __post_init__(self) -> None:
        """Refuse a bucket that could never let anything pass."""
        if self.burst_points < 1 or self.refill_us < 1:
            raise ValueError(f"{self.name}: burst_points and refill_s must be positive")

    @cached_property
    def refill_us(self) -> int:
        """The microseconds that restore one point; whole, so that every store agrees."""
        return round(self.refill_s * 1_000_000)

    @cached_property
    def burst_us(self) -> int:
        """The microseconds in which an empty bucket fills."""
        return self.burst_points * self.refill_us

    @cached_property
    def window_s(self) -> int:
        """Seconds in which an empty bucket fills; see whole_seconds."""
        return whole_seconds(self.burst_us)

    def share(self, part: float) -> "Quota":
        """This quota cut to a part of its rate and its burst, at least one point.

        Args:
            part: more than 0, up to 1.
        """
        burst_points = max(1, math.floor(self.burst_points * part))
        return Quota(self.name, burst_points, self.refill_s / part)


def whole_seconds(microseconds: int) -> int:
    """Seconds, 1 or more, rounded up; but what the rounding of refill_us adds is no second."""
    return max(1, (microseconds + 990_000) // 1_000_000)


class Decision(NamedTuple):
    """The answer of `spend`.

    Attributes:
        is_allowed: whether the call may pass.
        full_at_us: what to store; unchanged if refused.
        remaining_points: what is left now, 0 or more.
        retry_after_s: 0 if allowed; else the wait after which this cost would pass.
    """

    is_allowed: bool
    full_at_us: int
    remaining_points: int
    retry_after_s: float


def spend(quota: Quota, full_at_us: int, *, now_us: int, cost_points: int = 1) -> Decision:
    """Decide whether a call may pass, and when its bucket will be full again.

    Args:
        quota: burst_points (1 or more); refill_s, the seconds that restore one point.
        full_at_us: when the bucket is full; any past time means it is full now.
        now_us: the current time by the same clock; passed in, so tests need no waiting.
        cost_points: 0 (only look) up to quota.burst_points.

    Returns:
        If allowed, the full_at_us to store. If not, it is unchanged and retry_after_s > 0.

    Raises:
        ValueError: cost_points is out of range, a bug in the caller.

    Source: Generic Cell Rate Algorithm, ITU-T Recommendation I.371.
    """
    if not 0 <= cost_points <= quota.burst_points:
        raise ValueError(f"cost_points {cost_points} is not in 0..{quota.burst_points}")
    debt_us = full_at_us - now_us if full_at_us > now_us else 0
    refill_us, burst_us = quota.refill_us, quota.burst_us
    spent_us = debt_us + cost_points * refill_us
    if spent_us > burst_us:
        remaining = max(0, burst_us - debt_us) // refill_us
        return Decision(False, full_at_us, remaining, (spent_us - burst_us) / 1_000_000)
    return Decision(True, now_us + spent_us, (burst_us - spent_us) // refill_us, 0.0)


def give_back(quota: Quota, full_at_us: int, *, points: int) -> int:
    """The full_at_us of a bucket that gets points back; it never holds more than its burst.

    Args:
        quota: the bucket's quota.
        full_at_us: what `spend` told to store.
        points: 0 or more.

    Returns:
        What to store. It may lie in the past: then the bucket is full.
    """
    return full_at_us - points * quota.refill_us
