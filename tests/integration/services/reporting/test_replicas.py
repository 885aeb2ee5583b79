"""A service whose lists a replica answers: over gRPC, with the token that its answers bring."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from tenfold.reporting.v1.reporting_service_pb2 import (
    GetReportRunRequest,
    ListReportRunsRequest,
    RunReportRequest,
)

from services.reporting.wiring import MIGRATIONS
from shared.causal import KEY
from shared.clock import SystemClock
from shared.db.port import Shards
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_replicas import LagGuard, Replicas
from shared.db.postgres_shards import parse_servers
from tests.integration.services.reporting.conftest import SECRET, Client, person
from tests.replicated import running_replicated

LAG_MS = 400
READS_AFTER_A_WRITE = 40


@pytest.fixture
async def shards() -> AsyncIterator[Shards]:
    """In place of the engines' own: one shard whose replica lags."""
    async with running_replicated(LAG_MS) as running:
        opened = open_postgres_shards(
            parse_servers(running.dsn, service="reporting"),
            migrations=MIGRATIONS,
            service="reporting",
            secret=SECRET,
            clock=SystemClock(),
            lag_guard=LagGuard(),
        )
        async with opened as shards:
            yield shards


def replicas_of(shards: Shards) -> Replicas:
    return shards.all()[0].replicas


async def test_who_sends_its_token_along_never_misses_its_report(client: Client, shards):
    asker = person()
    today = datetime.now(UTC).date().isoformat()
    token, names = "", []
    async with asyncio.timeout(60):
        while replicas_of(shards).answered_count < 3 * READS_AFTER_A_WRITE:
            token, name = await run_report(client, asker, today, token, len(names))
            names.append(name)
            metadata = (*client.identity(asker), (KEY, token))
            for _ in range(READS_AFTER_A_WRITE):
                got = GetReportRunRequest(name=name)
                await client.reports.GetReportRun(got, metadata=metadata, timeout=5)
                listing = ListReportRunsRequest(page_size=1000)
                listed = await client.reports.ListReportRuns(listing, metadata=metadata, timeout=5)
                assert {run.name for run in listed.report_runs} == set(names)
                await asyncio.sleep(0.01)  # so that some reads come after the lag
    assert replicas_of(shards).spilled_count


async def run_report(client: Client, asker, day: str, token: str, number: int) -> tuple[str, str]:
    """A new report; the token that its answer brings, and its name."""
    request = RunReportRequest(first_day=day, last_day=day, request_id=f"report-{number}")
    sent = (*client.identity(asker), *([(KEY, token)] if token else []))
    calling = client.reports.RunReport(request, metadata=sent, timeout=5)
    name = (await calling).name
    return dict(await calling.trailing_metadata())[KEY], name
