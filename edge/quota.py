"""May this call pass? Pure arithmetic on one timestamp per bucket.

A bucket is remembered as the moment at which it will be full again. Spending moves
that moment into the future; waiting lets the present catch up. A burst that straddles
a window's edge gains nothing, because there are no windows.
"""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

_MICROSECOND = timedelta(microseconds=1)


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

    @property
    def refill_us(self) -> int:
        """The microseconds that restore one point; whole, so that every store agrees."""
        return round(self.refill_s * 1_000_000)

    @property
    def window_s(self) -> int:
        """Seconds in which an empty bucket fills, rounded up."""
        return math.ceil(self.burst_points * self.refill_us / 1_000_000)

    def share(self, part: float) -> "Quota":
        """This quota cut to a part of its rate and its burst, at least one point.

        Args:
            part: more than 0, up to 1.
        """
        burst_points = max(1, math.floor(self.burst_points * part))
        return Quota(self.name, burst_points, self.refill_s / part)


@dataclass(frozen=True)
class Decision:
    """The answer of `spend`.

    Attributes:
        is_allowed: whether the call may pass.
        full_at: what to store; unchanged if refused.
        remaining_points: what is left now, 0 or more.
        retry_after_s: 0 if allowed; else the wait after which this cost would pass.
    """

    is_allowed: bool
    full_at: datetime
    remaining_points: int
    retry_after_s: float


def spend(quota: Quota, full_at: datetime, *, now: datetime, cost_points: int = 1) -> Decision:
    """Decide whether a call may pass, and when its bucket will be full again.

    Args:
        quota: burst_points (1 or more); refill_s, the seconds that restore one point.
        full_at: when the bucket is full, UTC; any past time means it is full now.
        now: the current time, UTC; passed in, so tests need no waiting.
        cost_points: 0 (only look) up to quota.burst_points.

    Returns:
        If allowed, the full_at to store. If not, full_at unchanged and retry_after_s > 0.

    Raises:
        ValueError: cost_points is out of range, a bug in the caller.

    Source: Generic Cell Rate Algorithm, ITU-T Recommendation I.371.
    """
    if not 0 <= cost_points <= quota.burst_points:
        raise ValueError(f"cost_points {cost_points} is not in 0..{quota.burst_points}")
    debt_us = max(0, (full_at - now) // _MICROSECOND)
    burst_us = quota.burst_points * quota.refill_us
    spent_us = debt_us + cost_points * quota.refill_us
    if spent_us > burst_us:
        remaining = max(0, burst_us - debt_us) // quota.refill_us
        return Decision(False, full_at, remaining, (spent_us - burst_us) / 1_000_000)
    remaining = (burst_us - spent_us) // quota.refill_us
    return Decision(True, now + spent_us * _MICROSECOND, remaining, 0.0)


def give_back(quota: Quota, full_at: datetime, *, points: int) -> datetime:
    """The full_at of a bucket that gets points back; it never holds more than its burst.

    Args:
        quota: the bucket's quota.
        full_at: what `spend` told to store.
        points: 0 or more.

    Returns:
        The full_at to store. It may lie in the past: then the bucket is full.
    """
    return full_at - points * quota.refill_us * _MICROSECOND
