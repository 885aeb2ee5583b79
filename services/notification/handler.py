"""Comes in by RPC: the caller's inbox, its live stream, and what was e-mailed."""

from tenfold.notification.v1.notification_pb2 import Delivery as DeliveryMessage

from services.notification.domain import (
    DeliveryState,
)

STATES = {
    DeliveryState.QUEUED: DeliveryMessage.STATE_QUEUED,
    # An attempt that is under way is nobody's business: it is queued until it ends.
    DeliveryState.SENDING: DeliveryMessage.STATE_QUEUED,
    DeliveryState.SENT: DeliveryMessage.STATE_SENT,
    DeliveryState.FAILED: DeliveryMessage.STATE_FAILED,
    DeliveryState.UNKNOWN: DeliveryMessage.STATE_UNKNOWN,
}
