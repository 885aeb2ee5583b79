"""When to stop asking what only fails, and how to find out that it works again.

One state machine for all that can fail by itself: an address, an upstream, a method. It is pure;
time is passed in.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BreakerLimits:
    """When a breaker opens, and for how long.

    Attributes:
        in_a_row: so many failures without a success between them,
        share, calls_min, window_s: or this share of at least so many calls within the time,
        lasting_s: and for at least so long. One connection that breaks under fifty calls is
            one failure, and where half of the calls fail, ten in a row are bad luck that comes
            every second.
        open_s, open_max_s: the first time, and what it doubles up to while probes fail.
    """

    in_a_row: int = 10
    share: float = 0.7
    calls_min: int = 40
    window_s: float = 10.0
    lasting_s: float = 0.25
    open_s: float = 0.5
    open_max_s: float = 5.0


DEFAULT_LIMITS = BreakerLimits()
# A breaker that has not been open for so many times its longest opening begins anew.
FORGIVEN_AFTER = 3
# Breakers that open together shall not probe together.
SPREAD = 0.2


class Breaker:
    """Closed, it lets every call pass; open, none; half-open, one at a time, the probe.

    Whoever makes a call remembers `round` as the call was let in, and hands it over with the
    outcome: a call from before the last change of state says nothing of what is now.

    Args:
        limits: when it opens.
        may_open: asked before it opens; False keeps it closed.

    Attributes:
        is_closed: whether every call passes.
        opened_at_s: when it did so for the last time.
        round: the number of its changes of state.

    Source: M. Nygard, "Release It!", circuit breaker; the two conditions and the growing time
    are those of Envoy's outlier detection.
    """

    __slots__ = (
        "_failures",
        "_first_in_a_row_s",
        "_in_a_row",
        "_is_probed",
        "_limits",
        "_may_open",
        "_open_until_s",
        "_openings",
        "_successes",
        "_window_since_s",
        "is_closed",
        "opened_at_s",
        "round",
    )

    def __init__(
        self,
        limits: BreakerLimits = DEFAULT_LIMITS,
        *,
        may_open: Callable[[], bool] = lambda: True,
    ) -> None:
        self._limits = limits
        self._may_open = may_open
        self.is_closed = True
        self.round = 0
        self._openings = 0  # in a row, without a forgiving time between
        self.opened_at_s = self._open_until_s = float("-inf")
        self._is_probed = False
        self._in_a_row = self._successes = self._failures = 0
        self._first_in_a_row_s = self._window_since_s = float("-inf")

    def admits(self, now_s: float) -> bool:
        """Whether a call may be made; where it is the probe, its outcome must be noted."""
        if self.is_closed:
            return True
        if self._is_probed or now_s < self._open_until_s:
            return False
        self._is_probed = True
        self.round += 1  # only the probe's outcome counts
        return True

    def wait_s(self, now_s: float) -> float:
        """Seconds until a call may pass, as far as that is known; 0 if one may now."""
        if self.is_closed:
            return 0.0
        if self._is_probed:
            return self._limits.open_s
        return max(0.0, self._open_until_s - now_s)

    def hurry(self) -> None:
        """Let the next probe go now: something has happened for which it is worth to ask."""
        self._open_until_s = float("-inf")

    def note_success(self, round_: int) -> None:
        """A call that was let in was answered."""
        if round_ != self.round:
            return
        self._in_a_row = 0
        self._successes += 1
        if not self.is_closed:
            self.is_closed, self._is_probed = True, False
            self.round += 1
            self._forget()

    def note_failure(self, round_: int, now_s: float) -> None:
        """A call that was let in found nobody."""
        if round_ != self.round:
            return
        if not self.is_closed:
            self._open(now_s)
            return
        if now_s - self._window_since_s > self._limits.window_s:
            self._window_since_s, self._successes, self._failures = now_s, 0, 0
        if self._in_a_row == 0:
            self._first_in_a_row_s = now_s
        self._in_a_row += 1
        self._failures += 1
        if self._is_too_much(now_s) and self._may_open():
            self._open(now_s)

    def note_nothing(self, round_: int) -> None:
        """A call that was let in ended without saying anything, such as by its client."""
        if round_ == self.round:
            self._is_probed = False

    def _is_too_much(self, now_s: float) -> bool:
        limits, calls = self._limits, self._successes + self._failures
        if self._in_a_row >= limits.in_a_row:
            return now_s - self._first_in_a_row_s >= limits.lasting_s
        is_share = calls >= limits.calls_min and self._failures >= limits.share * calls
        return is_share and now_s - self._window_since_s >= limits.lasting_s

    def _open(self, now_s: float) -> None:
        limits = self._limits
        if self.is_closed and now_s - self.opened_at_s > FORGIVEN_AFTER * limits.open_max_s:
            self._openings = 0
        # Bounded, too: two to the power of a long night is no float.
        length_s = min(limits.open_max_s, limits.open_s * 2.0 ** min(self._openings, 30))
        self._openings += 1
        self.opened_at_s = now_s
        self._open_until_s = now_s + length_s * random.uniform(1 - SPREAD, 1)  # noqa: S311
        self.is_closed = self._is_probed = False
        self.round += 1
        self._forget()

    def _forget(self) -> None:
        self._in_a_row = self._successes = self._failures = 0
        self._first_in_a_row_s = self._window_since_s = float("-inf")
