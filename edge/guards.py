"""What stands between requests and the services: breakers, limits, and who is refused first.

Calls are counted per upstream, which is one target of ours, and in it per method. A method has at
most a part of its upstream's limit (a bulkhead: what hangs in one method leaves room for all
others), and a class of methods at most a share of it, so that the more urgent ones find room when
the others find none. A call that finds no place waits for a moment; so do only a few. Everybody
else is refused at once, if possible before the body of the request is even read.

| class | methods, by their contract | share of the limit |
|---|---|---|
| READ | unary, changes nothing, costs one point | all |
| USUAL | all others | nine tenths |
| COSTLY | what costs COSTLY_POINTS or more | three quarters |

The edge's own health answers pass none of this. Streams stay open for long, so they count against
limits of their own (streams per caller, requests in flight); only breakers stop them.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from functools import partial

from edge.concurrency import AdaptiveLimit, Pace
from edge.contracts import MethodInfo
from shared.errors import DeadlineExceeded, Overloaded, TenfoldError, Unavailable, Unreachable
from shared.rpc.breaker import Breaker
from shared.rpc.client import Channels
from shared.rpc.unary import PATIENCE_SHARE
from shared.telemetry.metrics import Metrics

COSTLY_POINTS = 10
# How long a call waits for a place: well below the 50 ms in which a refused client shall know.
WAIT_S = 0.02
# Calls of one class that wait at one upstream, beside a quarter of its limit.
WAITING_MIN = 4
RETRY_AFTER_S = 1.0


class Urgency(IntEnum):
    """Classes of methods, the last to be refused first; see the table above."""

    READ = 0
    USUAL = 1
    COSTLY = 2


_SHARES = (1.0, 0.9, 0.75)


def urgency_of(method: MethodInfo) -> Urgency:
    """The class of a method, from its contract."""
    quota = method.options.quota
    cost_points = quota.cost_points if quota.HasField("cost_points") else 1
    if cost_points >= COSTLY_POINTS:
        return Urgency.COSTLY
    is_read = not method.has_side_effects or _is_get(method)
    is_stream = method.client_streaming or method.server_streaming
    return Urgency.READ if is_read and cost_points <= 1 and not is_stream else Urgency.USUAL


def _is_get(method: MethodInfo) -> bool:
    """Contracts without our policies say by GET that nothing changes (RFC 9110 §9.2.1)."""
    return method.rule is not None and method.rule.WhichOneof("pattern") == "get"


class UpstreamGuard:
    """What is under way at one target.

    Args:
        calls_max: the most, however fast it is.
        method_share: what one method may have of the limit, above 0 and at most 1.
        served_at_s: when a connection to it was made for the last time.

    Attributes:
        breaker: of the target as a whole.
        in_flight: unary calls under way.
        shed: calls that were refused since the start, by class.
    """

    def __init__(
        self, calls_max: int, method_share: float, served_at_s: Callable[[], float]
    ) -> None:
        self.served_at_s = served_at_s
        self.breaker = Breaker()
        self.in_flight = 0
        self.shed = [0 for _ in Urgency]
        self.methods: list[MethodGuard] = []
        self._limit = AdaptiveLimit(calls_max)
        self._method_share = method_share
        self._queues: list[deque[_Waiting]] = [deque() for _ in Urgency]
        self._waiting = 0
        self._set_rooms()

    @property
    def limit(self) -> int:
        """Calls that may be under way now."""
        return int(self._limit.limit)

    @property
    def waiting(self) -> int:
        """Calls that wait for a place."""
        return self._waiting

    def _set_rooms(self) -> None:
        limit = self._limit.limit
        self.method_room = max(1.0, limit * self._method_share)
        # What a method has beyond its part, from before the limit fell, is not taken from others.
        beyond = sum(max(0.0, method.in_flight - self.method_room) for method in self.methods)
        self.rooms = [max(1.0, limit * share) + beyond for share in _SHARES]
        self.waiting_max = WAITING_MIN + limit / 4

    def started(self) -> None:
        """One more is under way."""
        self.in_flight += 1
        self._limit.peak = max(self._limit.peak, self.in_flight)

    def took(self, pace: Pace, took_s: float, now_s: float) -> None:
        """A call has ended whose time tells something."""
        if self._limit.note(pace, took_s, in_flight=self.in_flight, now_s=now_s):
            self._set_rooms()

    def is_full_for(self, urgency: Urgency) -> bool:
        """Whether a call of this class cannot even wait."""
        return len(self._queues[urgency]) >= self.waiting_max

    async def wait(self, waiting: "_Waiting", urgency: Urgency) -> bool:
        """Wait for a place, for a moment; whether there was one, which then is taken."""
        queue = self._queues[urgency]
        queue.append(waiting)
        self._waiting += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await waiting.place
        except asyncio.CancelledError:
            if waiting.has_place:
                waiting.method.leave()
            raise
        finally:
            if not waiting.has_place:
                queue.remove(waiting)
                self._waiting -= 1
        return waiting.has_place

    def wake(self) -> None:
        """Give free places to those that wait, the most urgent first."""
        for urgency, queue in enumerate(self._queues):
            for waiting in list(queue):
                if self.in_flight >= self.rooms[urgency]:
                    break
                if waiting.method.try_enter():
                    queue.remove(waiting)
                    self._waiting -= 1
                    waiting.give()


class _Waiting:
    """A call that waits for a place."""

    __slots__ = ("has_place", "method", "place")

    def __init__(self, method: "MethodGuard") -> None:
        self.method = method
        self.place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.has_place = False

    def give(self) -> None:
        self.has_place = True
        if not self.place.done():
            self.place.set_result(None)


class MethodGuard:
    """What is under way of one method.

    A call takes a place (`try_enter`, else `wait`) and gives it back (`leave`); it passes the
    breakers, and tells one of `note_…` how it ended.
    """

    __slots__ = ("_is_stream", "_patience_s", "breaker", "in_flight", "pace", "upstream", "urgency")

    def __init__(self, method: MethodInfo, upstream: UpstreamGuard) -> None:
        self.upstream = upstream
        self.breaker = Breaker()
        self.pace = Pace()
        self.in_flight = 0
        upstream.methods.append(self)
        self.describe(method)

    def describe(self, method: MethodInfo) -> None:
        """Take over what another version of the contract says."""
        self.urgency = urgency_of(method)
        self._is_stream = method.policy.is_stream
        self._patience_s = PATIENCE_SHARE * method.policy.deadline_default_s

    # Before the call
    def check(self) -> None:
        """Refuse what has no chance, before anything is spent on it.

        Raises:
            Unavailable: a breaker is open.
            Overloaded: there is no place, and no room to wait for one.
        """
        upstream = self.upstream
        if not (upstream.breaker.is_closed and self.breaker.is_closed):
            wait_s = self._wait_s(time.monotonic())
            if wait_s > 0:
                raise _is_open(wait_s)
        has_room = self._is_stream or (
            upstream.in_flight < upstream.rooms[self.urgency]
            and self.in_flight < upstream.method_room
        )
        if not has_room and upstream.is_full_for(self.urgency):
            raise self._shed()

    def try_enter(self) -> bool:
        """Take a place, if there is one."""
        upstream = self.upstream
        if upstream.in_flight < upstream.rooms[self.urgency] and (
            self.in_flight < upstream.method_room
        ):
            upstream.started()
            self.in_flight += 1
            return True
        return False

    async def wait(self) -> None:
        """Take a place when there is one, within a moment.

        Raises:
            Overloaded: there was none.
        """
        upstream = self.upstream
        if upstream.is_full_for(self.urgency):
            raise self._shed()
        if not await upstream.wait(_Waiting(self), self.urgency):
            raise self._shed()

    def pass_breakers(self) -> tuple[int, int]:
        """The rounds of both breakers, for `note_…`; maybe as their probe.

        Raises:
            Unavailable: one is open.
        """
        whole, own = self.upstream.breaker, self.breaker
        if not (whole.is_closed and own.is_closed):
            now_s = time.monotonic()
            if self._wait_s(now_s) > 0:
                raise _is_open(self._wait_s(now_s))
            whole.admits(now_s)
            own.admits(now_s)
        return whole.round, own.round

    # After the call
    def leave(self) -> None:
        """Give the place back."""
        self.in_flight -= 1
        upstream = self.upstream
        upstream.in_flight -= 1
        if upstream.waiting:
            upstream.wake()

    def note_answer(self, rounds: tuple[int, int], began_s: float) -> None:
        """The service answered, with whatever."""
        self.upstream.breaker.note_success(rounds[0])
        self.breaker.note_success(rounds[1])
        now_s = time.monotonic()
        self.upstream.took(self.pace, now_s - began_s, now_s)

    def note_life(self, rounds: tuple[int, int]) -> None:
        """The service is there; how long it took says nothing."""
        self.upstream.breaker.note_success(rounds[0])
        self.breaker.note_success(rounds[1])

    def note_stream_error(self, error: TenfoldError, rounds: tuple[int, int]) -> None:
        """A stream ended with an error before its first message."""
        if isinstance(error, Unreachable):
            self._note_unreachable(rounds)
        elif isinstance(error, DeadlineExceeded):
            self.note_nothing(rounds)
        else:
            self.note_life(rounds)

    def note_error(
        self, error: TenfoldError, rounds: tuple[int, int], began_s: float, timeout_s: float
    ) -> None:
        """There was no answer, or it was a refusal.

        Args:
            error: what it was.
            rounds: from pass_breakers.
            began_s: when the call did.
            timeout_s: what the call had; less than the contract gives by default says nothing
                of the service when it is over.
        """
        if isinstance(error, Unreachable):
            self._note_unreachable(rounds)
        elif isinstance(error, DeadlineExceeded):
            self._note_late(rounds, began_s, is_patient=timeout_s >= self._patience_s)
        elif isinstance(error, Unavailable):  # it lives, and lacks a part
            self.note_life(rounds)
        elif isinstance(error, Overloaded):
            self.note_life(rounds)
            self._note_slow()
        else:
            self.note_answer(rounds, began_s)

    def note_nothing(self, rounds: tuple[int, int]) -> None:
        """The call ended without saying anything of the service: its client left."""
        self.upstream.breaker.note_nothing(rounds[0])
        self.breaker.note_nothing(rounds[1])

    def _note_late(self, rounds: tuple[int, int], began_s: float, *, is_patient: bool) -> None:
        """A method that hangs says nothing of the others: its upstream stays open to them."""
        self.upstream.breaker.note_nothing(rounds[0])
        if not is_patient:
            self.breaker.note_nothing(rounds[1])
            return
        now_s = time.monotonic()
        self.breaker.note_failure(rounds[1], now_s)
        self.upstream.took(self.pace, now_s - began_s, now_s)

    def _note_unreachable(self, rounds: tuple[int, int]) -> None:
        now_s = time.monotonic()
        self.upstream.breaker.note_failure(rounds[0], now_s)
        self.breaker.note_failure(rounds[1], now_s)

    def _note_slow(self) -> None:
        """It said itself that it is full."""
        if self.pace.clip_s < math.inf:
            self.upstream.took(self.pace, self.pace.clip_s, time.monotonic())

    def _wait_s(self, now_s: float) -> float:
        """How long until both breakers let a call pass; a new connection is worth a try."""
        served_at_s = self.upstream.served_at_s()
        for breaker in (self.upstream.breaker, self.breaker):
            if not breaker.is_closed and breaker.opened_at_s < served_at_s:
                breaker.hurry()
        return max(self.upstream.breaker.wait_s(now_s), self.breaker.wait_s(now_s))

    def _shed(self) -> Overloaded:
        self.upstream.shed[self.urgency] += 1
        return Overloaded(
            "The service is at its limit.", retry_after_s=RETRY_AFTER_S, reason="LIMIT_REACHED"
        )


class Guards:
    """The guards of all methods; they outlive the contracts that named them.

    Args:
        channels: lead to the services.
        target_of: the target that serves a service, by its full name.
        calls_max, method_share: see UpstreamGuard.
        metrics: where the state of each upstream is read.
    """

    def __init__(
        self,
        channels: Channels,
        target_of: Callable[[str], str],
        *,
        calls_max: int,
        method_share: float,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._channels, self._target_of = channels, target_of
        self._calls_max, self._method_share = calls_max, method_share
        self._methods: dict[str, MethodGuard] = {}
        self.upstreams: dict[str, UpstreamGuard] = {}

    def of(self, method: MethodInfo) -> MethodGuard:
        """The guard of a method; the same one for another version of its contract."""
        guard = self._methods.get(method.full_name)
        if guard is None:
            target = self._target_of(method.service)
            upstream = self.upstreams.get(target) or self._new_upstream(target, method.service)
            guard = self._methods[method.full_name] = MethodGuard(method, upstream)
        else:
            guard.describe(method)
        return guard

    def _new_upstream(self, target: str, service: str) -> UpstreamGuard:
        channel, metrics = self._channels.unary_channel(service), self._metrics
        upstream = self.upstreams[target] = UpstreamGuard(
            self._calls_max, self._method_share, lambda: channel.served_at_s
        )
        limit = metrics.gauge("tenfold_upstream_limit", "Unary calls let in at once.", "upstream")
        calls = metrics.gauge("tenfold_upstream_calls", "Unary calls under way.", "upstream")
        is_open = metrics.gauge(
            "tenfold_upstream_breaker_open", "Whether nothing is asked of it.", "upstream"
        )
        shed = metrics.counter(
            "tenfold_upstream_shed_total",
            "Calls that its limit refused, by the class of their method.",
            "upstream",
            "class",
        )
        metrics.watch(limit, lambda: upstream.limit, target)
        metrics.watch(calls, lambda: upstream.in_flight, target)
        metrics.watch(is_open, lambda: not upstream.breaker.is_closed, target)
        for urgency in Urgency:
            metrics.watch(shed, partial(upstream.shed.__getitem__, urgency), target, urgency.name)
        return upstream


def _is_open(wait_s: float) -> Unavailable:
    return Unavailable(
        "A service that is needed does not answer at the moment.",
        retry_after_s=wait_s,
        reason="UPSTREAM_DOWN",
    )
