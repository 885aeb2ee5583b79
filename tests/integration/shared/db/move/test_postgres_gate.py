"""A replica that lacks the end of the log takes over: whose a bucket is stays what it was.

One shard of two is on a pair of servers whose primary dies; replication is cut when a move has
come to a step, so that the new primary knows nothing of what came after.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from uuid import UUID

import asyncpg
import pytest

from shared import causal
from shared.causal import Seen
from shared.clock import SystemClock
from shared.db import postgres_connection, postgres_gate
from shared.db.errors import DatabaseRefused
from shared.db.move import mover
from shared.db.move.place import move_bucket, settle_left
from shared.db.move.port import MoveFailed, MoveLost, MoveRefused
from shared.db.move.postgres_place import PostgresPlace
from shared.db.port import Shards
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_gate import pass_gate
from shared.db.postgres_replicas import LagGuard
from shared.db.postgres_shards import parse_servers
from shared.errors import Unavailable
from tests.fakes import ManualClock
from tests.integration.shared.db.move.arena import ROOT
from tests.integration.shared.db.move.grounds import (
    ADD_ONE,
    MIGRATIONS,
    SECRET,
    add_counter,
    add_counters,
    meanwhile,
    tools,
)
from tests.integration.shared.db.move.test_moves import Killed, die
from tests.pair import Pair, running_pair

FIRST, SECOND = 5, 4000
"""Buckets: one begins on shard 0, which has Control, and one on shard 1."""

ROWS = 20
BEFORE, NEVER = "before the first step", "never"
COUNT = "SELECT count(*) AS n FROM counter WHERE bucket = $1 AND tenant = 'default'"
LOCK_CONTROL = f"SELECT pg_advisory_lock({postgres_gate._RECONCILING})"


@pytest.fixture(scope="module")
async def servers() -> AsyncIterator[Pair]:
    async with running_pair() as pair:
        yield pair


@dataclass
class Two:
    """Two shards of one service.

    Attributes:
        pair: has the shard `promoted`.
        dsns: by shard, as an operator names them: importing rows needs more than a service's role.
    """

    pair: Pair
    promoted: int
    dsns: list[str]

    @property
    def servers(self):
        return parse_servers(",".join(self.dsns), service="counters")

    @property
    def place(self) -> PostgresPlace:
        return PostgresPlace(self.servers)

    @asynccontextmanager
    async def open(self, guard: LagGuard | None = None) -> AsyncIterator[Shards]:
        async with open_postgres_shards(
            self.servers,
            migrations=MIGRATIONS,
            secret=SECRET,
            clock=SystemClock(),
            service="counters",
            lag_guard=guard,
        ) as shards:
            yield shards

    async def ask(self, shard: int, sql: str, *arguments: object) -> object:
        hosts = self.servers[shard].hosts
        node = ("primary", "replica_1").index(self.pair.nodes[0])
        connection = await asyncpg.connect(hosts[node if len(hosts) > 1 else 0])
        try:
            return await connection.fetchval(sql, *arguments)
        finally:
            await connection.close()

    async def states(self, bucket: int) -> list[object]:
        sql = "SELECT state FROM tenfold_bucket WHERE bucket = $1"
        return [await self.ask(shard, sql, bucket) or "ABSENT" for shard in (0, 1)]

    async def move(self, bucket: int, *, cut_at: str, dies_at: str = NEVER) -> None:
        """Move it to the other shard; from a step on nothing reaches the replica."""
        left = {cut_at: partial(meanwhile, self.pair.cut), dies_at: die}

        def visit(step: str) -> None:
            if step in left:
                left.pop(step)()

        if cut_at == BEFORE:
            visit(BEFORE)
        clock = SystemClock() if dies_at == NEVER else ManualClock()
        to = 1 if bucket == FIRST else 0
        try:
            await move_bucket(self.place, bucket, to, replace(tools(visit=visit), clock=clock))
        except Killed:
            assert dies_at != NEVER
        assert cut_at not in left


@asynccontextmanager
async def two_shards(pair: Pair, postgres_server, promoted: int) -> AsyncIterator[Two]:
    if pair.nodes[1] not in pair.processes:
        await pair.remake()
    primary, _ = pair.nodes
    await pair.ask(primary, "DROP DATABASE IF EXISTS counters", "CREATE DATABASE counters")
    [other] = await postgres_server.make_databases(1)
    first, second = pair.addresses
    own = pair.site.admin_dsn(first, "counters").replace(f"{first}", f"{first},{second}")
    site, address = postgres_server.site, postgres_server.address
    dsns = [site.admin_dsn(address, other.rpartition("/")[2]), own]
    try:
        yield Two(pair, promoted, dsns if promoted == 1 else dsns[::-1])
    finally:
        await postgres_server.drop_databases([other])


async def write(shards: Shards, bucket: int, counter_id: UUID) -> None:
    async with shards.bucket(bucket).transaction() as tx:
        assert await tx.execute(ADD_ONE, bucket, counter_id) == 1


async def is_written(shards: Shards, bucket: int, counter_id: UUID) -> bool:
    try:
        await write(shards, bucket, counter_id)
    except Unavailable:
        return False
    return True


# Which shard's primary dies, which bucket is on its way, where replication stops, where the mover
# dies if it does; and what the shards say of the bucket afterwards.
LOST = {
    "the source forgets that it gave it away": (1, SECOND, "verify", NEVER, ["ACTIVE", "MOVED"]),
    "the source forgets the fence behind the decision": (
        *(1, SECOND, "capture2", "commit"),
        ["ACTIVE", "MOVED"],
    ),
    "the source forgets the fence before the decision": (
        *(1, SECOND, "verify", "fence2"),
        ["ABORTED", "ACTIVE"],
    ),
    "the destination forgets that it was given it": (
        *(1, FIRST, "copied", NEVER),
        ["ACTIVE", "ABORTED"],
    ),
    "the destination forgets rows behind the decision": (
        *(1, FIRST, "capture2", "src_moved"),
        ["ACTIVE", "ABORTED"],
    ),
    "Control and the source forget the whole move": (0, FIRST, BEFORE, NEVER, ["MOVED", "ACTIVE"]),
    "Control and the source forget the decision": (
        *(0, FIRST, "fence2", "src_moved"),
        ["ACTIVE", "ABORTED"],
    ),
    "Control and the destination forget the end": (
        *(0, SECOND, "copied", NEVER),
        ["ABORTED", "ACTIVE"],
    ),
}

RARE = {
    "the source forgets the fence before the decision",
    "the destination forgets rows behind the decision",
    "Control and the source forget the decision",
    "Control and the destination forget the end",
}


@pytest.mark.parametrize(
    ("promoted", "bucket", "cut_at", "dies_at", "states"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.rare] if name in RARE else [])
        for name, case in LOST.items()
    ],
)
async def test_a_bucket_has_one_owner_with_all_of_its_rows_after_a_failover(
    servers, postgres_server, monkeypatch, promoted, bucket, cut_at, dies_at, states
):
    monkeypatch.setattr(mover, "STANDBY_TRIES_MAX", 1)
    async with two_shards(servers, postgres_server, promoted) as two, two.open() as shards:
        counters = await add_counters(shards, ROWS, bucket=bucket)
        await servers.replicated()
        await two.move(bucket, cut_at=cut_at, dies_at=dies_at)
        await servers.fail_over()
        await pass_gate(two.servers, promoted)
        await settle_left(two.place, bucket, tools())
        assert await two.states(bucket) == states
        await write(shards, bucket, counters[0])
        assert await two.ask(states.index("ACTIVE"), COUNT, bucket) == ROWS
        assert await two.place.control.list_moves(is_open=True) == []
        shown = (await two.place.control.read_map()).shard_index(bucket)
        assert shown == states.index("ACTIVE")


async def test_nobody_is_let_in_before_control_was_asked(servers, postgres_server, monkeypatch):
    monkeypatch.setattr(mover, "STANDBY_TRIES_MAX", 1)
    monkeypatch.setattr(postgres_connection, "LOCK_S_MAX", 0.2)
    async with two_shards(servers, postgres_server, 1) as two, two.open() as shards:
        [counter_id] = await add_counters(shards, 1, bucket=SECOND)
        [elsewhere] = await add_counters(shards, 1, bucket=FIRST)
        await servers.replicated()
        await two.move(SECOND, cut_at="capture")
        await servers.fail_over()
        control = await asyncpg.connect(two.dsns[0])
        await control.execute(LOCK_CONTROL)
        assert await two.states(SECOND) == ["ACTIVE", "MOVING"]
        for number in (SECOND + 1, SECOND + 2):
            with pytest.raises(Unavailable) as refused:
                await add_counters(shards, 1, bucket=number)
            assert refused.value.retry_after_s
        with pytest.raises((DatabaseRefused, MoveRefused, MoveFailed), match="was promoted"):
            await move_bucket(two.place, SECOND + 1, 0, tools())
        await write(shards, FIRST, elsewhere)  # another shard is not hurt
        await control.close()
        async with asyncio.timeout(30):
            while not await is_written(shards, SECOND, counter_id):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await two.states(SECOND) == ["ACTIVE", "MOVED"]


async def test_one_process_passes_the_gate_and_the_others_find_it_open(servers, postgres_server):
    async with two_shards(servers, postgres_server, 1) as two, two.open() as shards:
        await add_counters(shards, 1, bucket=SECOND)
        await servers.replicated()
        await servers.fail_over()
        passed = await asyncio.gather(*(pass_gate(two.servers, 1) for _ in range(4)))
        assert sum(one.was != one.timeline for one in passed) == 1
        assert len({one.timeline for one in passed}) == 1
        known = "SELECT timeline FROM tenfold_control.shard WHERE shard_id = 1"
        assert await two.ask(0, known) == passed[0].timeline


async def test_replicas_answer_again_after_the_gate_and_no_token_of_before_misleads_them(
    servers, postgres_server
):
    async with two_shards(servers, postgres_server, 1) as two, two.open(LagGuard()) as shards:
        replicas = shards.all()[1].replicas
        causal.begin(before := Seen())
        await add_counters(shards, 1, bucket=SECOND)
        await servers.replicated()
        await servers.fail_over()
        await servers.remake()
        causal.begin(Seen())
        async with shards.bucket(SECOND).transaction() as tx:
            await add_counter(tx, 1)
        await servers.replicated()

        async def read(token: str = "") -> int:
            causal.begin(Seen.of_token(token, may_lag=True))
            return (await shards.bucket(SECOND).causal.fetch_one(COUNT, SECOND))["n"]

        async with asyncio.timeout(30):
            while not replicas.answered_count:
                assert await read() in {1, 2}  # as old as the lag guard allows
                await asyncio.sleep(0.02)
        answered = replicas.answered_count
        assert await read(before.token()) == 2
        assert replicas.answered_count == answered  # the primary was asked
        async with asyncio.timeout(30):
            while replicas.answered_count == answered:
                assert await read() == 2
    causal.begin(None)


async def test_a_mover_that_lives_finds_itself_replaced_by_the_gate(servers, postgres_server):
    async with two_shards(servers, postgres_server, 1) as two, two.open() as shards:
        counters = await add_counters(shards, ROWS, bucket=SECOND)
        await servers.replicated()
        loop = asyncio.get_running_loop()
        reached, goes_on = asyncio.Event(), asyncio.Event()

        def stop(step: str) -> None:
            if step == "copied" and not reached.is_set():
                loop.call_soon_threadsafe(reached.set)
                asyncio.run_coroutine_threadsafe(goes_on.wait(), loop).result(30)

        moving = asyncio.create_task(
            asyncio.to_thread(asyncio.run, move_bucket(two.place, SECOND, 0, tools(visit=stop)))
        )
        await reached.wait()
        await servers.fail_over()
        await pass_gate(two.servers, 1)
        goes_on.set()
        with pytest.raises((MoveLost, MoveFailed)):
            await moving
        assert await two.states(SECOND) == ["ABORTED", "ACTIVE"]
        await write(shards, SECOND, counters[0])


async def tenfold(two: Two, *arguments: str) -> tuple[int | None, str, str]:
    command = [sys.executable, "-m", "deploy.cli", "shards", *arguments]
    pipe = asyncio.subprocess.PIPE
    environ = {**os.environ, "TENFOLD_MEDIA_DATABASE": ",".join(two.dsns)}
    running = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environ, stdout=pipe, stderr=pipe
    )
    out, err = await running.communicate()
    return running.returncode, out.decode(), err.decode()


async def test_the_operator_promotes_a_replica_and_services_follow(servers, postgres_server):
    async with two_shards(servers, postgres_server, 1) as two, two.open() as shards:
        [counter_id] = await add_counters(shards, 1, bucket=SECOND)
        await servers.replicated()
        code, _, err = await tenfold(two, "promote", "media/1")
        assert (code, "has a primary that takes writes" in err) == (1, True)
        primary, replica = servers.nodes
        await servers.end(primary, signal.SIGKILL)
        code, _, err = await tenfold(two, "promote", "media/1", "--to", "127.0.0.1:1")
        assert (code, "no replica that answers at 127.0.0.1:1" in err) == (1, True)
        code, out, err = await tenfold(two, "promote", "media/1", "--json")
        assert code == 0, err
        servers.is_swapped = not servers.is_swapped
        told = json.loads(out)
        assert told["primary"].startswith(str(servers.address(replica)))
        assert told["silent"] == [f"{servers.address(primary)}/counters"]
        assert (told["settled"], told["problems"]) == ({}, [])
        async with asyncio.timeout(30):
            while not await is_written(shards, SECOND, counter_id):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (
            await two.ask(0, "SELECT timeline FROM tenfold_control.shard WHERE shard_id = 1")
            == (told["timeline"])
        )


@pytest.mark.parametrize(
    ("shard", "sentence"),
    [("media/9", "There is no shard 9"), ("media", "names no shard"), ("moon/1", "no service")],
)
async def test_a_shard_that_is_none_is_not_promoted(servers, postgres_server, shard, sentence):
    async with two_shards(servers, postgres_server, 1) as two:
        code, _, err = await tenfold(two, "promote", shard)
        assert (code, sentence in err) == (1, True), err
