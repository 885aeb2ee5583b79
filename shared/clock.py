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


def to_us(moment: datetime) -> int:
    """Microseconds since 1970 UTC, how every table stores a moment."""
    return int(moment.timestamp()) * 1_000_000 + moment.microsecond


def of_us(microseconds: int) -> datetime:
    """The moment that to_us stored, UTC."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
