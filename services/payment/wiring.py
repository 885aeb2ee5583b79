"""The only place that chooses implementations for payment."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from tenfold.ledger.v1.ledger_service_pb2_grpc import add_LedgerServiceServicer_to_server

from services.payment.config import PaymentConfig
from services.payment.handler import LedgerHandler
from services.payment.lane import open_lanes
from services.payment.store import SqlLedgerStore
from shared.bus.outbox import run_relay
from shared.config import load
from shared.db.engines import ShardSettings, open_shards
from shared.db.housekeeping import run_housekeeping
from shared.lifecycle import Registration, Service
from shared.runtime import Runtime

NAME = "payment"
MIGRATIONS = Path(__file__).parent / "migrations"


def shard_settings(folder: Path, environ: Mapping[str, str]) -> ShardSettings:
    """What its shards are made of; SQLite keeps them in the service's folder.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
    """
    config = load(PaymentConfig, "TENFOLD_PAYMENT_", environ)
    return ShardSettings(
        NAME,
        config.database,
        folder / "shards",
        MIGRATIONS,
        shard_count=config.shard_count,
        owned_by_first=True,
        synchronous="FULL",  # an acknowledged transfer survives a power cut
    )


@asynccontextmanager
async def open_service(runtime: Runtime) -> AsyncIterator[Service]:
    """Open payment's shards and give what is to be served.

    Raises:
        DatabaseRefused: its data cannot be served; the sentence says why.
        ConfigError: a TENFOLD_PAYMENT_… variable is wrong.
    """
    config = load(PaymentConfig, "TENFOLD_PAYMENT_", runtime.environ)
    settings = shard_settings(runtime.folder_of(NAME), runtime.environ)
    async with (
        open_shards(settings, secret=runtime.secret, clock=runtime.clock) as shards,
        open_lanes(shards, runtime.clock) as lanes,
    ):
        store = SqlLedgerStore(shards, lanes, secret=runtime.secret)
        await store.verify(entries_max=config.verify_entries_max)
        handler = LedgerHandler(store, page_secret=runtime.secret, clock=runtime.clock)
        yield Service(
            name=NAME,
            registrations=[Registration(add_LedgerServiceServicer_to_server, handler)],
            loops=[
                partial(run_relay, shards, runtime.bus, service=NAME, clock=runtime.clock),
                partial(run_housekeeping, shards, clock=runtime.clock),
            ],
        )
