"""Who finds a place at an upstream, who waits, and who is refused."""

import asyncio
from dataclasses import replace

import pytest
from tenfold.options.v1 import policy_pb2

from edge.contracts import MethodInfo, load_contracts
from edge.guards import Guards, MethodGuard, UpstreamGuard, Urgency, urgency_of
from shared.errors import DeadlineExceeded, NotFound, Overloaded, Unavailable, Unreachable
from shared.telemetry.metrics import Metrics

METHODS = {method.full_name: method for method in load_contracts().methods()}
READ = METHODS["/tenfold.ledger.v1.LedgerService/GetAccount"]
WRITE = METHODS["/tenfold.ledger.v1.LedgerService/TransferFunds"]
PATIENT_S = 60.0


def upstream(calls_max: int = 20, share: float = 0.5) -> UpstreamGuard:
    return UpstreamGuard(calls_max, share, lambda: float("-inf"))


def method(
    guard: UpstreamGuard, urgency: Urgency = Urgency.READ, name: str = "/a/B"
) -> MethodGuard:
    cost_points = 10 if urgency is Urgency.COSTLY else 1
    options = policy_pb2.MethodPolicy(quota=policy_pb2.Quota(cost_points=cost_points))
    is_write = urgency is not Urgency.READ
    made = MethodGuard(
        replace(READ, full_name=name, options=options, has_side_effects=is_write, rule=None), guard
    )
    assert made.urgency is urgency
    return made


def fill(guard: MethodGuard) -> int:
    """Take every place there is."""
    places = 0
    while guard.try_enter():
        places += 1
    return places


def fail(guard: MethodGuard, error: type[Exception], times: int = 200) -> None:
    for _ in range(times):
        guard.note_error(error("x"), guard.pass_breakers(), 0.0, PATIENT_S)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("info", "urgency"),
    [
        (READ, Urgency.READ),
        (WRITE, Urgency.COSTLY),
        (METHODS["/tenfold.auth.v1.SessionService/RefreshSession"], Urgency.USUAL),
        (METHODS["/tenfold.media.v1.VideoService/WatchVideo"], Urgency.USUAL),
    ],
    ids=["a cheap read", "a transfer", "a refresh", "a stream"],
)
def test_the_contract_says_how_urgent_a_method_is(info: MethodInfo, urgency: Urgency) -> None:
    assert urgency_of(info) is urgency


def test_one_method_has_its_part_and_others_find_the_rest() -> None:
    guard = upstream()
    slow, quick = method(guard, name="/a/Slow"), method(guard, name="/a/Quick")
    assert fill(slow) == 10
    assert fill(quick) == 10
    quick.leave()
    assert not slow.try_enter()
    assert quick.try_enter()


def test_costly_calls_are_refused_before_usual_ones_and_those_before_reads() -> None:
    guard = upstream(share=1.0)
    places = [fill(method(guard, urgency)) for urgency in reversed(Urgency)]
    assert places == [15, 3, 2]


async def test_a_call_waits_for_a_moment_and_gets_the_place_that_another_leaves() -> None:
    guard = upstream()
    one = method(guard)
    fill(one)
    waiting = asyncio.create_task(one.wait())
    await asyncio.sleep(0)
    one.leave()
    await waiting
    assert (one.in_flight, guard.in_flight, guard.waiting) == (10, 10, 0)


async def test_who_waits_in_vain_is_refused_and_told_when_to_come_back() -> None:
    guard = upstream()
    one = method(guard)
    fill(one)
    with pytest.raises(Overloaded) as refusal:
        await one.wait()
    assert refusal.value.retry_after_s
    assert (one.in_flight, guard.waiting, guard.shed[Urgency.READ]) == (10, 0, 1)


async def test_few_may_wait_and_all_others_are_refused_before_their_body_is_read() -> None:
    guard = upstream()
    one = method(guard)
    fill(one)
    one.check()
    waiting = [asyncio.create_task(one.wait()) for _ in range(int(guard.waiting_max) + 1)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        one.check()
    await asyncio.gather(*waiting, return_exceptions=True)
    one.check()


async def test_the_most_urgent_of_those_that_wait_is_the_first() -> None:
    guard = upstream(share=1.0)
    write, read = method(guard, Urgency.USUAL, "/a/Write"), method(guard, name="/a/Read")
    fill(read)
    waiting = [asyncio.create_task(guard_.wait()) for guard_ in (write, read)]
    await asyncio.sleep(0)
    read.leave()
    await asyncio.sleep(0)
    assert (write.in_flight, read.in_flight) == (0, 20)
    for _ in range(3):
        read.leave()
    await asyncio.gather(*waiting)
    assert (write.in_flight, read.in_flight) == (1, 17)


async def test_a_cancelled_wait_leaves_no_trace_whenever_it_is_cancelled() -> None:
    guard = upstream()
    one = method(guard)
    fill(one)
    early = asyncio.create_task(one.wait())
    late = asyncio.create_task(one.wait())
    await asyncio.sleep(0)
    early.cancel()
    await asyncio.sleep(0)
    one.leave()  # gives the place to the late one, which is cancelled before it can run
    late.cancel()
    results = await asyncio.gather(early, late, return_exceptions=True)
    assert {type(result) for result in results} == {asyncio.CancelledError}
    assert (one.in_flight, guard.in_flight, guard.waiting) == (9, 9, 0)


def failing(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of which each look is a tenth of a second later; it may be set."""
    now = [1000.0]

    def tick() -> float:
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr("edge.guards.time.monotonic", tick)
    return now


def test_an_unreachable_upstream_is_asked_no_more_by_any_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch)
    guard = upstream()
    one, other = method(guard), method(guard, name="/a/Other")
    with pytest.raises(Unavailable) as refusal:
        fail(one, Unreachable)
    assert 0 < (refusal.value.retry_after_s or 0) <= 5
    with pytest.raises(Unavailable):
        other.check()


def test_a_method_that_hangs_is_asked_no_more_and_others_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch)
    guard = upstream()
    one, other = method(guard), method(guard, name="/a/Other")
    with pytest.raises(Unavailable):
        fail(one, DeadlineExceeded)
    other.check()
    other.pass_breakers()


@pytest.mark.parametrize("error", [NotFound, Unavailable, Overloaded])
def test_what_a_service_puts_into_words_shows_that_it_lives(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch)
    one = method(upstream())
    fail(one, error)
    one.check()


def test_a_deadline_that_the_client_made_short_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch)
    one = method(upstream())
    for _ in range(200):
        one.note_error(DeadlineExceeded("x"), one.pass_breakers(), 0.0, 0.5)
    one.check()


def test_a_new_connection_is_worth_a_try_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = failing(monkeypatch)
    served_at_s = [0.0]
    guard = UpstreamGuard(20, 0.5, lambda: served_at_s[0])
    one = method(guard)
    with pytest.raises(Unavailable):
        fail(one, Unreachable)
    served_at_s[0] = now[0] + 0.1
    rounds = one.pass_breakers()
    with pytest.raises(Unavailable):
        one.check()  # one probe at a time
    one.note_life(rounds)
    one.check()


def test_guards_outlive_the_contracts_that_named_them() -> None:
    class _Channels:
        def unary_channel(self, service: str) -> None: ...

    guards = Guards(
        _Channels(),  # type: ignore[arg-type]
        lambda service: "here",
        calls_max=9,
        method_share=1.0,
        metrics=Metrics(),
    )
    first = guards.of(READ)
    first.try_enter()
    again = guards.of(replace(READ, has_side_effects=True, rule=None))
    assert (again.in_flight, again.urgency) == (1, Urgency.USUAL)
    assert guards.of(WRITE).upstream is again.upstream
