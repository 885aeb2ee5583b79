"""The database's engine beside plain asyncpg on the same Postgres.

Run: make bench-shards. The last line is one JSON object. Ours routes by id, is admitted in the
shard and passes its guards; the peer is asyncpg's own pool and transaction on the same table
without any of that. That pool resets each connection that comes back, in a round trip that we do
not need; the rows named "bare" are beside a pool that was told to reset nothing. Each figure is
wall time per operation of one caller, the best of several rounds that alternate; the server does
not flush to disk, which would hide the work.
"""

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from deploy.local import postgres
from deploy.local.address import free_addresses
from deploy.local.supervisor import open_supervisor
from shared.clock import SystemClock
from shared.db.ids import new_id, random_bucket
from shared.db.port import Shards
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_shards import parse_servers
from tests.databases import PostgresServer

ROUNDS, ROUND_OPERATIONS = 15, 300
MIGRATIONS = Path(__file__).parents[1] / "integration/shared/db/migrations"
SECRET = b"a secret of thirty-two bytes...!"
TABLE = """
CREATE TABLE thing (
    bucket smallint NOT NULL, id uuid NOT NULL, tenant text NOT NULL, owner uuid NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    label text NOT NULL CONSTRAINT thing_label CHECK (length(label) < 100),
    PRIMARY KEY (bucket, id));
CREATE UNIQUE INDEX thing_label_once ON thing (tenant, label);
"""
INSERT = "INSERT INTO thing (bucket, id, tenant, owner, label) VALUES ($1, $2, $3, $4, $5)"
SELECT = "SELECT id, label, version FROM thing WHERE bucket = $1 AND id = $2 AND tenant = $3"

Operation = Callable[[], Awaitable[None]]


@asynccontextmanager
async def running_server() -> AsyncIterator[PostgresServer]:
    folder, [address] = Path(tempfile.mkdtemp(prefix="tenfold-bench-")), free_addresses(1)
    os.chmod(folder, 0o711)
    try:
        site = postgres.open_site(folder, os.environ, is_durable=False)
        postgres.make_primary(site)
        async with open_supervisor(logs=folder, say=print) as supervisor:
            await supervisor.start(postgres.postgres_program(site, address))
            yield PostgresServer(site, address)
    finally:
        shutil.rmtree(folder)


async def microseconds(*operations: Operation) -> list[float]:
    """Wall time of each, in the best of rounds that take turns."""
    best = [float("inf")] * len(operations)
    for _ in range(ROUNDS):
        for index, operation in enumerate(operations):
            started_s = time.perf_counter()
            for _ in range(ROUND_OPERATIONS):
                await operation()
            best[index] = min(best[index], (time.perf_counter() - started_s) / ROUND_OPERATIONS)
    return [seconds * 1e6 for seconds in best]


async def reset_nothing(connection: object) -> None:
    """What a pool may be given in place of its own RESET ALL."""


def row(what: str, ours: float, peer: float) -> dict[str, object]:
    return {
        "what": what,
        "unit": "us",
        "ours": round(ours, 1),
        "peer": round(peer, 1),
        "ratio": round(ours / peer, 3),
        "better": "lower",
    }


async def write_row(what: str, shards: Shards, pool: asyncpg.Pool) -> dict[str, object]:
    async def ours() -> None:
        bucket = random_bucket()
        key = new_id(bucket)
        async with shards.holding(key).transaction() as tx:
            await tx.execute(INSERT, bucket, key, "default", key, str(key))

    async def plain() -> None:
        bucket = random_bucket()
        key = new_id(bucket)
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(INSERT, bucket, key, "default", key, str(key))

    return row(what, *await microseconds(ours, plain))


async def read_row(what: str, shards: Shards, pool: asyncpg.Pool) -> dict[str, object]:
    bucket = random_bucket()
    key = new_id(bucket)
    async with shards.holding(key).transaction() as tx:
        await tx.execute(INSERT, bucket, key, "default", key, str(key))
    async with pool.acquire() as connection:
        await connection.execute(INSERT, bucket, key, "default", key, str(key))

    async def ours() -> None:
        assert await shards.holding(key).fetch_one(SELECT, bucket, key, "default")

    async def plain() -> None:
        async with pool.acquire() as connection:
            assert await connection.fetchrow(SELECT, bucket, key, "default")

    return row(what, *await microseconds(ours, plain))


async def main() -> None:
    async with running_server() as server:
        [plain_dsn] = await server.make_databases(1)
        async with (
            asyncpg.create_pool(plain_dsn, min_size=1, max_size=4) as pool,
            asyncpg.create_pool(plain_dsn, min_size=1, max_size=4, reset=reset_nothing) as bare,
            server.shards(1, migrations=MIGRATIONS, service="things") as setting,
            open_postgres_shards(
                parse_servers(setting, service="things"),
                migrations=MIGRATIONS,
                secret=SECRET,
                clock=SystemClock(),
                service="things",
            ) as shards,
        ):
            await pool.execute(TABLE)
            rows = [
                await write_row("write", shards, pool),
                await read_row("read", shards, pool),
                await write_row("write, bare", shards, bare),
                await read_row("read, bare", shards, bare),
            ]
    for entry in rows:
        print(f"{entry['what']}: {entry['ours']} us, plain {entry['peer']} us, x {entry['ratio']}")
    print(json.dumps({"bench": "shards", "engine": "asyncpg", "rows": rows}))


if __name__ == "__main__":
    asyncio.run(main())
