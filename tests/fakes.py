"""Fakes: small, and each passes its real twin's tests."""

from datetime import UTC, datetime, timedelta


class ManualClock:
    """See shared.clock.Clock. Time stands still until it is told to go on."""

    def __init__(self, now: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = now
        self._monotonic_s = 0.0

    def now(self) -> datetime:
        """See Clock.now."""
        return self._now

    def monotonic_s(self) -> float:
        """See Clock.monotonic_s."""
        return self._monotonic_s

    def advance(self, seconds: float) -> None:
        """Both times go on together, as they do on a good day."""
        assert seconds >= 0
        self._now += timedelta(seconds=seconds)
        self._monotonic_s += seconds

    def step_wall(self, seconds: float) -> None:
        """Somebody sets the wall clock, forwards or back; the steady one goes on as it was."""
        self._now += timedelta(seconds=seconds)
