"""A primary dies and its replica is promoted: pools follow, the past is not written to."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest

from deploy.local import postgres
from deploy.local.address import Address, free_addresses
from deploy.local.processes import family
from deploy.local.program import Program
from deploy.local.supervisor import WRAPPER
from shared.db import limits, postgres_connection
from shared.db import postgres as postgres_shards
from shared.db.errors import DatabaseRefused
from shared.errors import Unavailable
from tests.databases import Contents, PostgresPlace
from tests.integration.shared.db.conftest import MIGRATIONS, NEAR, add_thing, labels, once, user

REPLICA = "replica_1"


@dataclass
class Pair:
    """A primary and its streaming replica, as processes that can be killed."""

    site: postgres.Site
    addresses: list[Address]
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    async def start(self, node: str, address: Address, source: Address | None = None) -> None:
        program = postgres.postgres_program(self.site, address, node=node, source=source)
        self.processes[node] = await self._spawn(program)
        async with asyncio.timeout(30):
            while not await program.is_ready():  # noqa: ASYNC110 - it rings no bell
                await asyncio.sleep(0.02)

    async def _spawn(self, program: Program) -> asyncio.subprocess.Process:
        log = (self.site.folder / f"{program.name}.log").open("ab")
        with log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(WRAPPER), str(os.getpid()), program.user),
                *program.argv,
                env=dict(program.environment),
                stdout=log,
                stderr=log,
            )

    async def end(self, node: str, how: signal.Signals) -> None:
        process = self.processes.pop(node)
        process.send_signal(how)
        await process.wait()

    @property
    def place(self) -> PostgresPlace:
        """One shard whose hosts are both."""
        first, second = self.addresses
        dsn = self.site.dsn(first, "things").replace(f"{first}", f"{first},{second}")
        return PostgresPlace(dsn, Contents(MIGRATIONS, "things", 1))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    folder = Path(tempfile.mkdtemp(prefix="tenfold-postgres-"))
    os.chmod(folder, 0o711)
    pair = Pair(postgres.open_site(folder, os.environ, is_durable=False), free_addresses(2))
    try:
        first, second = pair.addresses
        postgres.make_primary(pair.site)
        await pair.start("primary", first)
        await postgres.ensure_databases(pair.site, first, ["things"], replicas=[REPLICA])
        postgres.make_replica(pair.site, REPLICA, first)
        await pair.start(REPLICA, second, source=first)
        yield pair
    finally:
        for node in list(pair.processes):
            await pair.end(node, signal.SIGINT)
        shutil.rmtree(folder)


async def replicated(pair: Pair) -> None:
    """Return when the replica has all that the primary has."""
    admin = await asyncpg.connect(pair.site.admin_dsn(pair.addresses[0]))
    behind = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()"
    async with asyncio.timeout(10):
        while not await admin.fetchval(behind):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await admin.close()


async def open_once(place: PostgresPlace) -> None:
    async with place.open():
        pass


async def write(shards, label: str) -> None:
    async with shards.bucket(NEAR).transaction(once(user(NEAR), label)) as tx:
        if not tx.answered:
            await add_thing(tx, label)


async def test_pools_follow_a_promotion_and_leave_the_primary_of_the_past_alone(pair):
    first, second = pair.addresses
    async with pair.place.open() as shards:
        await write(shards, "before")
        await replicated(pair)
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

    async with pair.place.open() as shards:
        assert await labels(shards) == ["after", "before", "later"]


async def test_a_replica_alone_or_a_primary_of_the_past_is_refused_at_a_start(
    pair, postgres_server
):
    # The shards' Control is in the first, on another server; the pair is the second.
    [control] = await postgres_server.make_databases(1)
    contents = Contents(MIGRATIONS, "things", 2)
    place = PostgresPlace(f"{control},{pair.place.name}", contents)
    async with place.open():
        await replicated(pair)
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


async def require_standby(pair: Pair) -> None:
    """From now on a commit waits for the replica."""
    admin = await asyncpg.connect(pair.site.admin_dsn(pair.addresses[0]))
    await admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    await admin.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(10):
        states = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        while not await admin.fetchval(states):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await admin.close()


@pytest.mark.parametrize("cut_short_by", ["our own patience", "an operator"])
async def test_a_commit_that_is_not_on_the_standby_that_must_have_it_is_unknown(
    pair, monkeypatch, cut_short_by
):
    await replicated(pair)
    await require_standby(pair)
    monkeypatch.setattr(limits, "STATEMENT_S_MAX", 0.2)
    monkeypatch.setattr(postgres_connection, "GRACE_S", 0.2 if "our" in cut_short_by else 5)
    monkeypatch.setattr(postgres_shards, "RESOLVE_S_MAX", 0.5)
    async with pair.place.open() as shards:
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
