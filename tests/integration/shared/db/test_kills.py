"""Kill -9 at each named point: what was answered is there, what is there is there once."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

from shared.db import uniq
from shared.db.ids import new_id
from shared.db.port import Shards
from shared.identity import Principal, PrincipalKind
from tests.databases import Contents, Place, PostgresPlace, SqlitePlace
from tests.integration.shared.db.claimant_process import COMMITS, EXPIRED, create
from tests.integration.shared.db.conftest import FAR, MIGRATIONS, NEAR, labels, once

ROOT = Path(__file__).parents[4]
PROGRAM = "tests.integration.shared.db.writer_process"
SIGKILLED = -9
CLAIMANTS = "tests.integration.shared.db.claimant_process"
MUCH_LATER = EXPIRED + 10 * uniq.RESERVED_US


def write(place: str, subject: str, bucket: int, *, crash_point: str = "") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM, place, subject, str(bucket)],
        cwd=ROOT,
        env={**os.environ, "TENFOLD_CRASH_POINT": crash_point},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in {0, SIGKILLED}, done.stderr
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize("bucket", [NEAR, FAR], ids=["one shard", "across shards"])
@pytest.mark.parametrize(
    ("crash_point", "repeat"),
    [
        ("db.before_commit:1", "first"),
        ("db.after_commit:1", "repeated"),
        ("db.before_commit:2", "first"),
        ("db.after_commit:2", "repeated"),
        ("db.claimed_not_effected:1", "first"),
    ],
)
async def test_a_retry_after_a_kill_has_the_effect_exactly_once(
    engine, bucket, crash_point, repeat
):
    point, _, visit = crash_point.partition(":")
    is_across = bucket == FAR
    if not is_across and (visit == "2" or point == "db.claimed_not_effected"):
        return  # one shard takes one commit, and claims nothing ahead
    if is_across and (point, visit) == ("db.after_commit", "1"):
        repeat = "first"  # that commit was the claim's
    subject = str(new_id(NEAR))
    code, printed = write(engine.name, subject, bucket, crash_point=crash_point)
    assert (code, printed) == (SIGKILLED, "")
    assert write(engine.name, subject, bucket) == (0, repeat)
    async with engine.open() as shards:
        asked = once(Principal(PrincipalKind.USER, subject))
        async with shards.bucket(bucket).transaction(asked) as tx:
            assert (tx.answered, tx.answer) == (True, b"repeated")
        assert await labels(shards) == ["a"]
        rows = await shards.bucket(bucket).fetch_all("SELECT event_no FROM outbox")
        assert [row["event_no"] for row in rows] == [1]


@pytest.fixture(params=["sqlite", "postgres"])
async def unmade(request, tmp_path, postgres_server) -> AsyncIterator[Place]:
    """Shards that nobody has ever served."""
    contents = Contents(MIGRATIONS, "things")
    if request.param == "sqlite":
        yield SqlitePlace(tmp_path / "data", contents)
        return
    dsns = await postgres_server.make_databases(4)
    yield PostgresPlace(",".join(dsns), contents)
    await postgres_server.drop_databases(dsns)


async def test_a_start_that_was_killed_between_its_migrations_goes_on_at_the_next(unmade):
    subject = str(new_id(NEAR))
    for visit in (2, 5):
        killed = write(unmade.name, subject, NEAR, crash_point=f"db.migrated_not_committed:{visit}")
        assert killed == (SIGKILLED, "")
    assert write(unmade.name, subject, NEAR) == (0, "first")
    async with unmade.open() as shards:
        assert await labels(shards) == ["a"]
        applied = "SELECT count(*) AS n FROM tenfold_migration"
        counts = [(await shard.fetch_one(applied))["n"] for shard in shards.all()]
        assert counts == [counts[0]] * 4


def die_at_each_commit(place: str) -> list[tuple[str, UUID, UUID]]:
    """Values, each with who claimed it and died on the way, and who had claimed it before."""
    done = subprocess.run(
        [sys.executable, "-m", CLAIMANTS, place],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert {signal_number for *_, signal_number in told} == {-SIGKILLED}, done.stderr
    return [(value, UUID(claimant), UUID(before)) for value, claimant, before, _ in told]


async def owner_of(shards: Shards, value: uniq.UniqueValue, heir: UUID) -> UUID | None:
    """Whose it is once another has asked for it, long after."""
    try:
        await uniq.reserve_unique(shards, value, heir, now_us=MUCH_LATER)
    except uniq.UniqueTaken as taken:
        return taken.owner_id
    await create(shards, heir)
    async with shards.bucket(value.bucket).transaction() as tx:
        assert await uniq.confirm_unique(tx, value, heir)
    return heir


async def existing(shards: Shards, *ids: UUID) -> list[UUID]:
    live = []
    for one in ids:
        row = await shards.holding(one).fetch_one("SELECT state FROM id_slot WHERE id = $1", one)
        live += [one] if row and row["state"] == "LIVE" else []
    return live


async def test_a_value_has_one_owner_whoever_died_at_which_commit_of_claiming_it(engine):
    async with engine.open() as shards:
        told = die_at_each_commit(engine.name)
        assert len(told) == 2 * sum(COMMITS.values())
        for text, claimant, before in told:
            value, heir = uniq.UniqueValue("default", "email", text), new_id(FAR)
            owner = await owner_of(shards, value, heir)
            assert await existing(shards, claimant, before, heir) == [owner], text
            assert await uniq.find_unique(shards.bucket(value.bucket), value) == owner, text
