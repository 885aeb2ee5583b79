"""Comes in by event: what happened becomes a notice for the person it concerns."""

from collections.abc import Awaitable, Callable, Mapping
from uuid import UUID

from google.protobuf.message import Message
from tenfold.auth.v1.auth_events_pb2 import UserRegistered
from tenfold.ledger.v1.ledger_events_pb2 import TransactionPosted
from tenfold.ledger.v1.ledger_pb2 import SIDE_CREDIT
from tenfold.media.v1.media_events_pb2 import VideoFailed, VideoReady
from tenfold.notification.v1.notification_events_pb2 import NoticeRequested

from services.notification import events, templates
from services.notification.domain import (
    Contact,
    Credited,
    Notice,
    PostedEntry,
    credited_users,
    user_id_of_name,
    user_name,
)
from services.notification.money import amount_text
from services.notification.store import insert_contact, insert_notice
from services.notification.wake import InboxSignal
from shared.bus.worker import Event, Subscription
from shared.clock import Clock
from shared.db.port import Transaction

Handle = Callable[[Transaction, Event], Awaitable[None]]


def by_type(handles: Mapping[type[Message], Handle]) -> Handle:
    """One handle for several types of event."""
    named = {message.DESCRIPTOR.full_name: handle for message, handle in handles.items()}

    async def handle(tx: Transaction, event: Event) -> None:
        await named[event.type](tx, event)

    return handle


class NotificationListener:
    """Applies events, each in a transaction of its own bucket."""

    def __init__(self, *, signal: InboxSignal, clock: Clock) -> None:
        self._signal = signal
        self._clock = clock

    def subscriptions(self) -> list[Subscription]:
        """What the service listens to: one subscription per source of events."""
        sources: dict[str, dict[type[Message], Handle]] = {
            "contacts": {UserRegistered: self.on_user_registered},
            "videos": {VideoReady: self.on_video_ready, VideoFailed: self.on_video_failed},
            "transactions": {TransactionPosted: self.on_transaction_posted},
            "notices": {NoticeRequested: self.on_notice_requested},
        }
        return [
            Subscription(
                service="notification",
                name=name,
                messages=tuple(handles),
                handle=by_type(handles),
                # Notices are a set, and a contact is written once: no order is needed.
                is_ordered=False,
            )
            for name, handles in sources.items()
        ]

    async def on_user_registered(self, tx: Transaction, event: Event) -> None:
        """Remember where the user can be reached, and say welcome."""
        message = event.parse(UserRegistered)
        user_id = user_id_of_name(message.user)
        if user_id is None:
            return
        contact = Contact(
            user_id, event.tenant, message.email, message.display_name, message.locale
        )
        await insert_contact(tx, contact, now=self._clock.now())
        values = {"name": message.display_name or "and good to see you"}
        await self._notify(
            tx, _notice(event, user_id, templates.USER_WELCOME, message.user, values)
        )

    async def on_video_ready(self, tx: Transaction, event: Event) -> None:
        """Tell the owner that a video can be played."""
        message = event.parse(VideoReady)
        values = {
            "video": message.display_name or message.video,
            "duration": templates.duration_text(message.duration_s),
        }
        await self._notify_owner(tx, event, message.owner, templates.VIDEO_READY, values)

    async def on_video_failed(self, tx: Transaction, event: Event) -> None:
        """Tell the owner that a video cannot be played, and why."""
        message = event.parse(VideoFailed)
        values = {
            "video": message.display_name or message.video,
            "failure": message.failure.description,
        }
        await self._notify_owner(tx, event, message.owner, templates.VIDEO_FAILED, values)

    async def on_transaction_posted(self, tx: Transaction, event: Event) -> None:
        """Send a notice on to everybody who received money: each has a bucket of his own."""
        message = event.parse(TransactionPosted)
        entries = tuple(
            PostedEntry(
                entry.owner, entry.side == SIDE_CREDIT, entry.currency_code, entry.minor_units
            )
            for entry in message.entries
        )
        for credited in credited_users(entries):
            notice = _notice_of_credit(event, message, credited)
            await tx.append_outbox(events.notice_requested(notice))

    async def on_notice_requested(self, tx: Transaction, event: Event) -> None:
        """The hop's other end: the notice has reached its recipient's bucket."""
        message = event.parse(NoticeRequested)
        recipient = user_id_of_name(message.recipient)
        if recipient is None:
            return
        notice = Notice(
            recipient=recipient,
            tenant=event.tenant,
            # The aggregate, not the event: also a second request from one cause is one notice.
            cause=event.aggregate,
            category=message.category,
            title=message.title,
            body=message.body,
            subject=message.subject,
            email=message.email,
        )
        await self._notify(tx, notice)

    async def _notify_owner(
        self, tx: Transaction, event: Event, owner: str, category: str, values: dict[str, str]
    ) -> None:
        user_id = user_id_of_name(owner)
        if user_id is not None:  # a service account has no inbox
            await self._notify(tx, _notice(event, user_id, category, event.aggregate, values))

    async def _notify(self, tx: Transaction, notice: Notice) -> None:
        if await insert_notice(tx, notice, now=self._clock.now()):
            self._signal.ring(notice.tenant, notice.recipient)


def _notice(
    event: Event, recipient: UUID, category: str, subject: str, values: dict[str, str]
) -> Notice:
    text = templates.render(category, values)
    return Notice(
        recipient=recipient,
        tenant=event.tenant,
        cause=str(event.id),
        category=category,
        title=text.title,
        body=text.body,
        subject=subject,
        email=templates.TEMPLATES[category].email,
    )


def _notice_of_credit(event: Event, message: TransactionPosted, credited: Credited) -> Notice:
    amounts = [amount_text(units, code) for code, units in sorted(credited.minor_units.items())]
    text = templates.render(
        templates.TRANSFER_RECEIVED,
        {"amount": ", ".join(amounts), "description": message.description},
    )
    return Notice(
        recipient=credited.user_id,
        tenant=event.tenant,
        cause=f"{message.transaction}/{user_name(credited.user_id)}",
        category=templates.TRANSFER_RECEIVED,
        title=text.title,
        body=text.body,
        subject=message.transaction,
        email=templates.TEMPLATES[templates.TRANSFER_RECEIVED].email,
    )
