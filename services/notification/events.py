"""What the notification service emits."""

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from tenfold.notification.v1.notification_events_pb2 import DeliveryFinished, NoticeRequested

from services.notification.domain import Delivery, Notice, delivery_name, user_name
from shared.db.ids import bucket_of
from shared.db.port import OutboxRow


def notice_requested(notice: Notice) -> OutboxRow:
    """A notice on its way to its recipient's bucket. Its aggregate is its cause, so unique."""
    message = NoticeRequested(
        recipient=user_name(notice.recipient),
        category=notice.category,
        title=notice.title,
        body=notice.body,
        subject=notice.subject,
        email=notice.email,
    )
    return OutboxRow(
        type=NoticeRequested.DESCRIPTOR.full_name,
        aggregate=notice.cause,
        payload=message.SerializeToString(deterministic=True),
        tenant=notice.tenant,
        bucket=bucket_of(notice.recipient),
    )


def delivery_finished(delivery: Delivery, now: datetime) -> OutboxRow:
    """A delivery in its final state."""
    name = delivery_name(delivery.delivery_id)
    message = DeliveryFinished(
        delivery=name,
        recipient=user_name(delivery.owner),
        state=delivery.state.value,
        finish_time=timestamp_of(now),
    )
    return OutboxRow(
        type=DeliveryFinished.DESCRIPTOR.full_name,
        aggregate=name,
        payload=message.SerializeToString(deterministic=True),
        tenant=delivery.tenant,
    )


def timestamp_of(moment: datetime) -> Timestamp:
    """The contract's form of a moment."""
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp
