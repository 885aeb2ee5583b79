"""A Postgres shard with streaming replicas that lag as much as they are told to."""

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from deploy.local import postgres
from deploy.local.address import Address, free_addresses
from deploy.local.postgres import PRIMARY
from deploy.local.supervisor import open_supervisor

DATABASE = "things"


def node_of(index: int) -> str:
    """The replica's name at its site."""
    return f"replica_{index}"


@dataclass(frozen=True)
class Replicated:
    """A running primary and its replicas.

    Attributes:
        site: their place and passwords.
        addresses: the primary's, then each replica's.
    """

    site: postgres.Site
    addresses: Sequence[Address]

    @property
    def dsn(self) -> str:
        """One shard, all of its hosts."""
        first = self.addresses[0]
        hosts = ",".join(map(str, self.addresses))
        return self.site.dsn(first, DATABASE).replace(str(first), hosts)

    async def run(self, index: int, statement: str) -> object:
        """What an operator types at one of the hosts; the first value of the answer."""
        admin = await asyncpg.connect(self.site.admin_dsn(self.addresses[index], DATABASE))
        try:
            return await admin.fetchval(statement)
        finally:
            await admin.close()

    def send(self, index: int, signal_number: signal.Signals) -> None:
        """Signal one of the servers; one that ends is started again."""
        node = PRIMARY if index == 0 else node_of(index)
        pid = (self.site.data_of(node) / "postmaster.pid").read_text().split()[0]
        os.kill(int(pid), signal_number)

    async def delay(self, index: int, milliseconds: int) -> None:
        """Let a replica replay each commit so much later than it was made."""
        await self.run(index, f"ALTER SYSTEM SET recovery_min_apply_delay = {milliseconds}")
        await self.run(index, "SELECT pg_reload_conf()")


@asynccontextmanager
async def running_replicated(*delays_ms: int) -> AsyncIterator[Replicated]:
    """A primary, and a replica for each delay."""
    folder = Path(tempfile.mkdtemp(prefix="tenfold-postgres-"))
    os.chmod(folder, 0o711)  # Postgres runs as another user
    addresses = free_addresses(1 + len(delays_ms))
    nodes = [node_of(index) for index, _ in enumerate(delays_ms, 1)]
    try:
        site = postgres.open_site(folder, os.environ, is_durable=False)
        postgres.make_primary(site)
        async with open_supervisor(logs=folder, say=print) as supervisor:
            await supervisor.start(postgres.postgres_program(site, addresses[0]))
            await postgres.ensure_databases(site, addresses[0], [DATABASE], replicas=nodes)
            for node, address in zip(nodes, addresses[1:], strict=True):
                postgres.make_replica(site, node, addresses[0])
                program = postgres.postgres_program(site, address, node=node, source=addresses[0])
                await supervisor.start(program)
            running = Replicated(site, addresses)
            for index, delay_ms in enumerate(delays_ms, 1):
                await running.delay(index, delay_ms)
            yield running
    finally:
        shutil.rmtree(folder)
