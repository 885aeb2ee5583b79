"""Where time comes from; tests bring their own."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """The wall clock, and the steady one for measuring lengths."""

    def now(self) -> datetime:
        """The current time, UTC, timezone-aware."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never go back; only differences mean anything."""
        ...


class SystemClock:
    """See Clock. The machine's clock."""

    def now(self) -> datetime:
        """See Clock.now."""
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        """See Clock.monotonic_s."""
        return time.monotonic()


CLOCKS_APART_US = 60_000_000
"""Further than this no two clocks are apart that somebody keeps."""


def is_over(until_us: int, *, now_us: int, lasts_us: int) -> bool:
    """Whether the time of something has passed.

    It also has when it ends later than it could: the clock has been set back since, and whoever
    waited for it would wait for hours. Nothing may rest on this alone: a token decides.

    Args:
        until_us: when it ends, by the clock of then.
        now_us: the current moment.
        lasts_us: it is never made longer than this.
    """
    return until_us <= now_us or until_us > now_us + lasts_us + CLOCKS_APART_US


def to_us(moment: datetime) -> int:
    """Microseconds since 1970 UTC, how every table stores a moment."""
    return int(moment.timestamp()) * 1_000_000 + moment.microsecond


def of_us(microseconds: int) -> datetime:
    """The moment that to_us stored, UTC."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
