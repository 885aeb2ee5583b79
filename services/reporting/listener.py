"""Comes in by event: each is counted once, in a transaction of its own bucket."""

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from tenfold.auth.v1.auth_events_pb2 import UserRegistered
from tenfold.ledger.v1.ledger_events_pb2 import AccountOpened, TransactionPosted
from tenfold.ledger.v1.ledger_pb2 import SIDE_DEBIT
from tenfold.media.v1.media_events_pb2 import VideoFailed, VideoQueued, VideoReady

from services.reporting import domain
from services.reporting.domain import Addition, PostedEntry
from services.reporting.store import add
from shared.bus.rules import source_of
from shared.bus.worker import Event, Subscription
from shared.db.port import Transaction

NAME = "reporting"


def subscription() -> Subscription:
    """What the service listens to. Sums need no order: each event is added whenever it comes."""
    return Subscription(
        service=NAME, name="sums", messages=tuple(ADDITIONS), handle=count, is_ordered=False
    )


async def count(tx: Transaction, event: Event) -> None:
    """Add one event to its day."""
    message_class = CLASSES[event.type]
    additions = ADDITIONS[message_class](event)
    await add(
        tx,
        additions,
        tenant=event.tenant,
        source=source_of(message_class),
        event_time=event.time,
    )


def of_transaction_posted(event: Event) -> list[Addition]:
    """Debits and credits of the day on which the ledger recorded it."""
    message = event.parse(TransactionPosted)
    entries = [
        PostedEntry(one.owner, one.side == SIDE_DEBIT, one.currency_code, one.minor_units)
        for one in message.entries
    ]
    return domain.additions_of_transaction(entries, day_of(message.recorded_time, event))


def of_account_opened(event: Event) -> list[Addition]:
    """One more account."""
    account = event.parse(AccountOpened).account
    day = day_of(account.create_time, event)
    return domain.one_more(account.owner, domain.ACCOUNTS_OPENED, day)


def of_video_queued(event: Event) -> list[Addition]:
    """One more upload that is complete."""
    message = event.parse(VideoQueued)
    day = day_of(message.queue_time, event)
    return domain.one_more(message.owner, domain.VIDEOS_QUEUED, day)


def of_video_ready(event: Event) -> list[Addition]:
    """One more video that can be played."""
    message = event.parse(VideoReady)
    day = day_of(message.ready_time, event)
    return domain.one_more(message.owner, domain.VIDEOS_READY, day)


def of_video_failed(event: Event) -> list[Addition]:
    """One more video that cannot."""
    message = event.parse(VideoFailed)
    day = day_of(message.fail_time, event)
    return domain.one_more(message.owner, domain.VIDEOS_FAILED, day)


def of_user_registered(event: Event) -> list[Addition]:
    """One more user, counted as his own."""
    message = event.parse(UserRegistered)
    day = day_of(message.create_time, event)
    return domain.one_more(message.user, domain.USERS_REGISTERED, day)


def day_of(stated: Timestamp, event: Event) -> date:
    """The day of the fact, UTC; of the event where the message states none."""
    if stated == Timestamp():
        return event.time.astimezone(UTC).date()
    # Not ToDatetime: it rounds by way of floats in some versions; a day needs only seconds.
    return datetime.fromtimestamp(stated.seconds, UTC).date()


ADDITIONS: dict[type[Message], Callable[[Event], Sequence[Addition]]] = {
    TransactionPosted: of_transaction_posted,
    AccountOpened: of_account_opened,
    VideoQueued: of_video_queued,
    VideoReady: of_video_ready,
    VideoFailed: of_video_failed,
    UserRegistered: of_user_registered,
}
CLASSES = {message.DESCRIPTOR.full_name: message for message in ADDITIONS}
