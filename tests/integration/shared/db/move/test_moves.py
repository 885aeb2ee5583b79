"""A bucket goes from shard to shard while its rows are written; SQLite."""

import asyncio
import sqlite3
import time
from dataclasses import replace
from functools import partial

import pytest

from shared.db import todo
from shared.db.ids import new_id
from shared.db.move.mover import Tools
from shared.db.move.place import move_bucket, settle_move
from shared.db.move.port import MoveFailed, MoveLost, MoveRefused
from shared.db.move.protocol import Phase
from shared.db.port import Once, OutboxRow
from shared.identity import Principal, PrincipalKind
from tests.integration.shared.db.move.grounds import (
    ADD_ONE,
    BUCKET,
    NEIGHBOUR,
    PACE,
    add_counter,
    add_counters,
    add_note,
    meanwhile,
    tools,
)


def event(number: int) -> OutboxRow:
    return OutboxRow("t.Made", "counters/1", f"{number}".encode(), "default")


def during(step: str, work):
    """Tools that do something when the move has come to a step; the first time."""
    waiting = [step]

    def visit(name: str) -> None:
        if name in waiting:
            waiting.remove(name)
            work()

    return tools(visit=visit)


class Killed(BaseException):
    """As a process ends: no clean-up of the mover's own runs."""


def die() -> None:
    raise Killed


async def test_a_move_carries_every_table_and_leaves_a_signpost(place, shards):
    asked = Once(
        Principal(PrincipalKind.USER, str(new_id(BUCKET)), "default"), "/m", "k", b"h" * 32
    )
    async with shards.bucket(BUCKET).transaction(asked) as tx:
        first = await add_counter(tx, 1)
        for number in range(20):
            await add_note(tx, first, f"note {number}")
            await tx.append_outbox(event(number))
        await todo.add_todo(tx, todo.Todo(BUCKET, first, "later", b"x"), next_at_us=1)
        await tx.answer_with(b"answer")
    before = place.contents(0)
    assert await move_bucket(place.folder, BUCKET, 1, tools()) is Phase.DONE
    assert place.contents(1) == before
    assert not any(place.contents(0).values())
    assert place.states() == ["MOVED", "ACTIVE"]
    async with shards.bucket(BUCKET).transaction(asked) as tx:
        assert (tx.answered, tx.answer) == (True, b"answer")
    async with shards.bucket(BUCKET).transaction() as tx:
        await tx.append_outbox(event(20))
    rows = place.rows(1, "SELECT event_no, payload FROM outbox ORDER BY seq")
    assert rows == [(number + 1, f"{number}".encode()) for number in range(21)]


async def test_a_bucket_may_come_back_and_its_neighbour_stays(place, shards):
    await add_counters(shards, 30)
    await add_counters(shards, 3, bucket=NEIGHBOUR)
    neighbour = place.contents(0, NEIGHBOUR)
    for dst in (1, 0, 1):
        assert await move_bucket(place.folder, BUCKET, dst, tools()) is Phase.DONE
        await add_counters_after(shards, dst)
    assert place.states() == ["MOVED", "ACTIVE"]
    assert place.states(NEIGHBOUR) == ["ACTIVE", "ABSENT"]
    assert place.contents(0, NEIGHBOUR) == neighbour
    assert len(place.contents(1)["counter"]) == 33


async def add_counters_after(shards, number: int) -> None:
    async with shards.bucket(BUCKET).transaction() as tx:
        await add_counter(tx, 1000 + number + new_id(0).int % 10**9)


async def test_a_service_that_starts_later_finds_the_bucket(place):
    async with place.open() as shards:
        [counter_id] = await add_counters(shards, 1)
    await move_bucket(place.folder, BUCKET, 1, tools())
    async with place.open() as shards, shards.bucket(BUCKET).transaction() as tx:
        assert await tx.execute(ADD_ONE, BUCKET, counter_id) == 1


WRITES = {
    "a row is changed": "UPDATE counter SET value = value + 5 WHERE place < 10",
    "unique values change places": "UPDATE counter SET place = CASE place WHEN 2 THEN 103 "
    "WHEN 3 THEN 102 END WHERE place IN (2, 3)",
    "a parent goes, and its children by cascade": "DELETE FROM counter WHERE place = 4",
    "a child is changed": "UPDATE note SET body = 'changed'",
    "children go": "DELETE FROM note",
}


@pytest.mark.parametrize("step", ["capture", "copy.apply", "copied", "verify"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_what_is_written_on_the_way_arrives(place, shards, step, write):
    for number, counter_id in enumerate(await add_counters(shards, 20)):
        async with shards.bucket(BUCKET).transaction() as tx:
            await add_note(tx, counter_id, f"{number}")
    kept = {}

    def work() -> None:
        write_with_foreign_keys(place, write)
        kept.update(place.contents(0))

    assert await move_bucket(place.folder, BUCKET, 1, during(step, work)) is Phase.DONE
    assert place.contents(1) == kept


def write_with_foreign_keys(place, sql: str) -> None:
    connection = sqlite3.connect(place.path / "shard-0.sqlite")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(sql)
    if "103" in sql:
        connection.execute("UPDATE counter SET place = place - 100 WHERE place > 100")
    connection.commit()
    connection.close()


async def test_a_move_that_is_cancelled_gives_the_bucket_back_at_once(place, shards):
    await add_counters(shards, 30)
    before = place.contents(0)
    moving: list[asyncio.Task] = []
    cancelled = during("copy.apply", lambda: [task.cancel() for task in moving])
    moving.append(asyncio.create_task(move_bucket(place.folder, BUCKET, 1, cancelled)))
    with pytest.raises(asyncio.CancelledError):
        await moving[0]
    assert place.states() == ["ACTIVE", "ABORTED"]
    assert place.contents(0) == before
    assert not any(place.contents(1).values())
    assert await move_bucket(place.folder, BUCKET, 1, tools()) is Phase.DONE


async def test_a_row_that_the_destination_cannot_take_aborts_the_move_and_says_which(place, shards):
    await add_counters(shards, 3)
    place.rows(1, "CREATE UNIQUE INDEX x ON counter (place)")
    async with shards.bucket(4000).transaction() as tx:
        await add_counter(tx, 1)
    with pytest.raises(MoveFailed, match=r"counter does not fit .* another bucket"):
        await move_bucket(place.folder, BUCKET, 1, tools())
    assert place.states() == ["ACTIVE", "ABORTED"]
    assert len(place.contents(1, 4000)["counter"]) == 1


async def test_a_schema_that_changes_meanwhile_aborts_the_move(place, shards):
    await add_counters(shards, 3)
    migrated = "UPDATE tenfold_shard SET schema_version = schema_version + 1"
    with pytest.raises(MoveFailed, match="changed since the move began"):
        await move_bucket(
            place.folder, BUCKET, 1, during("copied", lambda: place.rows(1, migrated))
        )
    assert place.states() == ["ACTIVE", "ABORTED"]


async def test_a_mover_whose_move_was_taken_over_changes_nothing_any_more(place, shards):
    await add_counters(shards, 30)
    before = place.contents(0)

    async def abort() -> None:
        [move] = await place.folder.control.list_moves(is_open=True)
        await settle_move(place.folder, move, tools(), preference="abort", is_forced=True)

    for step in ("prepare", "copy.apply", "copied", "fence", "fence2"):
        with pytest.raises(MoveLost):
            await move_bucket(place.folder, BUCKET, 1, during(step, partial(meanwhile, abort)))
        assert place.states() == ["ACTIVE", "ABORTED"]
        assert place.contents(0) == before


@pytest.mark.parametrize("step", ["fence2", "commit", "src_moved"])
async def test_a_caller_that_waits_for_a_dead_mover_settles_its_move(place, shards, clock, step):
    [counter_id] = await add_counters(shards, 1)

    with pytest.raises(Killed):
        await move_bucket(place.folder, BUCKET, 1, replace(during(step, die), clock=clock))
    async with shards.bucket(BUCKET).transaction() as tx:
        assert await tx.execute(ADD_ONE, BUCKET, counter_id) == 1
    assert place.states() == (["ACTIVE", "ABORTED"] if step == "fence2" else ["MOVED", "ACTIVE"])
    assert await place.folder.control.list_moves(is_open=True) == []


async def test_a_service_starts_while_a_bucket_is_between_its_shards(place, clock):
    async with place.open() as shards:
        [counter_id] = await add_counters(shards, 1)

    with pytest.raises(Killed):
        await move_bucket(place.folder, BUCKET, 1, replace(during("src_moved", die), clock=clock))
    assert place.states() == ["MOVED", "IMPORTING"]
    async with place.open() as shards, shards.bucket(BUCKET).transaction() as tx:
        assert await tx.execute(ADD_ONE, BUCKET, counter_id) == 1


async def test_rows_that_a_dead_mover_left_at_the_source_are_collected_by_the_next(place, shards):
    await add_counters(shards, 20)

    with pytest.raises(Killed):
        await move_bucket(place.folder, BUCKET, 1, during("done", die))
    assert len(place.contents(0)["counter"]) == 20
    await move_bucket(place.folder, NEIGHBOUR, 1, tools())
    assert not any(place.contents(0).values())
    assert len(place.contents(1)["counter"]) == 20


async def test_an_operator_cannot_abort_what_is_decided(place, shards):
    await add_counters(shards, 3)

    async def abort() -> None:
        [move] = await place.folder.control.list_moves(is_open=True)
        ended = await settle_move(place.folder, move, tools(), preference="abort", is_forced=True)
        assert ended is Phase.DONE

    with pytest.raises(MoveLost):
        await move_bucket(place.folder, BUCKET, 1, during("commit", partial(meanwhile, abort)))
    assert place.states() == ["MOVED", "ACTIVE"]


async def test_what_cannot_move_is_refused_and_nothing_changes(place, shards):
    folder = place.folder
    with pytest.raises(MoveRefused, match="is on shard 0 already"):
        await move_bucket(folder, BUCKET, 0, tools())

    async def move_two_at_once() -> None:
        with pytest.raises(MoveRefused, match="bucket 5 is on a move"):
            await move_bucket(folder, BUCKET, 1, tools())
        with pytest.raises(MoveRefused, match="shard 0 is on a move"):
            await move_bucket(folder, NEIGHBOUR, 1, tools())

    await move_bucket(folder, BUCKET, 1, during("capture2", partial(meanwhile, move_two_at_once)))
    place.rows(1, "ALTER TABLE counter ADD COLUMN colour text")
    with pytest.raises(MoveRefused, match="differ in their tables"):
        await move_bucket(folder, NEIGHBOUR, 1, tools())
    place.rows(0, "CREATE TABLE log (bucket smallint, line text)")
    with pytest.raises(MoveRefused, match="log has no key"):
        await move_bucket(folder, NEIGHBOUR, 1, tools())
    assert place.states(NEIGHBOUR) == ["ACTIVE", "ABSENT"]


async def test_a_move_waits_for_calm_where_a_pass_over_a_few_keys_is_slow(place, shards):
    """A busy machine is no reason to give up: what is left does not grow by it."""
    await add_counters(shards, 3)
    slow = ["catch.read"] * 7

    def visit(step: str) -> None:
        if step in slow:
            slow.remove(step)
            time.sleep(0.06)

    patient = Tools(pace=replace(PACE, pass_s_max=0.05, passes_max=2), visit=visit)
    assert await move_bucket(place.folder, BUCKET, 1, patient) is Phase.DONE


async def test_a_bucket_is_not_fenced_on_shards_that_stay_busy(place, shards):
    await add_counters(shards, 3)
    never_swift = Tools(pace=replace(PACE, pass_s_max=0.0, slow_passes_max=2))
    with pytest.raises(MoveFailed, match="shards 0 and 1 are so busy"):
        await move_bucket(place.folder, BUCKET, 1, never_swift)
    assert place.states() == ["ACTIVE", "ABORTED"]
