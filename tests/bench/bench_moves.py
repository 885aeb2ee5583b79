"""A bucket of 100,000 rows goes from shard to shard and back while it and others are written.

Two Postgres servers that flush every commit are the two shards; the mover is a process of its
own, as `tenfold shards move` is. Writers do not wait for each other: a write begins when its time
has come, and its latency counts from there.

  pause    the longest time without an acknowledged write of the moving bucket, once for each
           move, from its beginning to its end. The peer stops the writers for a plain COPY of
           the same rows from one server to the other.
  others   writes to other buckets of both shards while a bucket moves; the peer is the same
           writers in the seconds before each move.
  lost     acknowledged writes of the moving bucket that its rows do not show; must be 0.

  make bench-moves                    20 moves, about ten minutes
  make bench-moves ARGS=--quick       3 moves of 10,000 rows, to see that it works

Histograms go to standard error; the last line of standard output is one JSON object.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from uuid import UUID

import asyncpg

from deploy.local import postgres
from deploy.local.address import free_addresses
from deploy.local.supervisor import open_supervisor
from shared.clock import SystemClock
from shared.db.ids import BUCKET_COUNT, new_id
from shared.db.move.mover import Progress, Tools
from shared.db.move.place import move_bucket
from shared.db.move.postgres_place import PostgresPlace
from shared.db.port import Shards
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_shards import parse_servers
from shared.errors import TenfoldError
from tests.bench.sides.children import module
from tests.bench.sides.looks import Row, print_rows, tell
from tests.databases import PostgresServer

MIGRATIONS = Path(__file__).parents[1] / "integration/shared/db/move/migrations"
SECRET = b"a secret of thirty-two bytes...!"
SERVICE = "counters"
BUCKET = 5
OTHERS = 256
MOVING_PER_S, OTHERS_PER_S = 100, 100
IN_FLIGHT_MAX = 1024
PAUSE_MS_MAX, OTHERS_RATIO_MAX = 250, 1.5
EDGES_MS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 500, 1000)

# Ids as shared/db/ids.py makes them: version 7, the bucket in rand_a, the number in the tail.
FILL = """
SET session_replication_role = replica;
INSERT INTO counter (bucket, id, tenant, owner, value, place)
SELECT {bucket}, id, 'default', id, 0, number FROM (
    SELECT number, ('01900000-0000-7' || lpad(to_hex({bucket}), 3, '0') || '-8000-'
        || lpad(to_hex(number), 12, '0'))::uuid AS id
    FROM generate_series(1, {rows}) AS number) AS made;
INSERT INTO note (bucket, id, tenant, owner, counter_id, body)
SELECT bucket, id, tenant, owner, id, repeat('x', 100) FROM counter WHERE bucket = {bucket};
ANALYZE counter; ANALYZE note;
"""
ADD_ONE = (
    "UPDATE counter SET value = value + 1 WHERE bucket = $1 AND id = $2 AND tenant = 'default'"
)
SAY = "UPDATE note SET body = $3 WHERE bucket = $1 AND id = $2 AND tenant = 'default'"
COPIED = ("counter", "note")


@dataclass(frozen=True)
class Effort:
    """How long it takes.

    Attributes:
        rows: of the moving bucket, in two tables.
        quiet_s: of writing before each move.
    """

    moves: int
    rows: int
    quiet_s: float


@dataclass(frozen=True)
class Write:
    """One that was acknowledged; moments on time.monotonic()."""

    is_moving: bool
    due_s: float
    done_s: float

    @property
    def took_ms(self) -> float:
        """From when it was due."""
        return (self.done_s - self.due_s) * 1000


@dataclass(frozen=True)
class Span:
    """A stretch of time, and what the mover said of it, if it moved."""

    begun_s: float
    ended_s: float
    steps: dict[str, float] = field(default_factory=dict)

    def holds(self, moment_s: float) -> bool:
        """Whether it lies within."""
        return self.begun_s <= moment_s < self.ended_s


@dataclass
class Writers:
    """Write until cancelled.

    Attributes:
        counters: bucket -> its rows that are written.
        failed: writes that were not acknowledged.
    """

    shards: Shards
    counters: dict[int, Sequence[UUID]]
    writes: list[Write] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    in_flight: int = 0

    async def run(self, buckets: Sequence[int], per_s: float) -> None:
        """Begin a write whenever its time has come, whatever became of those before."""
        begun_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number in itertools.count():
                due_s = begun_s + number / per_s
                await asyncio.sleep(due_s - time.monotonic())
                assert self.in_flight < IN_FLIGHT_MAX, "the writers cannot keep up"
                self.in_flight += 1
                tasks.create_task(self._write(random.choice(buckets), due_s))

    async def _write(self, bucket: int, due_s: float) -> None:
        counter_id = random.choice(self.counters[bucket])
        try:
            async with self.shards.bucket(bucket).transaction() as tx:
                assert await tx.execute(ADD_ONE, bucket, counter_id) == 1
                assert await tx.execute(SAY, bucket, counter_id, f"{due_s}") == 1
        except TenfoldError as error:
            self.failed.append(f"{time.monotonic():.3f} bucket {bucket}: {error}")
        else:
            self.writes.append(Write(bucket == BUCKET, due_s, time.monotonic()))
        finally:
            self.in_flight -= 1


@asynccontextmanager
async def running_servers(count: int) -> AsyncIterator[list[PostgresServer]]:
    folder = Path(tempfile.mkdtemp(prefix="tenfold-bench-"))
    os.chmod(folder, 0o711)  # Postgres runs as another user
    try:
        async with open_supervisor(logs=folder, say=tell) as supervisor:
            servers = []
            for index, address in enumerate(free_addresses(count)):
                site = postgres.open_site(folder / f"shard-{index}", os.environ)
                postgres.make_primary(site)
                name = f"shard-{index}"
                await supervisor.start(postgres.postgres_program(site, address, name=name))
                servers.append(PostgresServer(site, address))
            yield servers
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def serving(servers: Sequence[PostgresServer]) -> AsyncIterator[tuple[Shards, str]]:
    """The shards, and how the operator names them."""
    dsns = [(await server.make_databases(1))[0] for server in servers]
    names = [dsn.rpartition("/")[2] for dsn in dsns]
    opened = open_postgres_shards(
        parse_servers(",".join(dsns), service=SERVICE),
        migrations=MIGRATIONS,
        secret=SECRET,
        clock=SystemClock(),
        service=SERVICE,
    )
    operator = [
        server.site.admin_dsn(server.address, name)
        for server, name in zip(servers, names, strict=True)
    ]
    async with opened as shards:
        yield shards, ",".join(operator)


async def fill(shards: Shards, operator: str, rows: int) -> dict[int, Sequence[UUID]]:
    """Rows of every bucket that is written; by bucket."""
    raw = await asyncpg.connect(operator.split(",", maxsplit=1)[0])
    try:
        await raw.execute(FILL.format(bucket=BUCKET, rows=rows // len(COPIED)), timeout=600)
        ids = await raw.fetch("SELECT id FROM counter WHERE bucket = $1", BUCKET)
    finally:
        await raw.close()
    counters: dict[int, Sequence[UUID]] = {BUCKET: [UUID(bytes=row["id"].bytes) for row in ids]}
    for bucket in range(8, BUCKET_COUNT, BUCKET_COUNT // OTHERS):
        key = new_id(bucket)
        counters[bucket] = [key]
        async with shards.bucket(bucket).transaction() as tx:
            await tx.execute(
                "INSERT INTO counter (bucket, id, tenant, owner, value, place) "
                "VALUES ($1, $2, 'default', $2, 0, 0)",
                *(bucket, key),
            )
            await tx.execute(
                "INSERT INTO note (bucket, id, tenant, owner, counter_id, body) "
                "VALUES ($1, $2, 'default', $2, $2, '')",
                *(bucket, key),
            )
    return counters


async def plain_copy_ms(operator: str, bucket: int) -> float:
    """How long writers must be kept out while plain COPY carries the bucket over."""
    source, destination = [await asyncpg.connect(dsn) for dsn in operator.split(",")]
    try:
        owner, other = source, destination
        if not await source.fetchval("SELECT 1 FROM counter WHERE bucket = $1 LIMIT 1", bucket):
            owner, other = destination, source
        for table in COPIED:
            await other.execute(f"CREATE TABLE plain_{table} (LIKE {table} INCLUDING ALL)")
        begun_s = time.monotonic()
        for table in COPIED:
            rows = BytesIO()
            sql = f"SELECT * FROM {table} WHERE bucket = {bucket}"
            await owner.copy_from_query(sql, output=rows)
            rows.seek(0)
            await other.copy_to_table(f"plain_{table}", source=rows)
        took_s = time.monotonic() - begun_s
        for table in COPIED:
            await other.execute(f"DROP TABLE plain_{table}")
    finally:
        await source.close()
        await destination.close()
    return took_s * 1000


# The mover's process ---------------------------------------------------------------------


async def run_mover(operator: str) -> None:
    """Move the bucket wherever a line says; answer with when each step was done."""
    place = PostgresPlace(parse_servers(operator, service=SERVICE))
    print("ready", flush=True)
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        steps: dict[str, float] = {}

        def visit(name: str, steps: dict[str, float] = steps) -> None:
            steps[name] = time.monotonic()

        def report(progress: Progress) -> None:
            del progress

        begun_s = time.monotonic()
        await move_bucket(place, BUCKET, int(line), Tools(visit=visit, report=report))
        answer = {"begun_s": begun_s, "ended_s": time.monotonic(), "steps": steps}
        print(json.dumps(answer), flush=True)


@dataclass
class Mover:
    """The process, from here."""

    process: asyncio.subprocess.Process

    async def read(self) -> str:
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode().strip()
        assert line, "the mover has ended"
        return line

    async def move(self, dst: int) -> Span:
        """Returns when the source's rows are deleted, too."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{dst}\n".encode())
        await self.process.stdin.drain()
        return Span(**json.loads(await self.read()))


@asynccontextmanager
async def running_mover(operator: str) -> AsyncIterator[Mover]:
    pipe = asyncio.subprocess.PIPE
    command = module("tests.bench.bench_moves", "--mover", operator)
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        mover = Mover(process)
        assert await mover.read() == "ready"
        yield mover
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


# What is told ----------------------------------------------------------------------------


def at_most(values: Sequence[float], share: float) -> float:
    """What this share of them does not exceed, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def histogram(what: str, values_ms: Sequence[float]) -> None:
    p50, p99 = at_most(values_ms, 0.5), at_most(values_ms, 0.99)
    tell(
        f"\n{what}: {len(values_ms)}, p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {max(values_ms):.1f}"
    )
    low = 0.0
    for high in (*EDGES_MS, float("inf")):
        count = sum(low <= value < high for value in values_ms)
        if count:
            bar = "#" * max(1, round(60 * count / len(values_ms)))
            tell(f"  {low:>6.0f} to {high:>4.0f} ms {count:>7}  {bar}")
        low = high


def pause_ms(writes: Sequence[Write], span: Span) -> float:
    """The longest time without an acknowledged write."""
    moments = sorted(write.done_s for write in writes if span.holds(write.done_s))
    return max(b - a for a, b in itertools.pairwise(moments)) * 1000


def tell_steps(span: Span, paused_ms: float) -> None:
    steps = span.steps
    fenced = [name for name in steps if steps["precheck"] <= steps[name] <= steps["dst_active"]]
    parts = [
        f"{name} {(steps[name] - steps[before]) * 1000:.0f}"
        for before, name in itertools.pairwise(sorted(fenced, key=lambda name: steps[name]))
    ]
    copy_s, verify_s = steps["copied"] - steps["capture2"], steps["verify"] - steps["copied"]
    tell(
        f"pause {paused_ms:.0f} ms ({', '.join(parts)}); copy {copy_s:.1f} s, "
        f"verify {verify_s:.1f} s, all {span.ended_s - span.begun_s:.1f} s"
    )


def row(what: str, unit: str, ours: float, peer: float | None, bound: float) -> Row:
    """A line with the promise beside it."""
    ratio = None if peer is None else round(ours / peer, 3)
    rounded = None if peer is None else round(peer, 2)
    figures = {"ours": round(ours, 2), "peer": rounded, "ratio": ratio, "better": "lower"}
    return {"what": what, "unit": unit, **figures, "bound": bound}


async def lost_count(operator: str, writers: Writers) -> float:
    acknowledged = sum(write.is_moving for write in writers.writes)
    total = 0
    for dsn in operator.split(","):
        raw = await asyncpg.connect(dsn)
        sql = "SELECT coalesce(sum(value), 0)::bigint FROM counter WHERE bucket = $1"
        total += await raw.fetchval(sql, BUCKET)
        await raw.close()
    return max(acknowledged - total, 0)


async def measure(effort: Effort) -> list[Row]:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(running_servers(2))
        shards, operator = await stack.enter_async_context(serving(servers))
        counters = await fill(shards, operator, effort.rows)
        mover = await stack.enter_async_context(running_mover(operator))
        writers = Writers(shards, counters)
        others = [bucket for bucket in counters if bucket != BUCKET]
        quiet, moves = [], []
        async with asyncio.TaskGroup() as tasks:
            writing = [
                tasks.create_task(writers.run([BUCKET], MOVING_PER_S)),
                tasks.create_task(writers.run(others, OTHERS_PER_S)),
            ]
            await asyncio.sleep(effort.quiet_s)
            for number in range(effort.moves):
                begun_s = time.monotonic()
                await asyncio.sleep(effort.quiet_s)
                quiet.append(Span(begun_s, time.monotonic()))
                moves.append(await mover.move(1 - number % 2))
                moving = [write for write in writers.writes if write.is_moving]
                tell_steps(moves[-1], pause_ms(moving, moves[-1]))
            for task in writing:
                task.cancel()
        copies_ms = [await plain_copy_ms(operator, BUCKET) for _ in range(3)]
        lost = await lost_count(operator, writers)
    return told(writers, quiet, moves, copies_ms, lost)


def told(
    writers: Writers,
    quiet: Sequence[Span],
    moves: Sequence[Span],
    copies_ms: Sequence[float],
    lost: float,
) -> list[Row]:
    """The rows, and the histograms behind them."""
    moving = [write for write in writers.writes if write.is_moving]
    pauses_ms = [pause_ms(moving, span) for span in moves]

    def latencies(spans: Sequence[Span], *, is_moving: bool) -> list[float]:
        return [
            write.took_ms
            for write in writers.writes
            if write.is_moving is is_moving and any(span.holds(write.due_s) for span in spans)
        ]

    during, before = latencies(moves, is_moving=False), latencies(quiet, is_moving=False)
    histogram("pauses of the moving bucket, one for each move", pauses_ms)
    histogram("writes of the moving bucket, moves", latencies(moves, is_moving=True))
    histogram("writes of the moving bucket, no move", latencies(quiet, is_moving=True))
    histogram("writes of other buckets, moves", during)
    histogram("writes of other buckets, no move", before)
    for line in writers.failed[:20]:
        tell(f"failed: {line}")
    copy_ms = min(copies_ms)
    rows = [
        row("pause p50", "ms", at_most(pauses_ms, 0.5), copy_ms, PAUSE_MS_MAX),
        row("pause p99", "ms", at_most(pauses_ms, 0.99), copy_ms, PAUSE_MS_MAX),
    ]
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        ours, peer = at_most(during, share), at_most(before, share)
        rows.append(row(f"others {name}", "ms", ours, peer, OTHERS_RATIO_MAX))
    rows.append(row("failed", "writes", len(writers.failed), None, 0))
    rows.append(row("lost", "writes", lost, None, 0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="rough figures in half a minute")
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--rows", type=int, default=100_000, help="of the moving bucket")
    parser.add_argument("--mover", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mover:
        asyncio.run(run_mover(arguments.mover))
        return
    effort = Effort(arguments.moves, arguments.rows, 8.0)
    rows = asyncio.run(measure(Effort(3, 10_000, 3.0) if arguments.quick else effort))
    print_rows("moves", "postgres", rows)


if __name__ == "__main__":
    main()
