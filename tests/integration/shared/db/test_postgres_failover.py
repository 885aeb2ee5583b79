"""A primary dies and its replica is promoted: pools follow, the past is not written to."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import asyncpg
import pytest

from deploy.local import postgres
from deploy.local.processes import family
from shared.db import limits, postgres_connection
from shared.db import postgres as postgres_shards
from shared.db.errors import DatabaseRefused
from shared.db.postgres_promotion import promote
from shared.db.postgres_shards import parse_servers
from shared.errors import Aborted, DeadlineExceeded, Unavailable
from tests.databases import Contents, PostgresPlace
from tests.integration.shared.db.conftest import MIGRATIONS, NEAR, add_thing, labels, once, user
from tests.pair import REPLICA, Pair, running_pair


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with running_pair("things") as running:
        yield running


def place_on(pair: Pair) -> PostgresPlace:
    """One shard whose hosts are both."""
    return PostgresPlace(pair.dsn("things"), Contents(MIGRATIONS, "things", 1))


async def open_once(place: PostgresPlace) -> None:
    async with place.open():
        pass


async def write(shards, label: str) -> None:
    async with shards.bucket(NEAR).transaction(once(user(NEAR), label)) as tx:
        if not tx.answered:
            await add_thing(tx, label)


async def test_pools_follow_a_promotion_and_leave_the_primary_of_the_past_alone(pair):
    first, second = pair.addresses
    async with place_on(pair).open() as shards:
        await write(shards, "before")
        await pair.replicated()
        await pair.end("primary", signal.SIGKILL)
        with pytest.raises(Unavailable):
            await write(shards, "between")
        await postgres.promote(pair.site, second)
        await asyncio.sleep(0.2)  # what was just asked is not asked again at once
        await write(shards, "after")
        assert await labels(shards) == ["after", "before"]

        await pair.start("primary", first)  # it believes that it is still the primary
        for shard in shards.all():
            await shard.follow()
        await write(shards, "later")
        assert await labels(shards) == ["after", "before", "later"]
        await pair.end("primary", signal.SIGINT)

    async with place_on(pair).open() as shards:
        assert await labels(shards) == ["after", "before", "later"]


async def test_a_replica_alone_or_a_primary_of_the_past_is_refused_at_a_start(
    pair, postgres_server
):
    # The shards' Control is in the first, on another server; the pair is the second.
    [control] = await postgres_server.make_databases(1)
    contents = Contents(MIGRATIONS, "things", 2)
    place = PostgresPlace(f"{control},{place_on(pair).name}", contents)
    async with place.open():
        await pair.replicated()
    replica = PostgresPlace(f"{control},{pair.site.dsn(pair.addresses[1], 'things')}", contents)
    with pytest.raises(DatabaseRefused, match=r"shard 1 of things at .* is a replica"):
        await open_once(replica)

    await pair.end("primary", signal.SIGKILL)
    await postgres.promote(pair.site, pair.addresses[1])
    await open_once(place)
    await pair.end(REPLICA, signal.SIGKILL)
    await pair.start("primary", pair.addresses[0])
    with pytest.raises(DatabaseRefused, match=r"shard 1 .* is a primary of the past \(timeline 1"):
        await open_once(place)
    await pair.start(REPLICA, pair.addresses[1])
    await open_once(place)
    await postgres_server.drop_databases([control])


@pytest.mark.parametrize("cut_short_by", ["our own patience", "an operator"])
async def test_a_commit_that_is_not_on_the_standby_that_must_have_it_is_unknown(
    pair, monkeypatch, cut_short_by
):
    await pair.require_standby()
    monkeypatch.setattr(limits, "STATEMENT_S_MAX", 0.2)
    monkeypatch.setattr(postgres_connection, "GRACE_S", 0.2 if "our" in cut_short_by else 5)
    monkeypatch.setattr(postgres_shards, "RESOLVE_S_MAX", 0.5)
    async with place_on(pair).open() as shards:
        await write(shards, "before")
        frozen = pair.processes[REPLICA]
        frozen.send_signal(signal.SIGSTOP)
        for child in family(frozen.pid):
            os.kill(child.pid, signal.SIGSTOP)
        asked = once(user(NEAR), "between")
        try:
            writing = asyncio.create_task(add_once(shards, asked))
            if cut_short_by == "an operator":
                await end_the_wait(pair)
            with pytest.raises(Unavailable, match="not known"):
                await writing
        finally:
            for child in family(frozen.pid):
                os.kill(child.pid, signal.SIGCONT)
        await add_once(shards, asked)
        assert await labels(shards) == ["before", "between"]


async def add_once(shards, asked) -> None:
    async with shards.bucket(NEAR).transaction(asked) as tx:
        if not tx.answered:
            await add_thing(tx, "between")


async def end_the_wait(pair: Pair) -> None:
    admin = await asyncpg.connect(pair.site.admin_dsn(pair.addresses[0]))
    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    async with asyncio.timeout(10):
        while not await admin.fetch(cancel):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await admin.close()


async def test_what_was_acknowledged_with_a_synchronous_standby_survives_its_promotion(pair):
    await pair.require_standby()
    acknowledged: list[str] = []
    goes_on, is_over = asyncio.Event(), asyncio.Event()

    async def write_on(number: int, shards) -> None:
        count = 0
        while not is_over.is_set():
            label = f"{number}-{count}"
            asked = once(user(NEAR), label)
            while not await is_answered(shards, asked, label):  # noqa: ASYNC110 - the same one
                await asyncio.sleep(0.05)
            acknowledged.append(label)
            count += 1
            if len(acknowledged) >= 40:
                goes_on.set()

    async with place_on(pair).open() as shards, asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(write_on(number, shards))
        await goes_on.wait()
        await pair.end("primary", signal.SIGKILL)
        before = len(acknowledged)
        promoted = await promote(parse_servers(operators_place(pair).name, service="things"), 0)
        assert promoted.reconciled.timeline == 2
        async with asyncio.timeout(30):
            while len(acknowledged) < before + 40:  # noqa: ASYNC110 - writers ring no bell
                await asyncio.sleep(0.01)
        is_over.set()
    async with place_on(pair).open() as shards:
        assert await labels(shards) == sorted(acknowledged)


def operators_place(pair: Pair) -> PostgresPlace:
    """A service's role may not promote."""
    name = pair.dsn("things").replace(
        f"{postgres.OWNER}:{pair.site.password}", f"{postgres.ADMIN}:{pair.site.admin_password}"
    )
    return PostgresPlace(name, Contents(MIGRATIONS, "things", 1))


async def is_answered(shards, asked, label: str) -> bool:
    try:
        async with shards.bucket(NEAR).transaction(asked) as tx:
            if not tx.answered:
                await add_thing(tx, label)
    except (Unavailable, Aborted, DeadlineExceeded):
        return False
    return True
