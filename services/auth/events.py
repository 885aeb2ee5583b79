"""What auth emits: type, aggregate and payload."""

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from tenfold.auth.v1 import auth_events_pb2 as events

from services.auth.domain import Session, User
from shared.db.port import OutboxRow


def timestamp_of(moment: datetime) -> Timestamp:
    """The wire's form of a moment."""
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def user_registered(user: User) -> OutboxRow:
    """A user exists."""
    name = f"users/{user.id}"
    message = events.UserRegistered(
        user=name,
        email=user.email,
        display_name=user.display_name,
        locale=user.locale,
        create_time=timestamp_of(user.created_at),
    )
    return _row(message, name, user.tenant)


def session_revoked(session: Session, *, now: datetime) -> OutboxRow:
    """A session has ended before its time."""
    name = f"sessions/{session.id}"
    message = events.SessionRevoked(
        session=name, user=f"users/{session.user_id}", revoke_time=timestamp_of(now)
    )
    return _row(message, name, session.tenant)


def _row(
    message: events.UserRegistered | events.SessionRevoked, aggregate: str, tenant: str
) -> OutboxRow:
    return OutboxRow(
        type=message.DESCRIPTOR.full_name,
        aggregate=aggregate,
        payload=message.SerializeToString(deterministic=True),
        tenant=tenant,
    )
