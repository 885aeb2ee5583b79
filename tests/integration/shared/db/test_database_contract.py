"""What every engine behind shared/db/port.py promises."""

import asyncio
import sqlite3
from contextlib import suppress
from itertools import permutations
from uuid import UUID

import asyncpg
import orjson
import pytest

from shared import causal
from shared.causal import Seen
from shared.db import following, limits
from shared.db.errors import BucketNotAdmitted, ConstraintViolation, UniqueViolation
from shared.db.ids import new_id
from shared.db.port import OutboxRow
from shared.db.scatter import scatter
from shared.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    IdempotencyKeyReused,
    NotFound,
    Unavailable,
)
from shared.identity import Principal, PrincipalKind
from tests.integration.shared.db.conftest import (
    FAR,
    INSERT_THING,
    LIST_LABELS,
    NEAR,
    NEAR_TOO,
    add_thing,
    labels,
    once,
    user,
)

SLOW = """
WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 500000000)
SELECT count(*) AS n FROM n
"""


def event(aggregate: str = "things/1") -> OutboxRow:
    return OutboxRow("tenfold.things.v1.ThingMade", aggregate, b"payload", "default")


# Atomicity -------------------------------------------------------------------------------


async def test_leaving_the_block_makes_rows_and_events_visible_together(shards):
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
        await tx.append_outbox(event())
        assert await labels(shards) == []
    assert await labels(shards) == ["a"]
    row = await shards.bucket(NEAR).fetch_one("SELECT * FROM outbox")
    assert (row["subject"], row["event_no"], row["sent"]) == (f"evt.things.ThingMade.{NEAR}", 1, 0)
    assert isinstance(row["event_id"], UUID)


async def test_an_error_leaves_neither_rows_nor_events_nor_an_answer(shards):
    asker = user()
    with pytest.raises(NotFound):
        async with shards.bucket(NEAR).transaction(once(asker)) as tx:
            await add_thing(tx, "a")
            await tx.append_outbox(event())
            raise NotFound("no")
    assert await labels(shards) == []
    assert await shards.bucket(NEAR).fetch_all("SELECT * FROM outbox") == []
    async with shards.bucket(NEAR).transaction(once(asker, body=b"other")) as tx:
        assert not tx.answered


async def test_a_violated_rule_is_named_and_ends_the_transaction(shards):
    async with shards.bucket(NEAR).transaction() as tx:
        thing_id = await add_thing(tx, "a")
    with pytest.raises(UniqueViolation, match="thing_label_once"):
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "a")
    with pytest.raises(UniqueViolation, match="thing_pkey"):
        async with shards.bucket(NEAR).transaction() as tx:
            await tx.execute(INSERT_THING, NEAR, thing_id, "default", thing_id, "b")
    with pytest.raises(ConstraintViolation, match="thing_label"):
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "x" * 100)
    with pytest.raises(ValueError, match="failed earlier"):
        async with shards.bucket(NEAR).transaction() as tx:
            with pytest.raises(UniqueViolation):
                await add_thing(tx, "a")
            await add_thing(tx, "after")
    assert await labels(shards) == ["a"]


async def test_a_violation_that_the_caller_swallows_still_undoes_the_transaction(shards):
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    with pytest.raises(ValueError, match="failed earlier"):
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "b")
            with suppress(UniqueViolation):
                await add_thing(tx, "a")
    assert await labels(shards) == ["a"]


async def test_a_transaction_inside_a_transaction_of_the_same_shard_is_refused(shards):
    with pytest.raises(ValueError, match="inside"):
        async with shards.bucket(NEAR).transaction(), shards.bucket(NEAR_TOO).transaction():
            pass
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "still works")


async def test_uuids_come_back_as_uuids_under_any_name(shards):
    async with shards.bucket(NEAR).transaction() as tx:
        thing_id = new_id(NEAR)
        arguments = (NEAR, thing_id, "default", thing_id, "a")
        row = await tx.fetch_one(INSERT_THING + " RETURNING id, owner", *arguments)
        assert row == {"id": thing_id, "owner": thing_id}
        row = await tx.fetch_one(
            "SELECT id, owner AS who FROM thing WHERE tenant = $1 GROUP BY id, owner", "default"
        )
        assert row == {"id": thing_id, "who": thing_id}


async def test_a_statement_that_forgets_the_tenant_is_refused(shards):
    with pytest.raises(ValueError, match="no tenant"):
        await shards.bucket(NEAR).fetch_all("SELECT label FROM thing WHERE bucket = $1", NEAR)
    counted = "SELECT count(*) AS n FROM thing /* any tenant: a count for the operator */"
    assert await shards.bucket(NEAR).fetch_one(counted) == {"n": 0}


# Admission -------------------------------------------------------------------------------


async def test_a_row_of_a_bucket_that_was_not_asked_for_is_refused(shards):
    stranger = new_id(NEAR_TOO)
    with pytest.raises(BucketNotAdmitted):
        async with shards.bucket(NEAR).transaction() as tx:
            await tx.execute(INSERT_THING, NEAR_TOO, stranger, "default", stranger, "a")
    async with shards.bucket(NEAR).transaction(also=[NEAR_TOO]) as tx:
        await tx.execute(INSERT_THING, NEAR_TOO, stranger, "default", stranger, "a")
    assert await labels(shards) == ["a"]


async def test_buckets_of_different_shards_do_not_share_a_transaction(shards):
    with pytest.raises(ValueError, match="different shards"):
        async with shards.bucket(NEAR).transaction(also=[FAR]):
            pass


async def test_an_id_in_another_bucket_than_its_row_is_refused(shards):
    with pytest.raises(ConstraintViolation, match="thing_bucket"):
        async with shards.bucket(NEAR).transaction() as tx:
            await tx.execute(INSERT_THING, NEAR, new_id(NEAR_TOO), "default", new_id(NEAR), "a")


@pytest.mark.parametrize("state", ["FENCED", "MOVED", "IMPORTING", "ABORTED", "ABSENT"])
async def test_a_bucket_that_the_shard_may_not_write_is_unavailable(
    engine, shards, state, monkeypatch
):
    monkeypatch.setattr(following, "FOLLOW_S_MAX", 0.1)
    await engine.run_raw(0, f"UPDATE tenfold_bucket SET state = '{state}' WHERE bucket = {NEAR}")
    with pytest.raises(Unavailable) as caught:
        async with shards.bucket(NEAR).transaction():
            pass
    assert caught.value.retry_after_s
    async with shards.bucket(NEAR_TOO).transaction() as tx:
        await add_thing(tx, "its neighbour does not notice")


async def test_a_fenced_bucket_is_read_until_its_time_is_over(engine, shards, monkeypatch):
    monkeypatch.setattr(following, "FOLLOW_S_MAX", 0.1)
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    fence = "UPDATE tenfold_bucket SET state = 'FENCED', fence_until_us = {} WHERE bucket = 77"
    await engine.run_raw(0, fence.format(9 * 10**15))
    assert await shards.bucket(NEAR).fetch_one(LIST_LABELS, "default") == {"label": "a"}
    await engine.run_raw(0, fence.format(1))
    with pytest.raises(Unavailable, match="moving"):
        await shards.bucket(NEAR).fetch_one(LIST_LABELS, "default")


@pytest.mark.parametrize("bucket", [FAR, 4095])
async def test_the_shard_itself_refuses_rows_of_a_bucket_it_does_not_own(engine, bucket):
    async with engine.open():
        pass
    one, another = (engine.literal(new_id(bucket)) for _ in range(2))
    with pytest.raises(Exception, match="bucket_not_admitted"):
        await engine.run_raw(
            0,
            "INSERT INTO thing (bucket, id, tenant, owner, label) VALUES "
            f"({bucket}, {one}, 'default', {another}, 'raw')",
        )


async def test_a_shard_transaction_may_write_all_that_the_shard_owns_and_no_events(shards):
    async with shards.bucket(NEAR).transaction() as tx:
        await tx.append_outbox(event())
    async with shards.bucket(NEAR_TOO).transaction() as tx:
        await tx.append_outbox(event())
    async with shards.all()[0].transaction() as tx:
        assert await tx.execute("UPDATE outbox SET sent = 1") == 2
        with pytest.raises(ValueError, match="one bucket"):
            await tx.append_outbox(event())


# Versions and numbers --------------------------------------------------------------------


async def test_each_update_raises_the_version_whoever_writes(engine, shards):
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    async with shards.bucket(NEAR).transaction() as tx:
        await tx.execute("UPDATE thing SET label = 'b' WHERE tenant = $1", "default")
    await engine.run_raw(0, "UPDATE thing SET label = 'c'", admitted=[NEAR])
    read = "SELECT version FROM thing WHERE tenant = $1"
    assert await shards.bucket(NEAR).fetch_one(read, "default") == {"version": 3}
    for wrong in ("version + 2", "1"):
        with pytest.raises(Exception, match="version_only_grows_by_one"):
            await engine.run_raw(0, f"UPDATE thing SET version = {wrong}", admitted=[NEAR])


async def test_events_of_an_aggregate_are_numbered_without_a_gap_in_spite_of_failures(shards):
    async def emit(number: int) -> None:
        async with shards.bucket(NEAR).transaction() as tx:
            await tx.append_outbox(event(f"things/{number % 3}"))
            if number % 4 == 0:
                raise NotFound("this one fails after its event")

    await asyncio.gather(*(emit(number) for number in range(60)), return_exceptions=True)
    rows = await shards.bucket(NEAR).fetch_all(
        "SELECT aggregate, event_no FROM outbox ORDER BY seq"
    )
    numbers: dict[str, list[int]] = {}
    for row in rows:
        numbers.setdefault(row["aggregate"], []).append(row["event_no"])
    assert numbers == {f"things/{n}": list(range(1, 16)) for n in range(3)}


async def test_jobs_and_hops_leave_no_gap_in_the_numbers_of_an_aggregates_events(shards):
    name = "things/1"
    job = OutboxRow("MakeThing", name, b"", "default", queue="make")
    hop = OutboxRow("tenfold.things.v1.ThingSeen", name, b"", "default", bucket=FAR)
    at_home = OutboxRow("tenfold.things.v1.ThingSeen", name, b"", "default", bucket=NEAR)
    for row in (event(), job, hop, at_home, job, hop, event()):
        async with shards.bucket(NEAR).transaction() as tx:
            await tx.append_outbox(row)
    rows = await shards.bucket(NEAR).fetch_all(
        "SELECT subject, event_no, headers FROM outbox ORDER BY seq"
    )
    numbers: dict[str, list[int]] = {}
    for row in rows:
        assert orjson.loads(row["headers"])["tenfold-aggregate"] == name
        kind, _, rest = row["subject"].partition(".")
        numbers.setdefault(f"{kind} {rest.rpartition('.')[2]}", []).append(row["event_no"])
    assert numbers == {f"evt {NEAR}": [1, 2, 3], f"wrk {NEAR}": [1, 2], f"evt {FAR}": [1, 2]}


async def test_a_commit_with_events_wakes_the_relay_and_one_without_does_not(shards):
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    assert not await shards.wait_for_outbox(0.01)
    async with shards.bucket(NEAR).transaction() as tx:
        await tx.append_outbox(event())
    assert await shards.wait_for_outbox(1)
    assert not await shards.wait_for_outbox(0.01)


# Once ------------------------------------------------------------------------------------


async def make_once(shards, asked, bucket: int = NEAR, label: str = "a") -> bytes:
    async with shards.bucket(bucket).transaction(asked) as tx:
        if tx.answered:
            return tx.answer
        await add_thing(tx, label)
        await tx.append_outbox(event())
        await tx.answer_with(b"answer of " + label.encode())
        return b"first"


@pytest.mark.parametrize("bucket", [NEAR, NEAR_TOO, FAR], ids=["home", "same shard", "far"])
async def test_a_repeated_request_repeats_the_answer_and_not_the_effect(shards, bucket):
    asker, replays = user(NEAR), []
    assert await make_once(shards, once(asker), bucket) == b"first"
    repeated = once(asker, on_replay=lambda: replays.append(1))
    assert await make_once(shards, repeated, bucket, "b") == b"answer of a"
    assert await labels(shards) == ["a"]
    assert replays == [1]


@pytest.mark.parametrize("bucket", [NEAR, NEAR_TOO, FAR], ids=["home", "same shard", "far"])
async def test_a_key_with_another_request_is_refused_and_changes_nothing(shards, bucket):
    asker = user(NEAR)
    await make_once(shards, once(asker), bucket)
    with pytest.raises(IdempotencyKeyReused):
        await make_once(shards, once(asker, body=b"another"), bucket, "b")
    assert await labels(shards) == ["a"]


@pytest.mark.parametrize(("first", "second"), [*permutations([NEAR, NEAR_TOO, FAR], 2)])
@pytest.mark.parametrize("kind", [PrincipalKind.USER, PrincipalKind.ADMIN])
async def test_a_key_is_refused_under_another_shard_key_too(shards, first, second, kind):
    asker = Principal(kind, str(new_id(NEAR)))
    await make_once(shards, once(asker, body=b"for one"), first)
    with pytest.raises(IdempotencyKeyReused):
        await make_once(shards, once(asker, body=b"for another"), second, "b")
    assert await labels(shards) == ["a"]


async def test_keys_of_other_users_and_tenants_are_their_own(shards):
    subject = str(new_id(NEAR))
    askers = [
        Principal(PrincipalKind.USER, subject, "one"),
        Principal(PrincipalKind.USER, subject, "two"),
        user(NEAR),
    ]
    for number, asker in enumerate(askers):
        assert await make_once(shards, once(asker), label=f"{number}") == b"first"


@pytest.mark.parametrize("bucket", [NEAR, NEAR_TOO, FAR], ids=["home", "same shard", "far"])
async def test_a_business_refusal_is_stored_and_repeated(shards, bucket):
    asker, runs = user(NEAR), []

    async def refuse() -> None:
        async with shards.bucket(bucket).transaction(once(asker)) as tx:
            runs.append(1)
            await add_thing(tx, "undone")
            await tx.append_outbox(event())
            raise FailedPrecondition("too poor", reason="POOR", metadata={"account": "accounts/1"})

    for _ in range(2):
        with pytest.raises(FailedPrecondition) as caught:
            await refuse()
        error = caught.value
        assert (error.message, error.error_reason) == ("too poor", "POOR")
        assert error.metadata == {"account": "accounts/1"}
    assert runs == [1]
    assert await labels(shards) == []
    with pytest.raises(IdempotencyKeyReused):
        await make_once(shards, once(asker, body=b"another"), bucket)


async def test_a_violation_translated_to_a_refusal_is_stored_too(shards):
    asker = user(NEAR)
    await make_once(shards, once(asker, "other"))
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="taken"):
            async with shards.bucket(NEAR).transaction(once(asker)) as tx:
                try:
                    await add_thing(tx, "a")
                except UniqueViolation as error:
                    raise FailedPrecondition("taken") from error


@pytest.mark.parametrize("bucket", [NEAR, FAR], ids=["home", "far"])
async def test_sixty_four_at_once_under_one_key_have_one_effect(shards, bucket):
    asker = user(NEAR)
    answers = await asyncio.gather(*(make_once(shards, once(asker), bucket) for _ in range(64)))
    assert sorted(answers) == [b"answer of a"] * 63 + [b"first"]
    assert await labels(shards) == ["a"]


async def test_without_a_request_id_nothing_is_remembered(shards):
    for label in ("a", "b"):
        assert await make_once(shards, once(user(), key=""), label=label) == b"first"


async def test_an_effect_that_names_no_answer_still_happens_once(shards):
    asker = user()
    for _ in range(2):
        async with shards.bucket(NEAR).transaction(once(asker)) as tx:
            if not tx.answered:
                await add_thing(tx, "a")
    assert await labels(shards) == ["a"]


# Turns -----------------------------------------------------------------------------------


async def test_a_caller_cancelled_inside_leaves_nothing_and_blocks_nobody(shards):
    inside = asyncio.Event()

    async def stuck() -> None:
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "a")
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stuck())
    await inside.wait()
    task.cancel()
    async with asyncio.timeout(2), shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "b")
    assert await labels(shards) == ["b"]
    assert task.cancelled()


async def test_a_caller_cancelled_while_waiting_gets_no_turn(shards):
    async def add() -> None:
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "waited")

    async with shards.bucket(NEAR).transaction() as tx:
        waiting = asyncio.create_task(add())
        await asyncio.sleep(0)
        waiting.cancel()
        await add_thing(tx, "a")
    await asyncio.wait([waiting])
    assert await labels(shards) == ["a"]


async def test_a_failing_turn_does_not_touch_its_neighbours_in_the_group(shards):
    async def add(number: int) -> None:
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, f"{number:02}")
            if number % 2:
                raise NotFound("odd")

    await asyncio.gather(*(add(number) for number in range(20)), return_exceptions=True)
    assert await labels(shards) == [f"{number:02}" for number in range(0, 20, 2)]


async def test_a_turn_that_takes_too_long_is_rolled_back(shards, monkeypatch):
    monkeypatch.setattr(limits, "TURN_S_MAX", 0.1)
    with pytest.raises(DeadlineExceeded):
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "a")
            await asyncio.sleep(5)
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "b")
    assert await labels(shards) == ["b"]


async def test_a_caller_that_swallows_its_time_limit_is_rolled_back_all_the_same(
    shards, monkeypatch
):
    monkeypatch.setattr(limits, "TURN_S_MAX", 0.1)

    async def stubborn() -> None:
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "a")
            while True:
                try:
                    await asyncio.sleep(0.4)
                    break
                except asyncio.CancelledError:
                    continue

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0.2)
    async with asyncio.timeout(2), shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "b")
    await asyncio.wait([task])
    assert task.exception() is not None
    assert await labels(shards) == ["b"]


async def test_a_statement_that_runs_too_long_is_interrupted(shards, monkeypatch):
    monkeypatch.setattr(limits, "STATEMENT_S_MAX", 0.1)
    with pytest.raises(DeadlineExceeded):
        await shards.bucket(NEAR).fetch_all(SLOW)
    with pytest.raises(DeadlineExceeded):
        async with shards.bucket(NEAR).transaction() as tx:
            await tx.fetch_all(SLOW)
    async with asyncio.timeout(2), shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")


async def test_a_cancelled_read_does_not_hold_up_the_next(shards, monkeypatch):
    reading = [asyncio.create_task(shards.bucket(NEAR).fetch_all(SLOW)) for _ in range(4)]
    await asyncio.sleep(0.1)
    for task in reading:
        task.cancel()
    await asyncio.wait(reading)
    async with asyncio.timeout(1):
        assert await labels(shards) == []


async def test_reads_go_on_while_a_writer_holds_its_turn(shards):
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
        assert await asyncio.wait_for(labels(shards), 1) == []


async def test_what_was_committed_is_there_after_opening_again(engine):
    async with engine.open() as shards, shards.bucket(FAR).transaction() as tx:
        await add_thing(tx, "a")
    async with engine.open() as shards:
        assert await labels(shards) == ["a"]


COUNT_COVERED = "SELECT count(*) AS n FROM thing WHERE tenant = 'default' AND tenfold_owned(bucket)"


@pytest.mark.parametrize("statement", ["SELECT broken", SLOW], ids=["wrong", "too slow"])
async def test_a_covered_read_that_fails_leaves_its_reader_usable(shards, monkeypatch, statement):
    monkeypatch.setattr(limits, "STATEMENT_S_MAX", 0.1)
    shard = shards.all()[0]
    with pytest.raises((sqlite3.OperationalError, asyncpg.PostgresError, DeadlineExceeded)):
        await shard.fetch_covered(statement)
    for _ in range(8):
        assert (await shard.fetch_covered(COUNT_COVERED)).rows == [{"n": 0}]


async def test_a_covered_read_cut_in_the_middle_ends_at_once(shards):
    shard, loop = shards.all()[0], asyncio.get_running_loop()
    reading = asyncio.create_task(shard.fetch_covered(SLOW))
    await asyncio.sleep(0.2)
    began_s = loop.time()
    reading.cancel()
    await asyncio.wait([reading], timeout=10)
    assert reading.cancelled()
    assert loop.time() - began_s < 2
    assert (await shard.fetch_covered(COUNT_COVERED)).rows == [{"n": 0}]


# Causal reads ----------------------------------------------------------------------------


async def test_a_call_that_sends_its_token_along_reads_what_it_wrote(shards):
    seen = Seen()
    causal.begin(seen)
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    causal.begin(Seen.of_token(seen.token(), may_lag=True))
    rows = await shards.bucket(NEAR).causal.fetch_all(LIST_LABELS, "default")
    gathered = await scatter(shards, COUNT_COVERED, is_causal=True)
    assert [row["label"] for row in rows] == ["a"]
    assert sum(row["n"] for row in gathered.rows) == 1


@pytest.mark.parametrize("position", ["1.1", "1.7fffffffffffffff", "ffffffff.7fffffffffffffff"])
async def test_a_forged_token_gets_the_same_answer(shards, position):
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    forged = f"1.things.0.{position}.ffffffffffff"
    causal.begin(Seen.of_token(forged, may_lag=True))
    rows = await shards.bucket(NEAR).causal.fetch_all(LIST_LABELS, "default")
    assert [row["label"] for row in rows] == ["a"]


@pytest.mark.parametrize("is_scatter", [False, True], ids=["bucket", "scatter"])
async def test_no_transaction_decides_by_what_a_replica_may_answer(shards, is_scatter):
    causal.begin(Seen(may_lag=True))
    with pytest.raises(ValueError, match="inside a transaction"):
        async with shards.bucket(NEAR).transaction():
            if is_scatter:
                await shards.all()[0].fetch_covered(COUNT_COVERED, is_causal=True)
            else:
                await shards.bucket(NEAR).causal.fetch_one(LIST_LABELS, "default")
