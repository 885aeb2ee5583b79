"""A primary and its streaming replica whose processes a test kills; roles change as it promotes."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from deploy.local import postgres
from deploy.local.address import Address, free_addresses
from deploy.local.program import Program
from deploy.local.supervisor import WRAPPER

REPLICA = "replica_1"


@dataclass
class Pair:
    """A primary and its streaming replica, as processes that can be killed.

    Attributes:
        addresses: of the node "primary", then of REPLICA, whatever their roles are by now.
    """

    site: postgres.Site
    addresses: list[Address]
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    is_swapped: bool = False

    @property
    def nodes(self) -> tuple[str, str]:
        """The primary's name and the replica's."""
        return (REPLICA, "primary") if self.is_swapped else ("primary", REPLICA)

    def address(self, node: str) -> Address:
        """Where a node answers."""
        return self.addresses[("primary", REPLICA).index(node)]

    def dsn(self, database: str) -> str:
        """Both hosts, as a service names them."""
        first, second = self.addresses
        return self.site.dsn(first, database).replace(f"{first}", f"{first},{second}")

    async def start(self, node: str, address: Address, source: Address | None = None) -> None:
        """Start a node, a replica if it has a source; return when it answers."""
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
        """Signal a node and wait for its end."""
        process = self.processes.pop(node)
        process.send_signal(how)
        await process.wait()

    async def ask(self, node: str, *statements: str) -> object:
        """What an operator types at a node; the first value of the last answer."""
        admin = await asyncpg.connect(self.site.admin_dsn(self.address(node)))
        try:
            for statement in statements:
                answer = await admin.fetchval(statement)
            return answer
        finally:
            await admin.close()

    async def until(self, node: str, condition: str) -> None:
        """Return when a statement's first value is true."""
        async with asyncio.timeout(30):
            while not await self.ask(node, condition):  # noqa: ASYNC110 - it rings no bell
                await asyncio.sleep(0.01)

    async def replicated(self) -> None:
        """Return when the replica has all that the primary has."""
        primary, _ = self.nodes
        behind = (
            "SELECT count(*) > 0 FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()"
        )
        await self.until(primary, behind)

    async def require_standby(self) -> None:
        """From now on a commit waits for the replica, which has all that came before."""
        primary, _ = self.nodes
        await self.ask(
            primary,
            "ALTER SYSTEM SET synchronous_standby_names = '*'",
            "SELECT pg_reload_conf()",
        )
        is_sync = "SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state = 'sync'"
        await self.until(primary, is_sync)
        await self.ask(primary, "SELECT pg_logical_emit_message(true, 'tenfold', '')")

    async def cut(self) -> None:
        """From now on the replica receives nothing: what comes is lost with the primary."""
        _, replica = self.nodes
        await self.ask(replica, "ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()")
        await self.until(replica, "SELECT count(*) = 0 FROM pg_stat_wal_receiver")

    async def fail_over(self) -> None:
        """Kill the primary and promote the replica; the dead one stays dead."""
        primary, replica = self.nodes
        await self.end(primary, signal.SIGKILL)
        await postgres.promote(self.site, self.address(replica))
        self.is_swapped = not self.is_swapped

    async def remake(self) -> None:
        """Make the dead node a replica of the primary."""
        primary, dead = self.nodes
        shutil.rmtree(self.site.data_of(dead))
        await postgres.ensure_databases(self.site, self.address(primary), [], replicas=[dead])
        await asyncio.to_thread(postgres.make_replica, self.site, dead, self.address(primary))
        (self.site.data_of(dead) / "postgresql.auto.conf").write_text("")
        await self.start(dead, self.address(dead), source=self.address(primary))


@asynccontextmanager
async def running_pair(*databases: str) -> AsyncIterator[Pair]:
    """A primary with these databases, and its replica."""
    folder = Path(tempfile.mkdtemp(prefix="tenfold-postgres-"))
    os.chmod(folder, 0o711)  # Postgres runs as another user
    pair = Pair(postgres.open_site(folder, os.environ, is_durable=False), free_addresses(2))
    try:
        first, second = pair.addresses
        postgres.make_primary(pair.site)
        await pair.start("primary", first)
        await postgres.ensure_databases(pair.site, first, databases, replicas=[REPLICA])
        postgres.make_replica(pair.site, REPLICA, first)
        await pair.start(REPLICA, second, source=first)
        yield pair
    finally:
        for node in list(pair.processes):
            await pair.end(node, signal.SIGINT)
        shutil.rmtree(folder)
