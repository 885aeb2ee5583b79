"""Comes in by RPC: sums of the caller's days, and reports that are kept."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp
from tenfold.reporting.v1.reporting_pb2 import DailySum as DailySumMessage
from tenfold.reporting.v1.reporting_pb2 import ReportRun as ReportRunMessage
from tenfold.reporting.v1.reporting_pb2 import Watermark as WatermarkMessage
from tenfold.reporting.v1.reporting_service_pb2 import (
    GetReportRunRequest,
    ListReportRunsRequest,
    ListReportRunsResponse,
    QueryDailySumsRequest,
    QueryDailySumsResponse,
    RunReportRequest,
)

from services.reporting.domain import (
    DailySum,
    DayInterval,
    IntervalInvalid,
    NotYetVisible,
    ReportRun,
    Scope,
    Watermark,
    check_min_event_time,
    run_id_of_name,
)
from services.reporting.store import ReportStore
from shared.clock import Clock
from shared.db.ids import bucket_of, new_id
from shared.db.paging import PageScope, open_page_token, page_size_of, seal_page_token
from shared.errors import InvalidRequest
from shared.identity import Principal, PrincipalKind
from shared.rpc.context import Context, once_of

LAST_ID = UUID(int=2**128 - 1)
PAGE_RUNS_MAX = 50
"""A report carries its sums, so a page of reports is kept short."""

SUMS_MAX = 20_000
"""More would not fit an answer; the caller asks for fewer days."""

POLL_MIN_S, POLL_MAX_S = 0.02, 0.25
ANSWER_S = 0.5
"""What is left of the deadline for a last look and the refusal to reach the caller, also where
both are slow."""


class ReportingHandler:
    """Serves ReportService and MetricService: a user sees itself, an operator the tenant."""

    def __init__(self, store: ReportStore, *, page_secret: bytes, clock: Clock) -> None:
        self._store = store
        self._page_secret = page_secret
        self._clock = clock

    async def RunReport(self, request: RunReportRequest, context: Context) -> ReportRunMessage:
        """Add up the days and keep the result."""
        principal = context.principal
        interval, sums, watermark = await self._add_up(request, context)
        run = ReportRun(
            id=new_id(bucket_of(principal.owner)),
            tenant=principal.tenant,
            owner=principal.owner,
            owner_name=owner_name_of(principal),
            whole_tenant=is_operator(principal),
            first_day=interval.first.isoformat(),
            last_day=interval.last.isoformat(),
            sums=sums,
            watermark=watermark,
            create_time=self._clock.now(),
        )
        kept = await self._store.insert_run(run, once=once_of(context, request))
        return run_to_proto(kept)

    async def GetReportRun(
        self, request: GetReportRunRequest, context: Context
    ) -> ReportRunMessage:
        """One report, as it was when it ran."""
        run_id = run_id_of_name(request.name)
        return run_to_proto(await self._store.get_run(scope_of(context.principal), run_id))

    async def ListReportRuns(
        self, request: ListReportRunsRequest, context: Context
    ) -> ListReportRunsResponse:
        """The caller's reports, newest first."""
        principal, scope = context.principal, PageScope.of(context.method, context.principal)
        size = min(page_size_of(request.page_size), PAGE_RUNS_MAX)
        position = open_page_token(self._page_secret, scope, request.page_token)
        before = UUID(str(position[0])) if position else LAST_ID
        runs = await self._store.list_runs(
            principal.tenant, principal.owner, before=before, limit=size + 1
        )
        page = runs[:size]
        has_more = len(runs) > size
        return ListReportRunsResponse(
            report_runs=[run_to_proto(run) for run in page],
            next_page_token=(
                seal_page_token(self._page_secret, scope, page[-1].id) if has_more else ""
            ),
        )

    async def QueryDailySums(
        self, request: QueryDailySumsRequest, context: Context
    ) -> QueryDailySumsResponse:
        """Add up the days and keep nothing."""
        _, sums, watermark = await self._add_up(request, context)
        return QueryDailySumsResponse(
            sums=[sum_to_proto(one) for one in sums], watermark=watermark_to_proto(watermark)
        )

    async def _add_up(
        self, request: RunReportRequest | QueryDailySumsRequest, context: Context
    ) -> tuple[DayInterval, Sequence[DailySum], Watermark]:
        now = self._clock.now()
        interval = DayInterval.parse(
            request.first_day, request.last_day, today=now.astimezone(UTC).date()
        )
        wanted = min_event_time_of(request)
        if wanted is not None:
            check_min_event_time(wanted, now=now)
        scope = scope_of(context.principal)
        watermark = await self._reach(scope, wanted, context)
        added = await self._store.sums(scope, interval)
        if len(added.sums) > SUMS_MAX:
            raise IntervalInvalid.of_field("last_day", "too many sums; ask for fewer days")
        degraded = watermark.degraded or not added.is_complete
        watermark = Watermark(watermark.event_time, watermark.event_count, degraded)
        return interval, added.sums, watermark

    async def _reach(self, scope: Scope, wanted: datetime | None, context: Context) -> Watermark:
        """The watermark once it has reached the time asked for.

        Raises:
            NotYetVisible: it had not when the deadline came near.
        """
        pause_s = POLL_MIN_S
        while True:
            watermark = await self._store.watermark(scope)
            if watermark.has_reached(wanted):
                return watermark
            left_s = context.remaining_s() - ANSWER_S
            if left_s <= 0:
                raise NotYetVisible(watermark)
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 2, POLL_MAX_S)


def is_operator(principal: Principal) -> bool:
    """Whether the whole tenant is shown."""
    return principal.kind is PrincipalKind.ADMIN


def scope_of(principal: Principal) -> Scope:
    """Whose sums the caller sees."""
    return Scope(principal.tenant, None if is_operator(principal) else principal.owner)


def owner_name_of(principal: Principal) -> str:
    """The owner as resources name it."""
    collection = "users" if principal.kind is PrincipalKind.USER else "serviceAccounts"
    return f"{collection}/{principal.owner}"


def min_event_time_of(request: RunReportRequest | QueryDailySumsRequest) -> datetime | None:
    """The time to wait for, or None.

    Raises:
        InvalidRequest: it is no moment.
    """
    if not request.HasField("min_event_time"):
        return None
    try:
        return request.min_event_time.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest.of_field("min_event_time", "is no moment") from error


def timestamp_of(moment: datetime) -> Timestamp:
    """A moment on the wire."""
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def sum_to_proto(one: DailySum) -> DailySumMessage:
    """One sum on the wire."""
    return DailySumMessage(
        day=one.day, metric=one.metric, currency_code=one.currency_code, value=one.value
    )


def watermark_to_proto(watermark: Watermark) -> WatermarkMessage:
    """A watermark on the wire; without an event it has no time."""
    reached = watermark.event_time
    return WatermarkMessage(
        event_time=None if reached is None else timestamp_of(reached),
        event_count=watermark.event_count,
        degraded=watermark.degraded,
    )


def run_to_proto(run: ReportRun) -> ReportRunMessage:
    """A report on the wire."""
    return ReportRunMessage(
        name=run.name,
        owner=run.owner_name,
        state=ReportRunMessage.STATE_SUCCEEDED,
        first_day=run.first_day,
        last_day=run.last_day,
        sums=[sum_to_proto(one) for one in run.sums],
        watermark=watermark_to_proto(run.watermark),
        create_time=timestamp_of(run.create_time),
        whole_tenant=run.whole_tenant,
    )
