"""Sums, watermarks and report runs, and their SQL."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.reporting.domain import (
    Addition,
    DailySum,
    DayInterval,
    ReportRun,
    ReportRunNotFound,
    Scope,
    SumOverflowError,
    Sums,
    Watermark,
    sums_of_parts,
)
from shared.clock import of_us, to_us
from shared.db.port import Once, Row, Shards, Transaction
from shared.db.scatter import Gathered, scatter

EVERYBODY = UUID(int=0)
"""The owner under which a whole tenant's watermark is kept."""

HALF = 1_000_000_000
"""Sums are added up in two halves: a SUM of bigints may leave bigint."""

PARKED_ROWS_MAX = 1000

# A sum that would leave int64 changes no row.
ADD = """
INSERT INTO daily_sum (bucket, tenant, owner, day, metric, currency_code, value)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (bucket, tenant, owner, day, metric, currency_code) DO UPDATE
SET value = daily_sum.value + excluded.value
WHERE daily_sum.value <= 9223372036854775807 - excluded.value
"""

ADVANCE_WATERMARK = """
INSERT INTO watermark (bucket, tenant, owner, source, event_time_us, event_count)
VALUES ($1, $2, $3, $4, $5, 1)
ON CONFLICT (bucket, tenant, owner, source) DO UPDATE SET
  event_count = watermark.event_count + 1,
  event_time_us = CASE WHEN excluded.event_time_us > watermark.event_time_us
    THEN excluded.event_time_us ELSE watermark.event_time_us END
"""

_PARTS = f"""
SELECT day, metric, currency_code, SUM(value / {HALF}) AS high, SUM(value % {HALF}) AS low
FROM daily_sum
WHERE tenant = $1 AND day >= $2 AND day <= $3 AND tenfold_owned(daily_sum.bucket)
"""  # noqa: S608 -- a constant of ours
_GROUPED = " GROUP BY day, metric, currency_code"
SELECT_TENANT_PARTS = f"{_PARTS}{_GROUPED}"
SELECT_OWNER_PARTS = f"{_PARTS} AND owner = $4{_GROUPED}"

SELECT_WATERMARK = """
SELECT MAX(event_time_us) AS event_time_us, SUM(event_count) AS event_count
FROM watermark WHERE tenant = $1 AND owner = $2 AND tenfold_owned(watermark.bucket)
"""

SELECT_PARKED = f"""
SELECT headers FROM dead_letter
WHERE consumer LIKE 'reporting-%' AND tenfold_owned(dead_letter.bucket)
LIMIT {PARKED_ROWS_MAX}
"""  # noqa: S608

INSERT_RUN = """
INSERT INTO report_run (bucket, id, tenant, owner, version, owner_name, whole_tenant, first_day,
  last_day, sums, event_time_us, event_count, degraded, created_us)
VALUES ($1, $2, $3, $4, 1, $5, $6, $7, $8, $9, $10, $11, $12, $13)
"""

_RUN = """
SELECT id, tenant, owner, owner_name, whole_tenant, first_day, last_day, sums, event_time_us,
  event_count, degraded, created_us
FROM report_run WHERE bucket = $1 AND tenant = $2
"""
SELECT_TENANT_RUN = f"{_RUN} AND id = $3"
SELECT_OWN_RUN = f"{_RUN} AND id = $3 AND owner = $4"
LIST_RUNS = f"{_RUN} AND owner = $3 AND id < $4 ORDER BY id DESC LIMIT $5"


class ReportStore(Protocol):
    """Where sums and report runs are kept."""

    async def sums(self, scope: Scope, interval: DayInterval) -> Sums:
        """Every bucket's parts, added up; nothing on a day without events."""
        ...

    async def watermark(self, scope: Scope) -> Watermark:
        """How far the events are counted. Read it before the sums: they then hold no less."""
        ...

    async def insert_run(self, run: ReportRun, *, once: Once) -> ReportRun:
        """Keep a report; under a request id that was used before, the report of then."""
        ...

    async def get_run(self, scope: Scope, run_id: UUID) -> ReportRun:
        """One report.

        Raises:
            ReportRunNotFound: there is none for this scope.
        """
        ...

    async def list_runs(
        self, tenant: str, owner: UUID, *, before: UUID, limit: int
    ) -> Sequence[ReportRun]:
        """An owner's reports with ids below `before`, newest first."""
        ...


async def add(
    tx: Transaction,
    additions: Sequence[Addition],
    *,
    tenant: str,
    source: str,
    event_time: datetime,
) -> None:
    """Count one event, in the bucket of the transaction.

    Raises:
        SumOverflowError: a sum would leave int64; the transaction must roll back.
    """
    for addition in additions:
        key = (addition.owner, addition.day.isoformat(), addition.metric, addition.currency_code)
        if not await tx.execute(ADD, tx.bucket, tenant, *key, addition.value):
            raise SumOverflowError(f"{addition.metric} of {addition.day} would leave int64")
    for owner in sorted({EVERYBODY, *(addition.owner for addition in additions)}):
        await tx.execute(ADVANCE_WATERMARK, tx.bucket, tenant, owner, source, to_us(event_time))


class SqlReportStore:
    """See ReportStore."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    async def sums(self, scope: Scope, interval: DayInterval) -> Sums:
        """See ReportStore.sums."""
        days = (interval.first.isoformat(), interval.last.isoformat())
        if scope.owner is None:
            gathered = await self._gather(SELECT_TENANT_PARTS, scope.tenant, *days)
        else:
            gathered = await self._gather(SELECT_OWNER_PARTS, scope.tenant, *days, scope.owner)
        return sums_of_parts(part_of_row(row) for row in gathered.rows)

    async def watermark(self, scope: Scope) -> Watermark:
        """See ReportStore.watermark."""
        owner = EVERYBODY if scope.owner is None else scope.owner
        gathered = await self._gather(SELECT_WATERMARK, scope.tenant, owner)
        reached = [row for row in gathered.rows if row["event_time_us"] is not None]
        newest_us = max((int(row["event_time_us"]) for row in reached), default=None)
        return Watermark(
            event_time=None if newest_us is None else of_us(newest_us),
            event_count=sum(int(row["event_count"]) for row in reached),
            degraded=await self._is_degraded(scope.tenant),
        )

    async def _gather(self, sql: str, *arguments: object) -> Gathered:
        return await scatter(self._shards, sql, *arguments, is_causal=True)

    async def _is_degraded(self, tenant: str) -> bool:
        """Whether an event of the tenant was parked. Nothing parked is the usual case."""
        gathered = await self._gather(SELECT_PARKED)
        return any(
            json.loads(row["headers"]).get("tenfold-tenant", tenant) == tenant
            for row in gathered.rows
        )

    async def insert_run(self, run: ReportRun, *, once: Once) -> ReportRun:
        """See ReportStore.insert_run."""
        async with self._shards.holding(run.id).transaction(once) as tx:
            if tx.answered:
                row = await tx.fetch_one(
                    SELECT_TENANT_RUN, tx.bucket, run.tenant, UUID(bytes=tx.answer)
                )
                assert row is not None, "a report is never deleted while its key is known"
                return run_of_row(row)
            await tx.execute(INSERT_RUN, tx.bucket, *row_of_run(run))
            await tx.answer_with(run.id.bytes)
        return run

    async def get_run(self, scope: Scope, run_id: UUID) -> ReportRun:
        """See ReportStore.get_run."""
        bucket = self._shards.holding(run_id)
        key = (bucket.number, scope.tenant, run_id)
        if scope.owner is None:
            row = await bucket.causal.fetch_one(SELECT_TENANT_RUN, *key)
        else:
            row = await bucket.causal.fetch_one(SELECT_OWN_RUN, *key, scope.owner)
        if row is None:
            raise ReportRunNotFound(f"reportRuns/{run_id}")
        return run_of_row(row)

    async def list_runs(
        self, tenant: str, owner: UUID, *, before: UUID, limit: int
    ) -> Sequence[ReportRun]:
        """See ReportStore.list_runs."""
        bucket = self._shards.holding(owner)
        rows = await bucket.causal.fetch_all(LIST_RUNS, bucket.number, tenant, owner, before, limit)
        return [run_of_row(row) for row in rows]


def part_of_row(row: Row) -> DailySum:
    """One shard's part of a sum."""
    value = int(row["high"]) * HALF + int(row["low"])
    return DailySum(row["day"], row["metric"], row["currency_code"], value)


def row_of_run(run: ReportRun) -> tuple[object, ...]:
    """The columns after bucket, in INSERT_RUN's order."""
    reached = run.watermark.event_time
    sums = [[one.day, one.metric, one.currency_code, one.value] for one in run.sums]
    return (
        *(run.id, run.tenant, run.owner, run.owner_name, int(run.whole_tenant)),
        *(run.first_day, run.last_day, json.dumps(sums)),
        *(None if reached is None else to_us(reached), run.watermark.event_count),
        *(int(run.watermark.degraded), to_us(run.create_time)),
    )


def run_of_row(row: Row) -> ReportRun:
    """What row_of_run stored."""
    reached_us = row["event_time_us"]
    return ReportRun(
        id=row["id"],
        tenant=row["tenant"],
        owner=row["owner"],
        owner_name=row["owner_name"],
        whole_tenant=bool(row["whole_tenant"]),
        first_day=row["first_day"],
        last_day=row["last_day"],
        sums=[DailySum(*one) for one in json.loads(row["sums"])],
        watermark=Watermark(
            event_time=None if reached_us is None else of_us(reached_us),
            event_count=row["event_count"],
            degraded=bool(row["degraded"]),
        ),
        create_time=of_us(row["created_us"]),
    )
