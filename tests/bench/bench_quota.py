"""Quota decisions: leased and strict, beside the fixed window that most people write.

The peer is redis-py's asyncio client with hiredis: INCR, and EXPIRE when the counter is new. Both
sides ask the same real Valkey, on loopback; ours decides two levels at once, the caller's and its
tenant's, the peer one. CPU is that of the deciding process, and of Valkey, user and system. Rounds
alternate between the sides; a figure is the median of the rounds, a ratio that of neighbours.

  leased   one caller at half of its limit, over four edges, in virtual time: what a call costs,
           the questions that bring leases included
  strict   every decision is one question to Valkey; sixteen at once
  alone    Valkey is away: the edge's own share decides
  refused  a refusal that still holds is repeated
  edge     what passes within a fifth of the window, around its edge, in multiples of the limit:
           a burst before it and one after it. In a whole window both may pass twice the limit.

  make bench-quota                    about a minute
  make bench-quota ARGS=--quick       a few seconds, to see that it works; figures are rough
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import uvloop
from redis.asyncio import BlockingConnectionPool, Redis

from edge.quota_valkey import ValkeyQuotas
from shared.quota.gcra import Quota
from tests.bench.sides.children import BESIDE, MEASURED, cpu_s
from tests.bench.sides.looks import Row, print_rows, row, tell
from tests.integration.edge.quotas import (
    AWAY,
    Caller,
    Valkey,
    passed,
    stores_on,
    valkey_of_its_own,
)

EDGES = 4
LIMIT_PER_S, BURST_POINTS = 600, 1200
OWN = Quota("api", BURST_POINTS, 1 / LIMIT_PER_S)
TENANT = Quota("tenant", 40_000, 1 / 20_000)
PLENTY = Quota("plenty", 1_000_000_000, 0.000001)
AT_ONCE = 16
WINDOW_S, WINDOW_LIMIT = 2.0, 400
EDGE_PART = 0.2


@dataclass(frozen=True)
class Effort:
    """How long it looks."""

    rounds: int
    decisions: int


@dataclass(frozen=True)
class Look:
    """What one decision cost, in one round.

    Attributes:
        own_us: CPU of the deciding process.
        valkey_us: CPU of Valkey.
        questions: round trips.
    """

    own_us: float
    valkey_us: float
    questions: float


class SteadyClock:
    """A clock that somebody else moves, for next to nothing."""

    def __init__(self) -> None:
        self.at_s = 0.0
        self._start = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        """See shared.clock.Clock."""
        return self._start + timedelta(seconds=self.at_s)

    def monotonic_s(self) -> float:
        """See shared.clock.Clock."""
        return self.at_s


Decide = Callable[[int], Awaitable[float]]


async def look_at(valkey: Valkey, decide: Decide, decisions: int) -> Look:
    """What so many decisions cost; `decide` tells how many round trips they took."""
    before, valkey_before = time.process_time(), cpu_s(valkey.pid)
    questions = await decide(decisions)
    own_s, valkey_s = time.process_time() - before, cpu_s(valkey.pid) - valkey_before
    return Look(own_s / decisions * 1e6, valkey_s / decisions * 1e6, questions / decisions)


class FixedWindow:
    """The peer: INCR, and EXPIRE for a counter that is new."""

    def __init__(self, redis: "Redis", window_s: float) -> None:
        self._redis, self._window_ms = redis, int(window_s * 1000)
        self.questions = 0

    async def may_pass(self, key: str, limit: int) -> bool:
        """Count one call."""
        self.questions += 1
        count = await self._redis.incr(key)
        if count == 1:
            self.questions += 1
            await self._redis.pexpire(key, self._window_ms)
        return count <= limit

    async def one_after_the_other(self, decisions: int) -> float:
        """See Decide."""
        before, key = self.questions, f"bench:{uuid4()}"
        for _ in range(decisions):
            await self.may_pass(key, 1_000_000_000)
        return self.questions - before

    async def many_at_once(self, decisions: int) -> float:
        """See Decide."""
        before = self.questions
        share = decisions // AT_ONCE
        await asyncio.gather(*(self.one_after_the_other(share) for _ in range(AT_ONCE)))
        return self.questions - before


async def leased(url: str, decisions: int) -> float:
    """See Decide. Half of the limit, over four edges."""
    clock, caller = SteadyClock(), Caller.of(OWN, TENANT)
    async with stores_on(url, EDGES, clock=clock, server_clock=clock) as stores:
        accounts = [caller.at(store) for store in stores]
        for number in range(decisions):
            clock.at_s += 2 / LIMIT_PER_S
            store, account = stores[number % EDGES], accounts[number % EDGES]
            if store.decide_now(account, 1, is_strict=False) is None:
                await store.decide(account, 1, is_strict=False)
        return sum(store.counts.asked for store in stores)


async def strict(store: ValkeyQuotas, decisions: int) -> float:
    """See Decide."""
    before = store.counts.asked

    async def ask() -> None:
        account = Caller.of(PLENTY, PLENTY).at(store)
        for _ in range(decisions // AT_ONCE):
            await store.decide(account, 1, is_strict=True)

    await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    return store.counts.asked - before


async def known(store: ValkeyQuotas, decisions: int) -> float:
    """See Decide. Without Valkey, or of a caller that was just refused."""
    account = Caller.of(Quota("api", 1, 3600.0), TENANT).at(store)
    await store.decide(account, 1, is_strict=False)
    await store.decide(account, 1, is_strict=False)
    asked = 0
    for _ in range(decisions):
        if store.decide_now(account, 1, is_strict=False) is None:
            asked += 1
            await store.decide(account, 1, is_strict=False)
    return asked


async def at_edge(may_pass: Callable[[], Awaitable[int]]) -> float:
    """What passes in two bursts around a window's edge, in multiples of the limit."""
    await may_pass()  # the first call: a window begins
    await asyncio.sleep(WINDOW_S * (1 - EDGE_PART / 2))
    before = await may_pass()
    await asyncio.sleep(WINDOW_S * EDGE_PART)
    return (before + await may_pass()) / WINDOW_LIMIT


async def edge_row(url: str, peer: FixedWindow) -> Row:
    """How exact both are at a window's edge."""
    quota, key = Quota("api", WINDOW_LIMIT, WINDOW_S / WINDOW_LIMIT), f"bench:{uuid4()}"
    calls, peer_calls = (iter([1, 2 * WINDOW_LIMIT, 2 * WINDOW_LIMIT]) for _ in range(2))

    async def peers() -> int:
        calls = (peer.may_pass(key, WINDOW_LIMIT) for _ in range(next(peer_calls)))
        return sum(await asyncio.gather(*calls))

    caller = Caller.of(quota)
    async with stores_on(url, 1) as [store]:
        ours, theirs = await asyncio.gather(
            at_edge(lambda: passed(caller, store, next(calls))), at_edge(peers)
        )
    return row("edge: passed around a window's edge", "x limit", ours, theirs)


async def overshoot(url: str) -> float:
    """What four edges let pass at once of a full bucket, leases at their worst; x its burst."""
    quota, clock = Quota("api", BURST_POINTS, 0.001), SteadyClock()
    caller = Caller.of(quota)
    async with stores_on(url, EDGES, clock=clock, server_clock=clock) as stores:
        for store in stores:
            await passed(caller, store, 3)
        clock.at_s += 5  # full again, with every lease still held
        calls = (caller.spend(store) for store in stores * BURST_POINTS)
        verdicts = await asyncio.gather(*calls)
    return sum(verdict.is_allowed for verdict in verdicts) / BURST_POINTS


def pair_rows(what: str, ours: list[Look], peers: list[Look]) -> list[Row]:
    """CPU and round trips of one kind of decision, beside the peer's."""
    rows = []
    for name, field, unit in (
        ("CPU", "own_us", "µs"),
        ("Valkey's CPU", "valkey_us", "µs"),
        ("round trips", "questions", "each"),
    ):
        mine, theirs = ([getattr(look, field) for look in looks] for looks in (ours, peers))
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        figures = statistics.median(mine), statistics.median(theirs)
        rows.append(row(f"{what}: {name} per decision", unit, *figures, ratio=ratio))
    return rows


async def run(valkey: Valkey, effort: Effort) -> list[Row]:
    """Look at everything, in alternating rounds."""
    async with AsyncExitStack() as stack:
        pool = BlockingConnectionPool.from_url(valkey.url, max_connections=AT_ONCE)
        redis = await stack.enter_async_context(Redis(connection_pool=pool))
        peer = FixedWindow(redis, 60.0)
        [store] = await stack.enter_async_context(stores_on(valkey.url, 1))
        [alone] = await stack.enter_async_context(stores_on(AWAY, 1, timeout_s=0.1))
        sides: dict[str, Decide] = {
            "leased": lambda count: leased(valkey.url, count),
            "peer": peer.one_after_the_other,
            "strict": lambda count: strict(store, count),
            "peer at once": peer.many_at_once,
            "alone": lambda count: known(alone, count),
            "refused": lambda count: known(store, count),
        }
        looks: dict[str, list[Look]] = {name: [] for name in sides}
        for number in range(effort.rounds):
            tell(f"round {number + 1} of {effort.rounds}")
            for name, decide in sides.items():
                looks[name].append(await look_at(valkey, decide, effort.decisions))
        rows = pair_rows("leased", looks["leased"], looks["peer"])
        rows += pair_rows("strict", looks["strict"], looks["peer at once"])
        rows += pair_rows("alone", looks["alone"], looks["peer"])[:1]
        rows += pair_rows("refused", looks["refused"], looks["peer"])[:1]
        share = 100 * (1 - statistics.median(look.questions for look in looks["leased"]))
        nothing = {"peer": None, "ratio": None}
        what = "leased: decisions without a round trip"
        rows.append(row(what, "%", share, 1, better="higher") | nothing)
        rows.append(await edge_row(valkey.url, FixedWindow(redis, WINDOW_S)))
        worst = await overshoot(valkey.url)
        rows.append(row("leased: passed at once, worst timing", "x burst", worst, 1) | nothing)
    return rows


def main() -> None:
    """Print a table, then the one JSON line that scripts read."""
    parser = argparse.ArgumentParser(
        prog="make bench-quota",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a short run with rough figures")
    is_quick = parser.parse_args().quick
    effort = Effort(2, 1600) if is_quick else Effort(7, 16_000)
    with tempfile.TemporaryDirectory() as folder, valkey_of_its_own(Path(folder)) as valkey:
        os.sched_setaffinity(valkey.pid, BESIDE)
        os.sched_setaffinity(0, MEASURED)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rows = runner.run(run(valkey, effort))
    print_rows("quota", "uvloop", rows)


if __name__ == "__main__":
    main()
