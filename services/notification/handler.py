"""Comes in by RPC: the caller's inbox, its live stream, and what was e-mailed."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from uuid import UUID

from tenfold.notification.v1.notification_pb2 import Delivery as DeliveryMessage
from tenfold.notification.v1.notification_pb2 import InboxItem as InboxItemMessage
from tenfold.notification.v1.notification_pb2 import InboxSummary as InboxSummaryMessage
from tenfold.notification.v1.notification_service_pb2 import (
    GetInboxSummaryRequest,
    ListDeliveriesRequest,
    ListDeliveriesResponse,
    ListInboxItemsRequest,
    ListInboxItemsResponse,
    MarkInboxItemReadRequest,
    WatchInboxRequest,
    WatchInboxResponse,
)

from services.notification.domain import (
    Delivery,
    DeliveryState,
    InboxItem,
    InboxSummary,
    delivery_name,
    item_id_of_name,
    item_name,
)
from services.notification.events import timestamp_of
from services.notification.store import LAST_ID, InboxStore
from services.notification.wake import InboxSignal
from services.notification.watch import InboxChange, InboxWatch, cursor_of_position
from shared.clock import Clock
from shared.db.paging import PageScope, open_page_token, page_size_of, seal_page_token
from shared.errors import FailedPrecondition
from shared.identity import Principal
from shared.rpc.context import Context

STATES = {
    DeliveryState.QUEUED: DeliveryMessage.STATE_QUEUED,
    # An attempt that is under way is nobody's business: it is queued until it ends.
    DeliveryState.SENDING: DeliveryMessage.STATE_QUEUED,
    DeliveryState.SENT: DeliveryMessage.STATE_SENT,
    DeliveryState.FAILED: DeliveryMessage.STATE_FAILED,
    DeliveryState.UNKNOWN: DeliveryMessage.STATE_UNKNOWN,
}


@dataclass(frozen=True)
class Page:
    """Which part of a list is asked for: size rows with ids below before."""

    before: UUID
    size: int


class NotificationHandler:
    """Serves InboxService and DeliveryService: everything is the caller's own."""

    def __init__(
        self,
        store: InboxStore,
        *,
        watch: InboxWatch,
        signal: InboxSignal,
        page_secret: bytes,
        clock: Clock,
    ) -> None:
        self._store = store
        self._watch = watch
        self._signal = signal
        self._page_secret = page_secret
        self._clock = clock

    async def ListInboxItems(
        self, request: ListInboxItemsRequest, context: Context
    ) -> ListInboxItemsResponse:
        """Newest first."""
        tenant, owner = _inbox_of(context.principal)
        page = self._page(request, context)
        # One more than asked for tells whether there is a next page.
        items = await self._store.list_items(tenant, owner, before=page.before, limit=page.size + 1)
        return ListInboxItemsResponse(
            items=[item_to_proto(item) for item in items[: page.size]],
            next_page_token=self._next_token([item.item_id for item in items], page, context),
        )

    async def GetInboxSummary(
        self, request: GetInboxSummaryRequest, context: Context
    ) -> InboxSummaryMessage:
        """The counts, from one row."""
        return summary_to_proto(await self._store.get_summary(*_inbox_of(context.principal)))

    async def WatchInbox(
        self, request: WatchInboxRequest, context: Context
    ) -> AsyncIterator[WatchInboxResponse]:
        """Every change from the cursor on."""
        tenant, owner = _inbox_of(context.principal)
        async with aclosing(self._watch.run(tenant, owner, request.cursor)) as changes:
            async for change in changes:
                yield change_to_proto(change)

    async def MarkInboxItemRead(
        self, request: MarkInboxItemReadRequest, context: Context
    ) -> InboxItemMessage:
        """Repeatable: the first reading counts."""
        tenant, owner = _inbox_of(context.principal)
        item_id, now = item_id_of_name(request.name), self._clock.now()
        item = await self._store.mark_read(tenant, owner, item_id, now=now)
        self._signal.ring(tenant, owner)
        return item_to_proto(item)

    async def ListDeliveries(
        self, request: ListDeliveriesRequest, context: Context
    ) -> ListDeliveriesResponse:
        """Newest first."""
        tenant, owner = _inbox_of(context.principal)
        page = self._page(request, context)
        deliveries = await self._store.list_deliveries(
            tenant, owner, before=page.before, limit=page.size + 1
        )
        ids = [delivery.delivery_id for delivery in deliveries]
        return ListDeliveriesResponse(
            deliveries=[delivery_to_proto(delivery) for delivery in deliveries[: page.size]],
            next_page_token=self._next_token(ids, page, context),
        )

    def _page(
        self, request: ListInboxItemsRequest | ListDeliveriesRequest, context: Context
    ) -> Page:
        scope = PageScope.of(context.method, context.principal)
        position = open_page_token(self._page_secret, scope, request.page_token)
        before = UUID(str(position[0])) if position else LAST_ID
        return Page(before, page_size_of(request.page_size))

    def _next_token(self, ids: list[UUID], page: Page, context: Context) -> str:
        if len(ids) <= page.size:
            return ""
        scope = PageScope.of(context.method, context.principal)
        return seal_page_token(self._page_secret, scope, ids[page.size - 1])


def _inbox_of(principal: Principal) -> tuple[str, UUID]:
    try:
        return principal.scope
    except ValueError as error:
        raise FailedPrecondition("this caller has no inbox: only users have one") from error


def item_to_proto(item: InboxItem) -> InboxItemMessage:
    """A notice as the contract has it."""
    return InboxItemMessage(
        name=item_name(item.item_id),
        category=item.category,
        title=item.title,
        body=item.body,
        subject=item.subject,
        create_time=timestamp_of(item.created_at),
        read_time=timestamp_of(item.read_at) if item.read_at else None,
    )


def summary_to_proto(summary: InboxSummary) -> InboxSummaryMessage:
    """The counts as the contract has them."""
    return InboxSummaryMessage(
        unread_count=summary.unread_count,
        total_count=summary.total_count,
        version=summary.version,
    )


def change_to_proto(change: InboxChange) -> WatchInboxResponse:
    """One message of the stream."""
    return WatchInboxResponse(
        cursor=cursor_of_position(change.position),
        item=item_to_proto(change.item) if change.item else None,
        summary=summary_to_proto(change.summary),
        resync=change.is_resync,
    )


def delivery_to_proto(delivery: Delivery) -> DeliveryMessage:
    """A delivery as its recipient sees it."""
    next_attempt_at = None
    if delivery.state is DeliveryState.QUEUED:
        next_attempt_at = delivery.next_attempt_at
    return DeliveryMessage(
        name=delivery_name(delivery.delivery_id),
        item=item_name(delivery.item_id),
        channel=DeliveryMessage.CHANNEL_EMAIL,
        state=STATES[delivery.state],
        attempt_count=delivery.attempt_count,
        reason=delivery.reason,
        create_time=timestamp_of(delivery.created_at),
        next_attempt_time=timestamp_of(next_attempt_at) if next_attempt_at else None,
        sent_time=timestamp_of(delivery.sent_at) if delivery.sent_at else None,
    )
