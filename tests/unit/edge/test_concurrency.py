"""The limit of an upstream: it falls while calls are slow, and only then."""

import heapq
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.concurrency import LIMIT_MIN, SLACK_S, AdaptiveLimit, Pace


class Server:
    """A server of so many workers, each call taking as long, under the limit; time is made up."""

    def __init__(self, limit: AdaptiveLimit, *, work_s: float, workers: int = 1) -> None:
        self.limit, self.pace = limit, Pace()
        self.work_s = work_s
        self._free_at_s = [0.0] * workers
        self._running: list[tuple[float, float]] = []  # end, begin
        self.answered = self.refused = 0
        self.times_s: list[float] = []

    def offer(self, calls_per_s: float, *, since_s: float, seconds: float) -> None:
        """Calls at a steady rate, whatever becomes of them."""
        for number in range(int(calls_per_s * seconds)):
            self._arrive(since_s + number / calls_per_s)
        self._end_until(since_s + seconds)

    def _arrive(self, now_s: float) -> None:
        self._end_until(now_s)
        if len(self._running) >= self.limit.limit:
            self.refused += 1
            return
        begin_s = max(now_s, heapq.heappop(self._free_at_s))
        heapq.heappush(self._free_at_s, begin_s + self.work_s)
        heapq.heappush(self._running, (begin_s + self.work_s, now_s))
        self.limit.peak = max(self.limit.peak, len(self._running))

    def _end_until(self, now_s: float) -> None:
        while self._running and self._running[0][0] <= now_s:
            end_s, begin_s = heapq.heappop(self._running)
            self.answered += 1
            self.times_s.append(end_s - begin_s)
            in_flight = len(self._running)
            self.limit.note(self.pace, end_s - begin_s, in_flight=in_flight, now_s=end_s)


def test_it_begins_at_its_maximum_and_stays_there_while_calls_are_fast() -> None:
    server = Server(AdaptiveLimit(100), work_s=0.005)
    server.offer(100, since_s=0, seconds=10)
    assert (server.limit.limit, server.refused) == (100, 0)


def test_a_burst_that_is_over_in_a_moment_changes_nothing() -> None:
    server = Server(AdaptiveLimit(1000), work_s=0.002)
    server.offer(100, since_s=0, seconds=10)
    for burst in range(10):
        server.offer(30_000, since_s=10 + 2 * burst, seconds=0.015)  # 450 calls, 0.9 s of work
        server.offer(10, since_s=10.015 + 2 * burst, seconds=1.9)
    assert (server.limit.limit, server.refused) == (1000, 0)


@pytest.mark.parametrize("calls", [80, 450])
@pytest.mark.parametrize("work_s", [0.02, 0.05, 0.1], ids=["10 x", "25 x", "50 x"])
def test_a_burst_on_a_busy_machine_is_none_behind_whom_others_wait(
    work_s: float, calls: int
) -> None:
    server = Server(AdaptiveLimit(1000), work_s=0.002)
    server.offer(100, since_s=0, seconds=10)
    server.work_s = work_s  # other processes have the machine
    for burst in range(3):
        server.offer(calls / 0.5, since_s=10 + 60 * burst, seconds=0.5)
        server.offer(10, since_s=10.5 + 60 * burst + calls * work_s, seconds=5)
    assert (server.limit.limit, server.refused) == (1000, 0)


def test_a_machine_that_stood_still_between_two_slow_windows_is_no_overload() -> None:
    limit, pace = AdaptiveLimit(100), Pace()
    limit.peak = 50
    now_s, pauses_s = 0.0, [0.01] * 100 + [0.01] * 40 + [1.8] + [0.01] * 40
    for number, pause_s in enumerate(pauses_s):
        now_s += pause_s
        took_s = 0.002 if number < 100 else 0.3
        limit.note(pace, took_s, in_flight=50, now_s=now_s)
    assert limit.limit == 100


@pytest.mark.parametrize(
    ("workers", "work_s"),
    [(1, 0.002), (1, 0.01), (4, 0.002), (4, 0.01), (4, 0.1), (16, 0.01), (16, 0.1)],
)
def test_at_five_times_capacity_all_of_it_is_used_and_answers_stay_fast(
    workers: int, work_s: float
) -> None:
    server, capacity = Server(AdaptiveLimit(1000), work_s=work_s, workers=workers), workers / work_s
    server.offer(capacity / 2, since_s=0, seconds=10)
    server.offer(capacity * 5, since_s=10, seconds=30)  # it finds its limit
    server.answered, server.times_s = 0, []
    server.offer(capacity * 5, since_s=40, seconds=60)
    assert server.answered >= 0.8 * capacity * 60
    late_s = sorted(server.times_s)[int(0.99 * len(server.times_s))]
    assert late_s <= max(12 * work_s, 4 * (2 * work_s + SLACK_S))


def test_it_is_back_within_ten_seconds_of_normal_load() -> None:
    server = Server(AdaptiveLimit(1000), work_s=0.005)
    server.offer(100, since_s=0, seconds=10)
    server.offer(1000, since_s=10, seconds=30)
    assert server.limit.limit < 50
    server.offer(100, since_s=40, seconds=1)
    refused = server.refused
    server.offer(100, since_s=41, seconds=9)
    assert server.refused == refused
    assert server.limit.limit > 500


def test_a_server_that_has_become_slower_for_good_is_used_again_soon() -> None:
    limit = AdaptiveLimit(1000)
    server = Server(limit, work_s=0.01, workers=1000)
    server.offer(1000, since_s=0, seconds=5)
    server.work_s = 0.3  # nobody waits for anybody: the number of calls is not to blame
    server.offer(1000, since_s=5, seconds=20)
    refused = server.refused
    server.offer(1000, since_s=25, seconds=20)
    assert server.refused == refused


def test_a_method_that_was_always_slow_is_not_taken_for_overload() -> None:
    limit, fast, slow = AdaptiveLimit(100), Pace(), Pace()
    limit.peak = 50
    for number in range(10_000):
        limit.note(fast, 0.002, in_flight=50, now_s=number / 100)
        limit.note(slow, 10.0, in_flight=50, now_s=number / 100)
    assert limit.limit == 100


def test_few_calls_are_no_load_whatever_they_take() -> None:
    limit, pace = AdaptiveLimit(100), Pace()
    for number in range(1000):
        took_s = 0.001 if number < 100 else 5.0
        limit.note(pace, took_s, in_flight=LIMIT_MIN - 1, now_s=number / 10)
    assert limit.limit == 100


def test_one_call_that_hangs_moves_nothing() -> None:
    limit, pace = AdaptiveLimit(100), Pace()
    for number in range(1000):
        took_s = 30.0 if number % 100 == 99 else 0.005
        limit.note(pace, took_s, in_flight=50, now_s=number / 100)
    assert limit.limit == 100


@given(
    st.integers(1, 2000),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 2000), st.floats(0, 1)), max_size=400),
)
def test_whatever_calls_take_it_stays_within_its_bounds(
    limit_max: int, calls: list[tuple[float, int, float]]
) -> None:
    limit, paces, now_s = AdaptiveLimit(limit_max), [Pace(), Pace()], 0.0
    for number, (took_s, peak, pause_s) in enumerate(calls):
        now_s += pause_s
        limit.note(paces[number % 2], took_s, in_flight=peak, now_s=now_s)
        assert min(LIMIT_MIN, limit_max) <= limit.limit <= limit_max
        assert math.isfinite(limit.limit)
