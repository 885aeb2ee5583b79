"""The only place that chooses implementations."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from tenfold.reporting.v1.reporting_service_pb2_grpc import (
    add_MetricServiceServicer_to_server,
    add_ReportServiceServicer_to_server,
)

from services.reporting.config import ReportingConfig
from services.reporting.handler import ReportingHandler
from services.reporting.listener import NAME, subscription
from services.reporting.store import SqlReportStore
from shared.bus.outbox import run_relay
from shared.bus.worker import run_subscription
from shared.config import load
from shared.db.engines import ShardSettings, open_shards
from shared.db.housekeeping import run_housekeeping
from shared.lifecycle import Registration, Service
from shared.runtime import Runtime

PREFIX = "TENFOLD_REPORTING_"
MIGRATIONS = Path(__file__).parent / "migrations"


def shard_settings(folder: Path, environ: Mapping[str, str]) -> ShardSettings:
    """What its shards are made of; SQLite keeps them in the service's folder.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
    """
    config = load(ReportingConfig, PREFIX, environ)
    return ShardSettings(
        NAME,
        config.database,
        folder / "shards",
        MIGRATIONS,
        shard_count=config.shard_count,
        causal_reads=True,
    )


@asynccontextmanager
async def open_service(runtime: Runtime) -> AsyncIterator[Service]:
    """Open the reporting service; closed in reverse.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
    """
    settings = shard_settings(runtime.folder_of(NAME), runtime.environ)
    async with open_shards(settings, secret=runtime.secret, clock=runtime.clock) as shards:
        handler = ReportingHandler(
            SqlReportStore(shards), page_secret=runtime.secret, clock=runtime.clock
        )
        yield Service(
            name=NAME,
            registrations=(
                Registration(add_ReportServiceServicer_to_server, handler),
                Registration(add_MetricServiceServicer_to_server, handler),
            ),
            loops=(
                # It emits nothing yet; the relay also removes inbox rows that are too old.
                partial(run_relay, shards, runtime.bus, service=NAME, clock=runtime.clock),
                partial(run_housekeeping, shards, clock=runtime.clock),
                partial(run_subscription, runtime.bus, shards, subscription(), clock=runtime.clock),
            ),
        )
