"""What goes wrong between a service and Postgres, and what a caller is told."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from shared import deadline
from shared.db import limits, postgres, postgres_connection, postgres_pool
from shared.db.ids import new_id
from shared.db.port import OutboxRow
from shared.db.scatter import scatter
from shared.errors import (
    DeadlineExceeded,
    IdempotencyInFlight,
    InvalidRequest,
    Overloaded,
    RaceLost,
    Unavailable,
)
from tests.integration.shared.db.conftest import (
    FAR,
    INSERT_THING,
    LIST_LABELS,
    MIGRATIONS,
    NEAR,
    add_thing,
    labels,
    once,
    user,
)
from tests.integration.shared.db.proxy import Proxy, proxying

LIST_ALL = "SELECT label FROM thing WHERE tenant = $1 AND tenfold_owned(thing.bucket)"


@pytest.fixture
async def proxy(postgres_places) -> AsyncIterator[Proxy]:
    """Before the first of four shards; `proxy.place` is reached through it."""
    place = await postgres_places.make(MIGRATIONS, service="things")
    first, *others = place.name.split(",")
    async with proxying(first) as opened:
        opened.place = replace(place, name=",".join([opened.dsn, *others]))
        yield opened


@pytest.fixture
async def shards(proxy):
    async with proxy.place.open() as opened:
        yield opened


def event() -> OutboxRow:
    return OutboxRow("tenfold.things.v1.ThingMade", "things/1", b"payload", "default")


# The answer to a commit is lost -------------------------------------------------------------


@pytest.mark.parametrize("evidence", ["request id", "event"])
@pytest.mark.parametrize(
    ("fault", "committed"), [("answer", True), ("question", False), ("client", False)]
)
async def test_a_commit_whose_answer_is_lost_is_looked_up(
    proxy, shards, fault, committed, evidence
):
    asked = once(user(NEAR)) if evidence == "request id" else None

    async def add() -> None:
        async with shards.bucket(NEAR).transaction(asked) as tx:
            await add_thing(tx, "a")
            if evidence == "event":
                await tx.append_outbox(event())
            proxy.fault = fault

    if committed:
        await add()
    else:
        with pytest.raises(Unavailable, match="nothing has happened"):
            await add()
    assert await labels(shards) == (["a"] if committed else [])


async def test_a_commit_that_left_no_trace_to_look_for_is_called_unknown(proxy, shards):
    with pytest.raises(Unavailable, match="not known"):
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "a")
            proxy.fault = "answer"
    assert await labels(shards) == ["a"]


async def test_an_outcome_that_nobody_can_tell_is_called_unknown(proxy, shards, monkeypatch):
    monkeypatch.setattr(postgres, "RESOLVE_S_MAX", 0.3)
    with pytest.raises(Unavailable, match="not known"):
        async with shards.bucket(NEAR).transaction(once(user(NEAR))) as tx:
            await add_thing(tx, "a")
            proxy.fault = "answer"
            proxy.server.close()


# Servers that end, refuse or freeze -----------------------------------------------------------


async def test_a_server_that_has_restarted_is_not_noticed_by_the_next_call(proxy, shards):
    assert await labels(shards) == []
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "before")
    proxy.forget()
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "after")
    proxy.forget()
    assert await labels(shards) == ["after", "before"]


async def test_a_shard_that_is_down_is_named_and_hurts_only_its_own_buckets(proxy, shards):
    async with shards.bucket(FAR).transaction() as tx:
        await add_thing(tx, "far")
    proxy.cut()
    with pytest.raises(Unavailable, match="shard 0 of things"):
        async with shards.bucket(NEAR).transaction():
            pass
    with pytest.raises(Unavailable, match="shard 0 of things"):
        await shards.bucket(NEAR).fetch_all(LIST_LABELS, "default")
    assert await shards.bucket(FAR).fetch_one(LIST_LABELS, "default") == {"label": "far"}
    with pytest.raises(Unavailable, match=r"\[0\]"):
        await scatter(shards, LIST_ALL, "default")
    gathered = await scatter(shards, LIST_ALL, "default", partial_ok=True)
    assert (gathered.unreachable, gathered.rows) == ([0], [{"label": "far"}])


async def test_a_shard_that_is_back_is_used_again_without_a_restart(proxy, shards):
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "before")
    proxy.cut()
    with pytest.raises(Unavailable):
        await scatter(shards, LIST_ALL, "default")
    await proxy.mend()
    async with asyncio.timeout(10):
        while (await scatter(shards, LIST_ALL, "default", partial_ok=True)).unreachable:
            pass
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "after")
    assert await labels(shards) == ["after", "before"]


async def test_a_frozen_server_costs_no_more_than_the_callers_time(proxy, shards):
    async def ask(timeout_s: float) -> None:
        deadline.set_deadline(asyncio.get_running_loop().time() + timeout_s)
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "a")

    async def look(timeout_s: float) -> None:
        deadline.set_deadline(asyncio.get_running_loop().time() + timeout_s)
        await shards.bucket(NEAR).fetch_all(LIST_LABELS, "default")

    await asyncio.create_task(ask(10))
    await asyncio.create_task(look(10))
    proxy.fault = "frozen"
    for call in (ask, look):
        async with asyncio.timeout(3):
            with pytest.raises(DeadlineExceeded):
                await asyncio.create_task(call(0.3))
    proxy.fault = ""
    async with asyncio.timeout(2), shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "b")
    assert await labels(shards) == ["a", "b"]


async def test_waiting_for_a_connection_is_bounded_by_time_and_by_number(shards, monkeypatch):
    inside, leave = asyncio.Semaphore(0), asyncio.Event()

    async def hold(number: int) -> None:
        async with shards.bucket(number).transaction():
            inside.release()
            await leave.wait()

    async def late() -> None:
        deadline.set_deadline(asyncio.get_running_loop().time() + 0.05)
        await hold(100)

    holding = [asyncio.create_task(hold(number)) for number in range(postgres.WRITERS_MAX)]
    for _ in holding:
        await inside.acquire()
    with pytest.raises(DeadlineExceeded, match="waiting"):
        await asyncio.create_task(late())
    monkeypatch.setattr(postgres_pool, "WAIT_S_MAX", 0.05)
    with pytest.raises(Overloaded):
        await asyncio.create_task(hold(100))
    monkeypatch.setattr(postgres_pool, "WAITING_MAX", 0)
    with pytest.raises(Overloaded, match="too many"):
        await asyncio.create_task(hold(100))
    leave.set()
    await asyncio.gather(*holding)


async def test_every_connection_is_bounded_by_its_server_and_by_its_socket(shards):
    [shard, *_] = shards.all()
    names = ("statement", "lock", "idle_in_transaction_session", "transaction")
    asked = ", ".join(f"current_setting('{name}_timeout') AS {name}" for name in names)
    async with shards.bucket(NEAR).transaction() as tx:
        bounds = await tx.fetch_one(f"SELECT {asked}")
    assert list(bounds.values()) == ["5s", "3s", "11s", "11s"]
    async with shard.writers.lend() as connection:
        end = connection.raw._transport.get_extra_info("socket")
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000


async def test_a_server_that_is_frozen_when_the_service_ends_does_not_keep_it(proxy, monkeypatch):
    monkeypatch.setattr(limits, "CLOSE_S_MAX", 0.1)
    async with asyncio.timeout(10):
        async with proxy.place.open() as shards:
            async with shards.bucket(NEAR).transaction() as tx:
                await add_thing(tx, "a")
            proxy.fault = "frozen"
    proxy.fault = ""


async def test_a_storm_of_cancelled_calls_leaves_nothing_behind(postgres_server, shards):
    async def write(number: int) -> None:
        async with shards.bucket(number % 500).transaction() as tx:
            await add_thing(tx, f"{number}")
            await asyncio.sleep(0.01)
            await labels(shards)

    for turn in range(10):
        tasks = [asyncio.create_task(write(turn * 20 + number)) for number in range(20)]
        await asyncio.sleep(0.003 * turn)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    shard = shards.all()[0]
    assert await shard.fetch_one(
        "SELECT count(*) AS n FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' "
        "AND datname = current_database()"
    ) == {"n": 0}
    assert shard.writers.open_count <= postgres.WRITERS_MAX
    async with asyncio.timeout(5):
        await asyncio.gather(*(write(1000 + number) for number in range(20)))


# Statements that the server refuses -------------------------------------------------------------


async def test_a_deadlock_ends_one_of_the_two_and_says_try_again(shards):
    async with shards.bucket(NEAR).transaction() as tx:
        for label in ("a", "b"):
            await add_thing(tx, label)
    locked = asyncio.Barrier(2)

    async def lock(first: str, second: str) -> None:
        async with shards.bucket(NEAR).transaction() as tx:
            statement = "UPDATE thing SET owner = owner WHERE tenant = 'default' AND label = $1"
            await tx.execute(statement, first)
            await locked.wait()
            await tx.execute(statement, second)

    outcomes = await asyncio.gather(lock("a", "b"), lock("b", "a"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if outcome is not None] == [RaceLost]


async def test_a_repeat_of_a_request_that_still_runs_is_told_so(proxy, monkeypatch):
    monkeypatch.setattr(postgres_connection, "LOCK_S_MAX", 0.2)
    asked = once(user(NEAR))
    async with proxy.place.open() as shards:
        async with shards.bucket(NEAR).transaction(asked) as tx:
            await tx.answer_with(b"the answer")
            with pytest.raises(IdempotencyInFlight) as caught:
                await asyncio.create_task(repeat(shards, asked))
            assert caught.value.retry_after_s
        assert await repeat(shards, asked) == b"the answer"


async def repeat(shards, asked) -> bytes:
    async with shards.bucket(NEAR).transaction(asked) as tx:
        assert tx.answered
        return tx.answer


async def test_a_schema_that_changes_under_a_prepared_statement_costs_one_retry(proxy, shards):
    select = "SELECT * FROM thing WHERE tenant = $1"

    async def read_inside() -> None:
        async with shards.bucket(NEAR).transaction() as tx:
            await tx.fetch_all(select, "default")

    await read_inside()
    await shards.bucket(NEAR).fetch_all(select, "default")
    await proxy.place.run_raw(0, "ALTER TABLE thing ADD COLUMN colour text")
    try:
        await shards.bucket(NEAR).fetch_all(select, "default")
        with pytest.raises(RaceLost):
            await read_inside()
        await read_inside()
    finally:
        await proxy.place.run_raw(0, "ALTER TABLE thing DROP COLUMN colour")


async def test_a_nul_in_a_text_is_the_callers_mistake(shards):
    thing_id = new_id(NEAR)
    with pytest.raises(InvalidRequest, match="NUL"):
        async with shards.bucket(NEAR).transaction() as tx:
            await tx.execute(INSERT_THING, NEAR, thing_id, "default", thing_id, "a\0b")
