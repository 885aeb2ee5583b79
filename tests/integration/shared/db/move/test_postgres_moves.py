"""The same moves between Postgres databases: writers in transactions of their own, at once."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from uuid import UUID

import pytest

from shared.db.ids import BUCKET_COUNT
from shared.db.move.place import move_bucket, settle_left, settle_move
from shared.db.move.port import MoveFailed, MoveLost, MoveRefused
from shared.db.move.postgres_place import PostgresPlace
from shared.db.move.protocol import Phase
from shared.db.once import home_bucket
from shared.db.port import Once, OutboxRow, Shards
from shared.db.postgres_shards import parse_servers
from shared.errors import TenfoldError
from shared.identity import Principal, PrincipalKind
from tests.fakes import ManualClock
from tests.integration.shared.db.move.arena import ROOT
from tests.integration.shared.db.move.grounds import (
    ADD_ONE,
    BUCKET,
    SECRET,
    add_counter,
    add_counters,
    add_note,
    meanwhile,
    tools,
)
from tests.integration.shared.db.move.test_moves import Killed, die, during

# What differs from SQLite is how a step is done; the kills at every step are told there.
CRITICAL = ("copy.apply", "catch.apply", "fence", "drain.apply", "commit", "src_moved", "done")


@pytest.fixture
async def shards(databases) -> AsyncIterator[Shards]:
    async with databases.open() as opened:
        yield opened


WRITES = {
    "a row is changed": "UPDATE counter SET value = value + 5 WHERE place < 10",
    "unique values change places": "WITH one AS (UPDATE counter SET place = 103 WHERE place = 2) "
    "UPDATE counter SET place = 102 WHERE place = 3",
    "a parent goes, and its children by cascade": "DELETE FROM counter WHERE place = 4",
    "a child is changed": "UPDATE note SET body = 'changed'",
    "children go": "DELETE FROM note",
}


@pytest.mark.parametrize("step", ["capture", "copied", "verify"])
async def test_what_is_written_on_the_way_arrives_and_a_signpost_stays(databases, shards, step):
    for number, counter_id in enumerate(await add_counters(shards, 20)):
        async with shards.bucket(BUCKET).transaction() as tx:
            await add_note(tx, counter_id, f"{number}")
            await tx.append_outbox(OutboxRow("t.Made", "counters/1", b"x", "default"))
    kept = {}

    async def write() -> None:
        for sql in WRITES.values():
            await databases.write(sql)
        # What is now 102 takes 2, and 103 takes 3: values that other rows had before.
        await databases.write("UPDATE counter SET place = place - 100 WHERE place > 100")
        kept.update(await databases.contents(0))

    working = during(step, partial(meanwhile, write))
    assert await move_bucket(databases.place, BUCKET, 1, working) is Phase.DONE
    assert await databases.contents(1) == kept
    assert not any((await databases.contents(0)).values())
    assert await databases.states() == ["MOVED", "ACTIVE"]
    async with shards.bucket(BUCKET).transaction() as tx:
        await tx.append_outbox(OutboxRow("t.Made", "counters/1", b"x", "default"))
    numbers = await databases.rows(1, "SELECT event_no FROM outbox ORDER BY seq")
    assert [number for (number,) in numbers] == list(range(1, 22))


async def test_a_key_whose_home_has_stayed_behind_is_claimed_there_at_once(databases, shards):
    [counter_id] = await add_counters(shards, 1)
    once = key_at_home_on_shard_0()
    together = shards.bucket_map
    await move_bucket(databases.place, BUCKET, 1, tools())
    shards.bucket_map = together  # as in a process that has not heard of it
    for _ in range(2):
        async with shards.bucket(BUCKET).transaction(once) as tx:
            if not tx.answered:
                assert await tx.execute(ADD_ONE, BUCKET, counter_id) == 1
    assert databases.read(1, "SELECT value FROM counter") == [(1,)]


def key_at_home_on_shard_0() -> Once:
    """Of a service: its keys' homes are anywhere."""
    service = Principal(PrincipalKind.SERVICE, "svc", "default")
    keys = (Once(service, "/count", f"key-{number}", b"x" * 32) for number in range(64))
    return next(key for key in keys if home_bucket(key, SECRET) < BUCKET_COUNT // 2)


async def test_writers_lose_nothing_while_their_bucket_goes_there_and_back(databases, shards):
    counters = await add_counters(shards, 4)
    acknowledged: list[UUID] = []
    is_over = asyncio.Event()

    async def write(number: int) -> None:
        while not is_over.is_set():
            counter_id = counters[number % len(counters)]
            try:
                async with shards.bucket(BUCKET).transaction() as tx:
                    assert await tx.execute(ADD_ONE, BUCKET, counter_id) == 1
                    note_id = await add_note(tx, counter_id)
            except TenfoldError:
                continue
            acknowledged.append(note_id)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(write(number))
        for dst in (1, 0, 1):
            assert await move_bucket(databases.place, BUCKET, dst, roomy()) is Phase.DONE
        is_over.set()
    notes = [row[0] for row in await databases.rows(1, "SELECT id FROM note")]
    assert sorted(map(str, notes)) == sorted(map(str, acknowledged))
    assert await databases.rows(1, "SELECT sum(value)::bigint FROM counter") == [(len(notes),)]


def roomy():
    """For a bucket that is written without a pause."""
    moving = tools()
    return replace(moving, pace=replace(moving.pace, page_rows=500, marks_max=500, passes_max=50))


@pytest.mark.parametrize("step", CRITICAL)
async def test_a_mover_that_dies_is_replaced_and_nothing_is_lost(databases, shards, step):
    await add_counters(shards, 20)
    touch = partial(meanwhile, partial(databases.write, "UPDATE counter SET value = value + 1"))
    dying, touching = during(step, die), during("copied", touch)
    again = during("precheck", touch)

    def visit(name: str) -> None:
        touching.visit(name)
        again.visit(name)
        dying.visit(name)

    long_ago = replace(tools(visit=visit), clock=ManualClock())
    with pytest.raises(Killed):
        await move_bucket(databases.place, BUCKET, 1, long_ago)
    await settle_left(databases.place, BUCKET, tools())
    states = await databases.states()
    assert states in (["ACTIVE", "ABORTED"], ["MOVED", "ACTIVE"])
    assert await databases.place.control.list_moves(is_open=True) == []
    owner = states.index("ACTIVE")
    assert len((await databases.contents(owner))["counter"]) == 20
    async with shards.bucket(BUCKET).transaction() as tx:
        assert await tx.execute(ADD_ONE, BUCKET, (await some_counter(databases, owner))) == 1


async def some_counter(databases, owner: int) -> UUID:
    [(text,)] = await databases.rows(owner, "SELECT id::text FROM counter LIMIT 1")
    return UUID(text)


@pytest.mark.parametrize("step", ["fence2", "commit", "src_moved"])
async def test_a_caller_that_waits_for_a_dead_mover_settles_its_move(databases, shards, step):
    """With the service's own role, which could not begin this move."""
    [counter_id] = await add_counters(shards, 1)
    long_ago = replace(during(step, die), clock=ManualClock())
    with pytest.raises(Killed):
        await move_bucket(databases.place, BUCKET, 1, long_ago)
    async with shards.bucket(BUCKET).transaction() as tx:
        assert await tx.execute(ADD_ONE, BUCKET, counter_id) == 1
    settled = ["ACTIVE", "ABORTED"] if step == "fence2" else ["MOVED", "ACTIVE"]
    assert await databases.states() == settled
    assert await databases.place.control.list_moves(is_open=True) == []


@pytest.mark.parametrize("step", ["prepare", "copy.read", "copied", "fence", "fence2"])
async def test_a_mover_that_was_replaced_changes_nothing_any_more(databases, shards, step):
    await add_counters(shards, 20)
    before = await databases.contents(0)

    async def abort() -> None:
        [move] = await databases.place.control.list_moves(is_open=True)
        await settle_move(databases.place, move, tools(), preference="abort", is_forced=True)

    with pytest.raises(MoveLost):
        working = during(step, partial(meanwhile, abort))
        await move_bucket(databases.place, BUCKET, 1, working)
    assert await databases.states() == ["ACTIVE", "ABORTED"]
    assert await databases.contents(0) == before
    assert not any((await databases.contents(1)).values())


def at(**works):
    """Tools that do something after each of these steps; dots in their names are underscores."""
    visits = [during(step.replace("_", "."), work).visit for step, work in works.items()]
    return tools(visit=lambda name: [visit(name) for visit in visits])


DAMAGE = "SET session_replication_role = replica; DELETE FROM counter WHERE place = 0"


async def test_a_row_that_differs_under_the_fence_aborts_the_move(databases, shards):
    """What was compared before, and written since, is compared again."""
    await add_counters(shards, 3)
    working = at(
        precheck=partial(databases.touch, 0, BUCKET),
        drain_ack=partial(meanwhile, databases.rows, 1, "SELECT 1", prefix=DAMAGE),
    )
    with pytest.raises(MoveFailed, match="counter differs"):
        await move_bucket(databases.place, BUCKET, 1, working)
    assert await databases.states() == ["ACTIVE", "ABORTED"]


async def test_who_goes_on_under_anothers_fence_counts_what_it_did_not_compare(databases, shards):
    await add_counters(shards, 3)
    with pytest.raises(Killed):
        await move_bucket(databases.place, BUCKET, 1, during("fence2", die))
    await databases.rows(1, "SELECT 1", prefix=DAMAGE)
    [move] = await databases.place.control.list_moves(is_open=True)
    with pytest.raises(MoveFailed, match="counter differs"):
        await settle_move(databases.place, move, tools(), preference="go on", is_forced=True)
    assert await databases.states() == ["ACTIVE", "ABORTED"]


END_ALL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


async def test_a_decided_move_goes_on_when_every_connection_was_lost(databases, shards):
    [counter_id] = await add_counters(shards, 1)
    cut = partial(meanwhile, databases.rows, 0, END_ALL)
    assert await move_bucket(databases.place, BUCKET, 1, at(commit=cut)) is Phase.DONE
    assert await databases.states() == ["MOVED", "ACTIVE"]
    async with shards.bucket(BUCKET).transaction() as tx:
        assert await tx.execute(ADD_ONE, BUCKET, counter_id) == 1


async def test_a_writer_that_stays_in_its_transaction_delays_the_move_and_loses_nothing(
    databases, shards
):
    [counter_id] = await add_counters(shards, 1)
    async with asyncio.TaskGroup() as tasks, shards.bucket(BUCKET).transaction() as tx:
        await tx.execute(ADD_ONE, BUCKET, counter_id)
        moving = tasks.create_task(move_bucket(databases.place, BUCKET, 1, tools()))
        await asyncio.sleep(0.5)
        assert (await databases.states())[0] == "ACTIVE"
    assert moving.result() is Phase.DONE
    assert await databases.rows(1, "SELECT value FROM counter") == [(1,)]


async def test_a_role_that_cannot_import_foreign_keys_is_told_what_it_needs(databases, shards):
    place = PostgresPlace(parse_servers(databases.service, service="counters"))
    with pytest.raises(MoveRefused, match=r"note has a foreign key.*GRANT SET ON PARAMETER"):
        await move_bucket(place, BUCKET, 1, tools())
    for index in (0, 1):
        await databases.rows(index, "SELECT 1", prefix="DROP TABLE note")
    await add_counters(shards, 20)
    assert await move_bucket(place, BUCKET, 1, tools()) is Phase.DONE
    rows = await databases.rows(1, "SELECT count(*), max(version) FROM counter")
    assert rows == [(20, 1)]


async def test_a_value_that_another_bucket_has_aborts_the_move(databases, shards):
    await add_counters(shards, 3)
    await databases.rows(1, "SELECT 1", prefix="CREATE UNIQUE INDEX x ON counter (place)")
    async with shards.bucket(4000).transaction() as tx:
        await add_counter(tx, 1)
    with pytest.raises(MoveFailed, match="another bucket has this value already"):
        await move_bucket(databases.place, BUCKET, 1, tools())
    assert await databases.states() == ["ACTIVE", "ABORTED"]
    await databases.rows(1, "SELECT 1", prefix="DROP INDEX x")


async def test_the_operator_moves_buckets_by_the_same_command(databases, shards, tmp_path):
    await add_counters(shards, 3)
    environ = {**os.environ, "TENFOLD_MEDIA_DATABASE": ",".join(databases.operator)}

    async def tenfold(*arguments: str) -> tuple[int | None, str, str]:
        command = [sys.executable, "-m", "deploy.cli", "shards", *arguments]
        pipe = asyncio.subprocess.PIPE
        running = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environ, stdout=pipe, stderr=pipe
        )
        out, err = await running.communicate()
        return running.returncode, out.decode(), err.decode()

    moved = await tenfold("move", "media", "--buckets", f"{BUCKET}", "--to", "1", "--json")
    assert moved[0] == 0, moved
    assert json.loads(moved[1])["rows"] == 3
    assert await databases.states() == ["MOVED", "ACTIVE"]
    status, listed, mapped = await asyncio.gather(
        tenfold("status", "media"),
        tenfold("list", "media", "--json"),
        tenfold("map", "media", "--bucket", f"{BUCKET}"),
    )
    assert status == (0, "No bucket is on its way.\n", "")
    assert [row["buckets"] for row in json.loads(listed[1])] == [2047, 2049]
    assert mapped[1].split()[1:] == ["shard", "1"]
    lost = f"DELETE FROM tenfold_bucket WHERE bucket = {BUCKET + 1}"
    await databases.rows(0, "SELECT 1", prefix=lost)
    code, out, _ = await tenfold("verify", "media")
    assert (code, out) == (1, f"bucket {BUCKET + 1} is owned by no shard: settle its move\n")


async def test_rows_that_have_come_are_known_to_the_planner_at_once(databases, shards):
    await add_counters(shards, 20)
    assert await move_bucket(databases.place, BUCKET, 1, tools()) is Phase.DONE
    known = "SELECT reltuples::int FROM pg_class WHERE relname = 'counter'"
    assert await databases.rows(1, known) == [(20,)]


async def test_each_row_is_looked_up_by_its_own_key_however_much_the_planner_errs(
    databases, shards
):
    """A bucket that was empty when the table was last analyzed looks like one of few rows."""
    async with shards.bucket(4000).transaction() as tx:
        await add_counter(tx, 1)
    await databases.rows(1, "SELECT 1", prefix="ANALYZE counter")
    async with databases.place.side(1, BUCKET) as side:
        [shape] = [shape for shape in side.shapes if shape.name == "counter"]
        keys = [(UUID(int=number).bytes,) for number in (1, 2)]
        sql, arguments = side._among(shape, keys, *shape.columns)
        plan = await side._run(lambda raw: raw.fetch(f"EXPLAIN {sql}", *arguments))
    text = "\n".join(row[0] for row in plan)
    assert "using counter_pkey" in text
    assert "Seq Scan" not in text
