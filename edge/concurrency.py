"""How many calls one upstream can have under way, found out from how long they take.

Pure: time is passed in. In windows of a tenth of a second the time of calls is compared with what
they take when little else runs, each method with itself. Where most have become slow, the limit
follows the ratio down; where not, it goes up again, by the square root of itself, so that it
comes back soon and errs by little.

Source: the gradient of Netflix's concurrency-limits (Gradient2Limit) and of Envoy's adaptive
concurrency filter. In two points we differ. Methods are compared with themselves alone, since the
mean of a read of 2 ms and a hash of 80 says nothing. And nothing is paused to measure the time of
an idle upstream: a limit at its floor under which calls are still slow has shown that it is not
the number of calls that makes them so, and takes their time for the usual one.
"""

import math

# Fewer calls than this are no load, whatever they take.
LIMIT_MIN = 8
WINDOW_S, WINDOW_CALLS = 0.1, 16
# A method with fewer calls in a window is not judged.
METHOD_CALLS = 4
# Slow is more than twice the usual time and this: a loop that is busy, or a turn that was lost,
# costs so much without any overload.
SLOW_FACTOR, SLACK_S = 2.0, 0.05
# In the mean from which the usual time is learnt, a single call counts for no more than so many
# times what is slow.
CLIP_FACTOR = 4.0
# With so few calls at once, what they take is the usual time, also if it is more than before.
QUIET_CALLS = 4
# A burst makes a queue that drains; only one that stays is a reason to refuse (the idea of CoDel,
# RFC 8289 §3). So calls must have been slow for so long while about as many came as went: on a
# busy machine one burst may take longer, and nobody comes who would be better off elsewhere.
STANDING_S = 2.0
# A longer window counts for no more: maybe nothing ran at all in it, the edge included.
STANDING_WINDOW_S = 0.5
# The least and the most that the limit falls in a window.
FALL_MIN, FALL_MAX = 0.9, 1 / 16
# How far the usual time goes to that of a window: a shorter one, a longer one of few calls, and
# one of a limit at its floor.
LEARN_DOWN, LEARN_UP, LEARN_AT_FLOOR = 0.5, 0.25, 0.5


class Pace:
    """What the calls of one method take.

    Attributes:
        usual_s: with little else under way; infinite before the first window.
        slow_s: more than this is slow.
    """

    __slots__ = ("calls", "clip_s", "slow_calls", "slow_s", "slow_took_s", "took_s", "usual_s")

    def __init__(self) -> None:
        self.usual_s = self.slow_s = self.clip_s = math.inf
        # In this window: all calls, and the slow ones.
        self.calls, self.took_s = 0, 0.0
        self.slow_calls, self.slow_took_s = 0, 0.0

    def note(self, took_s: float) -> None:
        """A call has ended."""
        self.calls += 1
        if took_s > self.slow_s:
            self.slow_calls += 1
            self.slow_took_s += took_s
            took_s = min(took_s, self.clip_s)
        self.took_s += took_s

    @property
    def is_slow(self) -> bool:
        """Whether most calls of this window were."""
        return 2 * self.slow_calls > self.calls

    @property
    def ratio(self) -> float:
        """What slow calls took in this window, over what is slow."""
        return self.slow_took_s / self.slow_calls / self.slow_s

    def learn(self, usual_s: float) -> None:
        """Take this for the usual time."""
        self.usual_s = usual_s
        self.slow_s = SLOW_FACTOR * usual_s + SLACK_S
        self.clip_s = CLIP_FACTOR * self.slow_s

    def approach(self, share: float) -> None:
        """Go so far from the usual time to that of this window."""
        self.learn(self.usual_s + share * (self.took_s / self.calls - self.usual_s))

    def end_window(self, *, is_quiet: bool) -> None:
        """Learn from the window, and begin another."""
        mean_s = self.took_s / self.calls
        if math.isinf(self.usual_s):
            self.learn(mean_s)
        elif mean_s < self.usual_s:
            self.approach(LEARN_DOWN)
        elif is_quiet:
            self.approach(LEARN_UP)
        self.calls, self.took_s = 0, 0.0
        self.slow_calls, self.slow_took_s = 0, 0.0


class AdaptiveLimit:
    """The limit of one upstream.

    Args:
        limit_max: where it begins, and what it never exceeds; at least 1.

    Attributes:
        limit: calls that may be under way.
        peak: the most that were, in this window; whoever starts calls keeps it.
    """

    __slots__ = (
        "_adapted_at_s",
        "_calls",
        "_fell_at_s",
        "_in_flight",
        "_limit_max",
        "_limit_min",
        "_paces",
        "_stood_s",
        "_until_s",
        "limit",
        "peak",
    )

    def __init__(self, limit_max: int) -> None:
        self._limit_max, self._limit_min = limit_max, min(LIMIT_MIN, limit_max)
        self.limit = float(limit_max)
        self.peak = 0
        self._calls, self._until_s, self._fell_at_s = 0, 0.0, -math.inf
        self._in_flight = 0  # when this window began
        self._adapted_at_s, self._stood_s = -math.inf, 0.0
        self._paces: list[Pace] = []  # of methods that had calls in this window

    def note(self, pace: Pace, took_s: float, *, in_flight: int, now_s: float) -> bool:
        """A call has ended whose time tells something.

        Args:
            pace: of its method.
            took_s: how long it took.
            in_flight: how many are under way.
            now_s: on time.monotonic().

        Returns:
            Whether a window has ended, so that the limit may be another.
        """
        if now_s - took_s < self._fell_at_s:
            return False  # it began under another limit
        if not pace.calls:
            self._paces.append(pace)
        pace.note(took_s)
        self._calls += 1
        if self._calls < WINDOW_CALLS or now_s < self._until_s:
            return False
        self._adapt(now_s, in_flight)
        self.peak = self._in_flight = in_flight
        self._until_s = now_s + WINDOW_S
        return True

    def _adapt(self, now_s: float, in_flight: int) -> None:
        judged = [pace for pace in self._paces if pace.calls >= METHOD_CALLS]
        slow = [pace for pace in judged if pace.is_slow]
        slow_calls = sum(pace.calls for pace in slow)
        if 2 * slow_calls <= sum(pace.calls for pace in judged):
            self.limit = min(self._limit_max, self.limit + math.sqrt(self.limit))
            self._stood_s = 0.0
        elif self.peak >= self._limit_min and self._stands(now_s, in_flight):
            self._fall(slow, slow_calls)
            self._fell_at_s = now_s
        self._adapted_at_s = now_s
        is_quiet = self.peak <= QUIET_CALLS
        for pace in judged:
            pace.end_window(is_quiet=is_quiet)
        self._paces = [pace for pace in self._paces if pace.calls]
        self._calls = sum(pace.calls for pace in self._paces)

    def _stands(self, now_s: float, in_flight: int) -> bool:
        """Whether the queue is one that stays, after another slow window."""
        window_s = now_s - self._adapted_at_s
        if window_s > STANDING_S:
            self._stood_s = 0.0
        elif 2 * (self._in_flight - in_flight) <= self._calls:
            self._stood_s += min(window_s, STANDING_WINDOW_S)
        else:
            return False  # it drains
        return self._stood_s >= STANDING_S

    def _fall(self, slow: list[Pace], slow_calls: int) -> None:
        if self.limit <= self._limit_min:
            for pace in slow:
                pace.approach(LEARN_AT_FLOOR)
            return
        ratio = sum(pace.ratio * pace.calls for pace in slow) / slow_calls
        # From what was really under way; one method alone has at most half of the limit.
        reached = min(self.limit, 2.0 * self.peak)
        self.limit = max(self._limit_min, reached * max(FALL_MAX, min(FALL_MIN, 1 / ratio)))
