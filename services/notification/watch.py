"""The live stream of one inbox: resumable, bounded, correct without being told.

The truth is the inbox's change positions in the database; the stream reads what lies
after its own. So nothing is buffered: a slow reader is read for later, and one that
falls too far behind is told to list the inbox again.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from uuid import UUID

from services.notification.domain import InboxItem, InboxSummary
from services.notification.store import InboxStore
from services.notification.wake import InboxSignal, Waiter
from shared.bus.checkpoint import checkpoint
from shared.clock import Clock
from shared.errors import InvalidRequest, QuotaExceeded

BATCH_COUNT_MAX = 100
BACKLOG_COUNT_MAX = 1000
HEARTBEAT_S = 20.0
STREAM_COUNT_MAX = 10
RETRY_AFTER_S = 30.0
POSITION_DIGITS_MAX = 19


class TooManyStreams(QuotaExceeded):
    """The caller watches the inbox from too many places at once."""

    reason = "TOO_MANY_STREAMS"

    def __init__(self) -> None:
        super().__init__(
            f"An inbox can be watched by at most {STREAM_COUNT_MAX} streams at once: close one.",
            retry_after_s=RETRY_AFTER_S,
        )


@dataclass(frozen=True)
class InboxChange:
    """One message of the stream.

    Attributes:
        position: where the stream is after this message.
        item: what changed; None at the start, in a heartbeat and in a resync.
        is_resync: positions were skipped: list the inbox again.
    """

    position: int
    summary: InboxSummary
    item: InboxItem | None = None
    is_resync: bool = False


def position_of_cursor(cursor: str) -> int | None:
    """The position in a cursor; None for the empty one.

    Raises:
        InvalidRequest: no stream ever sent it.
    """
    if not cursor:
        return None
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= POSITION_DIGITS_MAX):
        raise InvalidRequest.of_field("cursor", "must be a cursor that this stream has sent.")
    return int(cursor)


def cursor_of_position(position: int) -> str:
    """The cursor that resumes after that position."""
    return str(position)


class InboxWatch:
    """Opens streams, at most STREAM_COUNT_MAX per inbox and process.

    Args:
        poll_s: how soon a change made by another process is seen.
    """

    def __init__(
        self, store: InboxStore, *, signal: InboxSignal, clock: Clock, poll_s: float
    ) -> None:
        self._store = store
        self._signal = signal
        self._clock = clock
        self._poll_s = poll_s

    async def run(self, tenant: str, owner: UUID, cursor: str) -> AsyncGenerator[InboxChange, None]:
        """Yield the inbox's changes after the cursor until closed.

        The first message comes at once and says where the stream starts.

        Raises:
            InvalidRequest: the cursor is none.
            TooManyStreams: close one first.
        """
        position = position_of_cursor(cursor)
        if self._signal.count(tenant, owner) >= STREAM_COUNT_MAX:
            raise TooManyStreams
        with self._signal.watching(tenant, owner) as waiter:
            summary = await self._store.get_summary(tenant, owner)
            is_resync = position is not None and not is_resumable(position, summary)
            if position is None or is_resync:
                position = summary.version
            yield InboxChange(position, summary, is_resync=is_resync)
            async for change in self._follow(tenant, owner, position, waiter):
                yield change

    async def _follow(
        self, tenant: str, owner: UUID, position: int, waiter: Waiter
    ) -> AsyncGenerator[InboxChange, None]:
        heard_at_s = self._clock.monotonic_s()
        while True:
            checkpoint()
            changes = await self._next(tenant, owner, position)
            for change in changes:
                yield change
                position, heard_at_s = change.position, self._clock.monotonic_s()
            if changes:
                waiter.calm()
                continue
            if self._clock.monotonic_s() - heard_at_s >= HEARTBEAT_S:
                heard_at_s = self._clock.monotonic_s()
                yield InboxChange(position, await self._store.get_summary(tenant, owner))
            await waiter.wait(self._poll_s)

    async def _next(self, tenant: str, owner: UUID, position: int) -> list[InboxChange]:
        """The changes after a position, or one resync if they are too many."""
        summary = await self._store.get_summary(tenant, owner)
        if summary.version == position:
            return []
        if not is_resumable(position, summary):
            return [InboxChange(summary.version, summary, is_resync=True)]
        items = await self._store.list_changes(
            tenant, owner, after_position=position, limit=BATCH_COUNT_MAX
        )
        # Read again, after the items: the last message's counts include its own change.
        summary = await self._store.get_summary(tenant, owner)
        return [InboxChange(item.position, summary, item) for item in items]


def is_resumable(position: int, summary: InboxSummary) -> bool:
    """Whether a stream can go on from there; not from the future, nor from too far back."""
    return 0 <= summary.version - position <= BACKLOG_COUNT_MAX
