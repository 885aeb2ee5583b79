"""The ledger's transfers beside pgbench's TPC-B-like script, in one run on one durable Postgres.

Run: make bench-ledger. The last line is one JSON object. The peer is the wheel's own pgbench,
`-M prepared`, scale 10 (its documentation asks for a scale of the client count or more; with one
branch its transactions would wait for each other), the best of several client counts. Ours are
durable, idempotent, double-entry transfers with their events in the outbox, over 100,000 accounts
with floors: every one adds a transaction, two entries and an event, with the schema's guards and
rules in force. Both sides begin after a checkpoint. When all is measured the books are added up.

"lane uniform", "lane zipf": orders of 2,048 callers through the lane, in process; accounts even,
or by Zipf's law with exponent 1. "batch rpc": BatchPostTransactions of 500 to a server of its own,
four calls at once. "unary rpc cpu": one TransferFunds per call, 64 callers, as transfers per second
of Postgres's CPU. "growth accounts": wall time per transfer with 10^4 and 10^6 accounts, each with
a journal; the ratio is largest ÷ smallest. "lane uniform sqlite" is a figure for the embedded
shape.

The load of the machine is printed with each figure.
"""

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from tenfold.common.v1.money_pb2 import Money
from tenfold.ledger.v1.ledger_pb2 import SIDE_CREDIT, SIDE_DEBIT, Entry
from tenfold.ledger.v1.ledger_service_pb2 import (
    BatchPostResult,
    BatchPostTransactionsRequest,
    NewTransaction,
    TransferFundsRequest,
)
from tenfold.ledger.v1.ledger_service_pb2_grpc import (
    LedgerServiceStub,
    add_LedgerServiceServicer_to_server,
)

from deploy.local import postgres
from deploy.local.address import free_addresses
from deploy.local.processes import PROC
from deploy.local.supervisor import open_supervisor
from services.payment.domain import NewEntry, Owner, OwnerKind, Side
from services.payment.handler import LedgerHandler
from services.payment.lane import Lanes, open_lanes
from services.payment.posting import Order, Result
from services.payment.store import SqlLedgerStore
from services.payment.wiring import MIGRATIONS
from shared.clock import SystemClock
from shared.db.ids import bucket_of, new_id
from shared.db.port import Shards
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_shards import parse_servers
from shared.db.sqlite import open_sqlite_shards
from shared.identity import IdentitySigner, IdentityVerifier, Principal, PrincipalKind
from shared.lifecycle import Registration
from shared.rpc.client import Channels, Upstreams
from shared.rpc.server import RpcServer
from tests.databases import SECRET, PostgresServer
from tests.engine import CONFIG
from tests.integration.services.payment.conftest import identity_keys

SERVICE = "tenfold.ledger.v1.LedgerService"
ACCOUNTS, CALLERS = 100_000, 2048
SCALE, CLIENTS = 10, (8, 16, 32)
BATCH, BATCHES_AT_ONCE, UNARY_CALLERS = 500, 4, 64
OPENING_UNITS = 1_000_000_000
SCOPES = frozenset({"ledger.read", "ledger.transfer", "ledger.post"})
OPERATOR = Principal(PrincipalKind.ADMIN, str(new_id(9)), "default", SCOPES)
# Accounts without a floor where only their number counts; each has a journal of one entry.
FILL = """
INSERT INTO account (bucket, id, tenant, owner, owner_kind, currency_code, exponent, normal_side,
                     may_overdraw, display_name, state, created_at_us)
SELECT bucket, id, 'default', id, 1, 'EUR', 2, 2, {may_overdraw}, '', 1, 0
FROM unnest($1::smallint[], $2::uuid[]) AS made (bucket, id)
"""
FILL_JOURNAL = """
INSERT INTO entry (bucket, tenant, owner, owner_kind, transaction_bucket, transaction_id,
                   account_id, account_sequence, side, currency_code, minor_units, recorded_at_us,
                   posted_credit, floor_side)
SELECT bucket, 'default', id, 1, bucket, id, id, 1, 2, 'EUR', 1, 0, 1, 0
FROM unnest($1::smallint[], $2::uuid[]) AS made (bucket, id)
"""


@dataclass
class Figure:
    """What one run came to.

    Attributes:
        rate: transfers per second.
        cpu_us, wal_bytes: of Postgres, per transfer; 0 where it has no part.
        latencies_ms: of each call.
    """

    what: str
    count: int
    seconds: float
    cpu_us: float
    wal_bytes: float
    latencies_ms: Sequence[float] = ()

    @property
    def rate(self) -> float:
        return self.count / self.seconds

    def say(self) -> None:
        ranked = sorted(self.latencies_ms)
        tail = ""
        if ranked:
            half, most = ranked[len(ranked) // 2], ranked[int(len(ranked) * 0.99)]
            tail = f", p50 {half:.1f} ms, p99 {most:.1f} ms"
        print(
            f"{self.what}: {self.rate:,.0f} transfers/s, {self.cpu_us:.0f} us of Postgres's CPU "
            f"and {self.wal_bytes:,.0f} bytes of WAL each{tail} (load {os.getloadavg()[0]:.1f})",
            flush=True,
        )


# The server ------------------------------------------------------------------------------


@dataclass
class Bench:
    """A durable Postgres and its processes."""

    server: PostgresServer
    postmaster: int
    seconds: float

    async def measure(
        self, what: str, run: Callable[[], Awaitable[tuple[int, Sequence[float]]]]
    ) -> Figure:
        """Run it after a checkpoint, and see what Postgres did for it."""
        async with self.server.admin() as admin:
            await admin.execute("CHECKPOINT")
            lsn = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::float8"
            wal, cpu_s, started_s = await admin.fetchval(lsn), self.cpu_s(), time.perf_counter()
            count, latencies_ms = await run()
            seconds = time.perf_counter() - started_s
            cpu_us = (self.cpu_s() - cpu_s) / count * 1e6
            wal_bytes = (await admin.fetchval(lsn) - wal) / count
        figure = Figure(what, count, seconds, cpu_us, wal_bytes, latencies_ms)
        figure.say()
        return figure

    def cpu_s(self) -> float:
        """Of the postmaster, of its children that are, and of those that were."""
        ticks = sum(stat_of(self.postmaster)[11:15], 0)
        for path in PROC.glob("[0-9]*"):
            try:
                stat = stat_of(int(path.name))
            except OSError:
                continue
            if stat[1] == self.postmaster:
                ticks += stat[11] + stat[12]
        return ticks / os.sysconf("SC_CLK_TCK")


def stat_of(pid: int) -> list[int]:
    """proc(5)'s fields after the name, from the state on; the state itself reads as 0."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return [0, *map(int, fields[1:22])]


@asynccontextmanager
async def running(seconds: float) -> AsyncIterator[Bench]:
    folder, [address] = Path(tempfile.mkdtemp(prefix="tenfold-bench-")), free_addresses(1)
    os.chmod(folder, 0o711)
    try:
        site = postgres.open_site(folder, os.environ, is_durable=True)
        postgres.make_primary(site)
        async with open_supervisor(logs=folder, say=print) as supervisor:
            await supervisor.start(postgres.postgres_program(site, address))
            pid_file = next(site.folder.rglob("postmaster.pid"))
            postmaster = int(pid_file.read_text().split()[0])
            yield Bench(PostgresServer(site, address), postmaster, seconds)
    finally:
        shutil.rmtree(folder)


async def pgbench(bench: Bench) -> Figure:
    [dsn] = await bench.server.make_databases(1)
    program = str(Path(bench.server.site.programs) / "pgbench")

    async def call(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            dsn,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output
        return output.decode()

    await call("--initialize", "--quiet", "--scale", str(SCALE))
    figures = []
    for clients in CLIENTS:

        async def run(clients: int = clients) -> tuple[int, Sequence[float]]:
            said = await call(
                *("--protocol", "prepared", "--client", str(clients), "--jobs", "2"),
                *("--time", str(int(bench.seconds))),
            )
            [line] = [one for one in said.splitlines() if "actually processed" in one]
            return int(line.rpartition(":")[2].partition("/")[0]), ()

        figures.append(await bench.measure(f"pgbench, {clients} clients", run))
    return max(figures, key=lambda figure: figure.rate)


# Accounts --------------------------------------------------------------------------------


@asynccontextmanager
async def serving(setting: str) -> AsyncIterator[Shards]:
    async with open_postgres_shards(
        parse_servers(setting, service="payment"),
        migrations=MIGRATIONS,
        secret=SECRET,
        clock=SystemClock(),
        service="payment",
    ) as shards:
        yield shards


async def fill(
    bench: Bench, setting: str, count: int, *, may_overdraw: bool, has_journal: bool
) -> list[UUID]:
    made = [new_id(random.randrange(4096)) for _ in range(count)]
    buckets = [bucket_of(one) for one in made]
    async with bench.server.admin(setting.rpartition("/")[2]) as admin:
        await admin.execute("SET session_replication_role = replica")
        for at in range(0, count, 50_000):
            page = buckets[at : at + 50_000], [str(one) for one in made[at : at + 50_000]]
            sql = FILL.format(may_overdraw=may_overdraw)
            await admin.execute(sql, *page, timeout=600)
            if has_journal:
                await admin.execute(FILL_JOURNAL, *page, timeout=600)
        await admin.execute("VACUUM ANALYZE account", timeout=600)
        await admin.execute("VACUUM ANALYZE entry", timeout=600)
    return made


def order(payer: UUID, payee: UUID, units: int = 1) -> Order:
    return Order(
        new_id(bucket_of(payer)),
        "default",
        Owner(OwnerKind.USER, payer),
        (
            NewEntry(payer, Side.DEBIT, "EUR", units, "account", "amount"),
            NewEntry(payee, Side.CREDIT, "EUR", units, "to_account", "amount"),
        ),
        b"sixteen bytes...",
    )


async def fund(lanes: Lanes, cash: UUID, accounts: Sequence[UUID]) -> None:
    """Pay every account its opening balance."""
    for at in range(0, len(accounts), BATCH * 2):
        page = accounts[at : at + BATCH * 2]
        answers = await lanes.submit([order(cash, one, OPENING_UNITS) for one in page])
        assert all(answer.result is Result.OK for answer in answers)


def uniform(accounts: Sequence[UUID]) -> Iterator[tuple[UUID, UUID]]:
    drawn = random.choices(accounts, k=200_000)
    return pairs_of(drawn)


def zipf(accounts: Sequence[UUID]) -> Iterator[tuple[UUID, UUID]]:
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(accounts) + 1)))
    drawn = random.choices(accounts, cum_weights=weights, k=200_000)
    return pairs_of(drawn)


def pairs_of(drawn: Sequence[UUID]) -> Iterator[tuple[UUID, UUID]]:
    pairs = [(a, b) for a, b in itertools.pairwise(drawn) if a != b]
    return itertools.cycle(pairs)


# Ours ------------------------------------------------------------------------------------


async def crowd(
    seconds: float, callers: int, call: Callable[[], Awaitable[int]]
) -> tuple[int, Sequence[float]]:
    """So many callers, one call after the other each; transfers, and how long each call took."""
    gc.collect()
    gc.freeze()  # accounts and drawn pairs are the load's: no collection need look at them
    ends_s, count, latencies_ms = time.perf_counter() + seconds, 0, []

    async def caller() -> None:
        nonlocal count
        while (began_s := time.perf_counter()) < ends_s:
            moved = await call()
            count += moved
            latencies_ms.append((time.perf_counter() - began_s) * 1000)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return count, latencies_ms


def through_lane(
    seconds: float, lanes: Lanes, pairs: Iterator[tuple[UUID, UUID]]
) -> Callable[[], Awaitable[tuple[int, Sequence[float]]]]:
    async def call() -> int:
        [answer] = await lanes.submit([order(*next(pairs))])
        assert answer.result is Result.OK, answer.result
        return 1

    return lambda: crowd(seconds, CALLERS, call)


async def serve(setting: str, public: str) -> None:
    """The server of its own: says its port, ends with its parent's end of the pipe."""
    async with serving(setting) as shards, open_lanes(shards, SystemClock()) as lanes:
        store = SqlLedgerStore(shards, lanes, secret=SECRET)
        handler = LedgerHandler(store, page_secret=SECRET, clock=SystemClock())
        verifier = IdentityVerifier({"edge": bytes.fromhex(public)})
        server = RpcServer(address="127.0.0.1:0", verifier=verifier, config=CONFIG)
        server.add(Registration(add_LedgerServiceServicer_to_server, handler))
        port = await server.start()
        server.set_serving(SERVICE, True)
        print(port, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop(1)


@asynccontextmanager
async def client_of_server(
    setting: str,
) -> AsyncIterator[tuple[LedgerServiceStub, IdentitySigner]]:
    private, public = identity_keys()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.bench_ledger", "--serve", setting, public.hex()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdin is not None
    port = int(await process.stdout.readline())
    channels = Channels(Upstreams.parse(f"*=127.0.0.1:{port}"), None, checks_health=False)
    try:
        yield LedgerServiceStub(channels.channel(SERVICE)), IdentitySigner("edge", private)
    finally:
        await channels.close()
        process.stdin.close()
        await process.wait()


def transaction(payer: UUID, payee: UUID) -> NewTransaction:
    amount = Money(currency_code="EUR", minor_units=1)
    return NewTransaction(
        entries=[
            Entry(account=f"accounts/{payer}", side=SIDE_DEBIT, amount=amount),
            Entry(account=f"accounts/{payee}", side=SIDE_CREDIT, amount=amount),
        ]
    )


async def over_grpc(
    bench: Bench, setting: str, pairs: Iterator[tuple[UUID, UUID]]
) -> tuple[Figure, Figure]:
    async with client_of_server(setting) as (stub, signer):

        async def batch() -> int:
            request = BatchPostTransactionsRequest(
                transactions=[transaction(*next(pairs)) for _ in range(BATCH)],
                request_id=str(new_id(1)),
            )
            headers = (("tenfold-identity", signer.token_for(OPERATOR)),)
            answer = await stub.BatchPostTransactions(request, metadata=headers, timeout=30)
            posted = BatchPostResult.OUTCOME_POSTED
            assert all(one.outcome == posted for one in answer.results)
            return len(answer.results)

        async def unary() -> int:
            payer, payee = next(pairs)
            request = TransferFundsRequest(
                account=f"accounts/{payer}",
                to_account=f"accounts/{payee}",
                amount=Money(currency_code="EUR", minor_units=1),
                request_id=str(new_id(1)),
            )
            principal = Principal(PrincipalKind.USER, str(payer), "default", SCOPES)
            headers = (("tenfold-identity", signer.token_for(principal)),)
            await stub.TransferFunds(request, metadata=headers, timeout=30)
            return 1

        await crowd(1, BATCHES_AT_ONCE, batch)  # every connection has its plans after that
        return (
            await bench.measure("batch rpc", lambda: crowd(bench.seconds, BATCHES_AT_ONCE, batch)),
            await bench.measure("unary rpc", lambda: crowd(bench.seconds, UNARY_CALLERS, unary)),
        )


async def growth(bench: Bench, count: int) -> Figure:
    async with (
        bench.server.shards(1, migrations=MIGRATIONS, service="payment") as setting,
        serving(setting) as shards,
        open_lanes(shards, SystemClock()) as lanes,
    ):
        accounts = await fill(bench, setting, count, may_overdraw=True, has_journal=True)
        run = through_lane(bench.seconds, lanes, uniform(accounts))
        await through_lane(1, lanes, uniform(accounts))()
        return await bench.measure(f"lane, {count:,} accounts", run)


async def on_sqlite(seconds: float) -> Figure:
    folder = Path(tempfile.mkdtemp(prefix="tenfold-bench-"))
    opened = open_sqlite_shards(
        folder,
        migrations=MIGRATIONS,
        shard_count=1,
        synchronous="FULL",
        secret=SECRET,
        clock=SystemClock(),
    )
    try:
        async with opened as shards, open_lanes(shards, SystemClock()) as lanes:
            accounts = [new_id(random.randrange(4096)) for _ in range(ACCOUNTS // 10)]
            async with shards.all()[0].transaction() as tx:
                for one in accounts:
                    await tx.execute(OPEN_ON_SQLITE, bucket_of(one), one)
            started_s = time.perf_counter()
            count, latencies = await through_lane(seconds, lanes, uniform(accounts))()
            figure = Figure(
                "lane uniform sqlite", count, time.perf_counter() - started_s, 0, 0, latencies
            )
            figure.say()
            return figure
    finally:
        shutil.rmtree(folder)


OPEN_ON_SQLITE = """
INSERT INTO account (bucket, id, tenant, owner, owner_kind, currency_code, exponent, normal_side,
                     may_overdraw, display_name, state, created_at_us)
VALUES ($1, $2, 'default', $2, 1, 'EUR', 2, 2, true, '', 1, 0)
"""


def row(what: str, unit: str, ours: float, peer: float | None) -> dict[str, object]:
    return {
        "what": what,
        "unit": unit,
        "ours": round(ours, 1),
        "peer": None if peer is None else round(peer, 1),
        "ratio": None if peer is None else round(ours / peer, 2),
        "better": "higher",
    }


async def main(seconds: float) -> None:
    async with running(seconds) as bench:
        peer = await pgbench(bench)
        async with bench.server.shards(1, migrations=MIGRATIONS, service="payment") as setting:
            async with serving(setting) as shards, open_lanes(shards, SystemClock()) as lanes:
                [cash] = await fill(bench, setting, 1, may_overdraw=True, has_journal=False)
                accounts = await fill(
                    bench, setting, ACCOUNTS, may_overdraw=False, has_journal=False
                )
                await fund(lanes, cash, accounts)
                lane = [
                    await bench.measure(
                        f"lane {name}", through_lane(seconds, lanes, draw(accounts))
                    )
                    for name, draw in (("uniform", uniform), ("zipf", zipf))
                ]
            batch, unary = await over_grpc(bench, setting, uniform(accounts))
            async with serving(setting) as shards, open_lanes(shards, SystemClock()) as lanes:
                store = SqlLedgerStore(shards, lanes, secret=SECRET)
                await store.verify(entries_max=sys.maxsize)
                print("the books add up", flush=True)
        small, large = await growth(bench, 10_000), await growth(bench, 1_000_000)
    embedded = await on_sqlite(seconds)
    rate = "transfers/s"
    rows = [
        *(row(one.what, rate, one.rate, peer.rate) for one in lane),
        row("batch rpc", rate, batch.rate, peer.rate),
        row("unary rpc cpu", "transfers/s of CPU", 1e6 / unary.cpu_us, 1e6 / peer.cpu_us),
        row("lane uniform sqlite", rate, embedded.rate, None),
        {
            "what": "growth accounts",
            "unit": "us",
            "ours": round(1e6 / large.rate, 1),
            "peer": None,
            "ratio": round(small.rate / large.rate, 2),
            "better": "lower",
        },
    ]
    for one in rows:
        print(f"{one['what']}: {one['ours']} {one['unit']}, x {one['ratio']}")
    print(json.dumps({"bench": "ledger", "engine": "asyncpg, grpcio", "rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--serve", nargs=2, metavar=("SETTING", "KEY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asyncio.run(serve(*arguments.serve) if arguments.serve else main(arguments.seconds))
