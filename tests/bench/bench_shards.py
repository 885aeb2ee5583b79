"""The database's engine beside plain asyncpg on the same Postgres.

Run: make bench-shards. The last line is one JSON object. Ours routes by id, is admitted in the
shard and passes its guards; the peer is asyncpg's own pool and transaction on the same table
without any of that. That pool resets each connection that comes back, in a round trip that we do
not need; the rows named "bare" are beside a pool that was told to reset nothing. Each figure is
wall time per operation of one caller, the best of several rounds that alternate; the server does
not flush to disk, which would hide the work.

"growth rows": a write and a read in a table of 10^4 rows and in one of 10^6 (or as --rows says).
"growth shards": the CPU that the server spends on a write and a read, over one shard and over
eight, one eighth of the buckets after the other. If the shards took turns on two cores, what is in
the cores' caches would be measured, and not the work. The ratio of both is largest ÷ smallest.

With a streaming replica that has no lag of its own: "write, position" is a write whose caller is
told how far the log was, "read, replica" a read that the replica answers, beside plain asyncpg on
the same primary and the same replica. "connections" are all that a process holds open to one shard
with one replica while 64 callers write and read.
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from deploy.local import postgres
from deploy.local.address import free_addresses
from deploy.local.processes import PROC
from deploy.local.supervisor import open_supervisor
from shared import causal
from shared.causal import Seen
from shared.clock import SystemClock
from shared.db.ids import BUCKET_COUNT, new_id, random_bucket
from shared.db.port import Shards
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_replicas import LagGuard
from shared.db.postgres_shards import parse_servers
from tests.databases import PostgresServer
from tests.own_writes import tell
from tests.replicated import Replicated, running_replicated

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


# Ids as shared/db/ids.py makes them: version 7, the bucket in rand_a, the number in the tail.
FILL = """
INSERT INTO thing (bucket, id, tenant, owner, label)
SELECT made.bucket, made.id, 'default', made.id, 'row ' || made.number FROM (
    SELECT number, number % 4096 AS bucket, (
        '01900000-0000-7' || lpad(to_hex(number % 4096), 3, '0') || '-8000-'
        || lpad(to_hex(number), 12, '0'))::uuid AS id
    FROM generate_series({}, {}) AS number) AS made
"""
ROWS_SMALL, ROWS_LARGE = 10_000, 1_000_000
SHARDS_MANY, OPERATIONS_OF_CPU, ROUNDS_OF_CPU = 8, 2000, 5
BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'tenfold-things'"


def growth_row(what: str, unit: str, smallest: float, largest: float) -> dict[str, object]:
    return {
        "what": what,
        "unit": unit,
        "ours": round(largest, 1),
        "peer": None,
        "ratio": round(largest / smallest, 3),
        "better": "lower",
    }


@asynccontextmanager
async def serving(server: PostgresServer, shard_count: int) -> AsyncIterator[tuple[str, Shards]]:
    """New shards of ours, and the setting that names them."""
    async with (
        server.shards(shard_count, migrations=MIGRATIONS, service="things") as setting,
        open_postgres_shards(
            parse_servers(setting, service="things"),
            migrations=MIGRATIONS,
            secret=SECRET,
            clock=SystemClock(),
            service="things",
        ) as shards,
    ):
        yield setting, shards


def write_and_read(shards: Shards, choose: Callable[[], int] = random_bucket) -> Operation:
    async def operation() -> None:
        bucket = choose()
        key = new_id(bucket)
        async with shards.holding(key).transaction() as tx:
            await tx.execute(INSERT, bucket, key, "default", key, str(key))
        assert await shards.holding(key).fetch_one(SELECT, bucket, key, "default")

    return operation


async def fill(server: PostgresServer, setting: str, first: int, last: int) -> None:
    async with server.admin(setting.rpartition("/")[2]) as admin:
        await admin.execute("SET session_replication_role = replica")
        await admin.execute(FILL.format(first, last), timeout=600)
        await admin.execute("VACUUM ANALYZE thing", timeout=600)


async def growth_of_rows(server: PostgresServer, rows_large: int) -> dict[str, object]:
    async with serving(server, 1) as (setting, shards):
        await fill(server, setting, 1, ROWS_SMALL)
        [small] = await microseconds(write_and_read(shards))
        await fill(server, setting, ROWS_SMALL + 1, rows_large)
        [large] = await microseconds(write_and_read(shards))
    return growth_row("growth rows", "us", small, large)


async def growth_of_shards(server: PostgresServer) -> dict[str, object]:
    """CPU of the server's processes that serve us, the best of rounds that take turns."""
    async with serving(server, 1) as (_, one), serving(server, SHARDS_MANY) as (_, many):
        operations = [write_and_read(shards, shard_by_shard()) for shards in (one, many)]
        for operation in operations:
            await repeat(operation)  # every connection has its plans after that
        async with server.admin() as admin:
            pids = [row["pid"] for row in await admin.fetch(BACKENDS)]
        best_s = [float("inf")] * len(operations)
        for _ in range(ROUNDS_OF_CPU):
            for index, operation in enumerate(operations):
                before_s = cpu_s(pids)
                await repeat(operation)
                best_s[index] = min(best_s[index], cpu_s(pids) - before_s)
    smallest, largest = (seconds / OPERATIONS_OF_CPU * 1e6 for seconds in best_s)
    return growth_row("growth shards", "us of CPU", smallest, largest)


def shard_by_shard() -> Callable[[], int]:
    """Buckets of one eighth of all after the other: the same for one shard as for eight."""
    numbers = itertools.count()
    span = BUCKET_COUNT // SHARDS_MANY

    def choose() -> int:
        run = next(numbers) // (OPERATIONS_OF_CPU // SHARDS_MANY)
        return run % SHARDS_MANY * span + random_bucket() % span

    return choose


async def repeat(operation: Operation) -> None:
    for _ in range(OPERATIONS_OF_CPU):
        await operation()


def cpu_s(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        stat = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        ticks += int(stat[11]) + int(stat[12])  # utime and stime, proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


CALLERS, READS_OF_CALLERS = 64, 20_000
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tenfold-things'"


async def rows_of_replicas() -> list[dict[str, object]]:
    async with running_replicated(0) as running:
        primary, replica = (running.site.dsn(one, "plain") for one in running.addresses)
        await postgres.ensure_databases(running.site, running.addresses[0], ["plain"])
        opened = open_postgres_shards(
            parse_servers(running.dsn, service="things"),
            migrations=MIGRATIONS,
            secret=SECRET,
            clock=SystemClock(),
            service="things",
            lag_guard=LagGuard(),
        )
        async with (
            opened as shards,
            asyncpg.create_pool(primary, min_size=1, max_size=4) as pool,
            asyncpg.create_pool(replica, min_size=1, max_size=4) as far,
        ):
            await pool.execute(TABLE)
            causal.begin(Seen())
            write = await write_row("write, position", shards, pool)
            read = await replica_read_row("read, replica", shards, pool, far)
            return [write, read, await connections_row(running, shards)]


async def replica_read_row(
    what: str, shards: Shards, pool: asyncpg.Pool, far: asyncpg.Pool
) -> dict[str, object]:
    seen, bucket = Seen(), random_bucket()
    key = new_id(bucket)
    causal.begin(seen)
    async with shards.holding(key).transaction() as tx:
        await tx.execute(INSERT, bucket, key, "default", key, str(key))
    await pool.execute(INSERT, bucket, key, "default", key, str(key))
    token = seen.token()

    async def ours() -> None:
        causal.begin(Seen.of_token(token, may_lag=True))
        assert await shards.holding(key).causal.fetch_one(SELECT, bucket, key, "default")

    async def plain() -> None:
        async with far.acquire() as connection:
            await connection.fetchrow(SELECT, bucket, key, "default")

    replicas = shards.all()[0].replicas
    while not replicas.answered_count:
        await ours()
    before = replicas.spilled_count
    result = row(what, *await microseconds(ours, plain))
    assert replicas.spilled_count - before < ROUND_OPERATIONS, "the replica was to answer"
    return result


async def connections_row(running: Replicated, shards: Shards) -> dict[str, object]:
    await tell(shards, reads=READS_OF_CALLERS, clients=CALLERS, reads_per_write=(5,))
    count = sum([int(await running.run(index, CONNECTIONS)) for index in (0, 1)])
    return {
        "what": "connections",
        "unit": "per process and shard",
        "ours": count,
        "peer": None,
        "ratio": None,
        "better": "lower",
    }


async def main(rows_large: int) -> None:
    async with running_server() as server:
        [plain_dsn] = await server.make_databases(1)
        async with (
            asyncpg.create_pool(plain_dsn, min_size=1, max_size=4) as pool,
            asyncpg.create_pool(plain_dsn, min_size=1, max_size=4, reset=reset_nothing) as bare,
            serving(server, 1) as (_, shards),
        ):
            await pool.execute(TABLE)
            rows = [
                await write_row("write", shards, pool),
                await read_row("read", shards, pool),
                await write_row("write, bare", shards, bare),
                await read_row("read, bare", shards, bare),
            ]
        rows += [await growth_of_rows(server, rows_large), await growth_of_shards(server)]
    rows += await rows_of_replicas()
    for entry in rows:
        beside = f", plain {entry['peer']}" if entry["peer"] else ""
        ratio = f", x {entry['ratio']}" if entry["ratio"] else ""
        print(f"{entry['what']}: {entry['ours']} {entry['unit']}{beside}{ratio}")
    print(json.dumps({"bench": "shards", "engine": "asyncpg", "rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=ROWS_LARGE, help="of the largest table")
    asyncio.run(main(parser.parse_args().rows))
