"""A tiny emitter and a tiny consumer: what the tests of the bus move about."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

from tenfold.ledger.v1.ledger_events_pb2 import AccountOpened, TransactionPosted

from shared.bus.worker import Event, Subscription
from shared.clock import Clock
from shared.db.ids import new_id
from shared.db.port import OutboxRow, Shards, Transaction
from shared.db.sqlite import open_sqlite_shards

SECRET = b"a secret of thirty-two bytes....."
MIGRATIONS = Path(__file__).parent / "migrations"
OWNER = UUID("01890000-0000-7000-8000-000000000001")


@asynccontextmanager
async def open_shards(
    folder: Path, service: str, clock: Clock, *, shard_count: int = 2
) -> AsyncIterator[Shards]:
    async with open_sqlite_shards(
        folder / service,
        migrations=MIGRATIONS,
        shard_count=shard_count,
        secret=SECRET,
        clock=clock,
        service=service,
    ) as shards:
        yield shards


def posted(aggregate: str, reference: str) -> OutboxRow:
    message = TransactionPosted(transaction=aggregate, reference=reference)
    return OutboxRow(
        "tenfold.ledger.v1.TransactionPosted", aggregate, message.SerializeToString(), "default"
    )


async def emit(shards: Shards, bucket: int, *rows: OutboxRow) -> None:
    async with shards.bucket(bucket).transaction() as tx:
        for row in rows:
            await tx.append_outbox(row)


async def record(tx: Transaction, event: Event) -> None:
    reference = event.parse(TransactionPosted).reference
    if reference.startswith("poison"):
        raise ValueError("cannot be applied")
    at = await tx.fetch_one("SELECT count(*) AS count FROM applied WHERE tenant = $1", event.tenant)
    assert at is not None
    await tx.execute(
        "INSERT INTO applied"
        " (bucket, id, tenant, owner, version, aggregate, event_no, reference, at)"
        " VALUES ($1, $2, $3, $4, 1, $5, $6, $7, $8)",
        *(event.bucket, new_id(event.bucket), event.tenant, OWNER),
        *(event.aggregate, event.event_no, reference, at["count"]),
    )


def recording(**changes) -> Subscription:
    settings = {"ack_wait_s": 2.0} | changes
    return Subscription("reporting", "test", (TransactionPosted, AccountOpened), record, **settings)


async def applied(shards: Shards) -> list[str]:
    """The references that were applied, with repetition."""
    rows = [
        row["reference"]
        for shard in shards.all()
        for row in await shard.fetch_all(
            "SELECT reference FROM applied WHERE tenant = $1", "default"
        )
    ]
    return sorted(rows)


async def order_of(shards: Shards, bucket: int, aggregate: str) -> list[int]:
    """The event numbers of one aggregate in the order in which they were applied."""
    rows = await shards.bucket(bucket).fetch_all(
        "SELECT event_no FROM applied WHERE tenant = $1 AND aggregate = $2 ORDER BY at, id",
        "default",
        aggregate,
    )
    return [row["event_no"] for row in rows]


async def unsent(shards: Shards) -> int:
    counts = [
        await shard.fetch_one("SELECT count(*) AS count FROM outbox WHERE sent = 0")
        for shard in shards.all()
    ]
    return sum(row["count"] for row in counts if row)


async def dead_letters(shards: Shards) -> list[tuple[str, int]]:
    return [
        (row["error"], row["tries"])
        for shard in shards.all()
        for row in await shard.fetch_all("SELECT error, tries FROM dead_letter")
    ]
