"""The bus's arithmetic: names, back-off, and whether an event may be applied. Pure.

Subjects are `evt.<service>.<Type>.<bucket>` for events, `wrk.<service>.<queue>.<bucket>`
for jobs and `dlq.<service>.<queue>.<bucket>` for jobs that were given up. Each is kept
by the stream of its kind and service: EVT_payment, WRK_media, DLQ_media.
"""

from enum import StrEnum
from hashlib import blake2b
from uuid import UUID

from google.protobuf.message import Message
from tenfold.options.v1 import policy_pb2

ACK_WAIT_S = 30.0
"""How long the server waits for an ack; heartbeats restart it."""

MAX_DELIVER = 12
"""The server's own limit, a back-stop only: our rules give up earlier."""

POISON_AT = 8
"""A message that failed this often goes to the dead letters."""

SUSPECT_AT = 4
"""From this delivery on, an event may be what ends its workers: it runs alone and counted."""

STARTS_MAX = 3
"""Counted runs that never ended; then the event is dead-lettered without another. With
SUSPECT_AT well below MAX_DELIVER, which leaves deliveries for failures of other kinds."""

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 60.0
BACKOFF_SPREAD = 0.2

MESSAGE_ID = "Nats-Msg-Id"
TYPE = "tenfold-type"
AGGREGATE = "tenfold-aggregate"
EVENT_NO = "tenfold-aggregate-version"
SOURCE_BUCKET = "tenfold-source-bucket"
TENANT = "tenfold-tenant"
TIME = "tenfold-time"

_VERSION_8 = 0x8 << 76
_VARIANT = 0x2 << 62
_LOW_62_BITS = (1 << 62) - 1
_HIGH_48_BITS = ((1 << 48) - 1) << 80


class Verdict(StrEnum):
    """What to do with a numbered event."""

    APPLY = "apply"
    STALE = "stale"
    GAP = "gap"


def verdict_of(seen: int | None, event_no: int) -> Verdict:
    """Whether an event is the next of its aggregate.

    Args:
        seen: the number of the last event that was applied; None before the first.
        event_no: this event's number, 1 or more; an aggregate's numbers have no gap.
    """
    expected = (seen or 0) + 1
    if event_no == expected:
        return Verdict.APPLY
    return Verdict.STALE if event_no < expected else Verdict.GAP


def backoff_s(deliveries: int, *, spread: float) -> float:
    """Seconds until the next try: doubling from half a second to a minute, each ± 20 %.

    Args:
        deliveries: how often the message was delivered so far, 1 or more.
        spread: -1 to 1, drawn at random, so that a burst of failures does not return as one.
    """
    # The exponent is cut so that a huge count cannot overflow a float.
    base_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(deliveries - 1, 16))
    return base_s * (1 + BACKOFF_SPREAD * spread)


def event_stream(service: str) -> str:
    """The stream of a service's events."""
    return f"EVT_{service}"


def work_stream(service: str) -> str:
    """The stream of a service's jobs."""
    return f"WRK_{service}"


def dead_stream(service: str) -> str:
    """The stream of a service's jobs that were given up."""
    return f"DLQ_{service}"


def event_subject(service: str, type_name: str, bucket: int) -> str:
    """The subject of one event; only the last part of the message's full name is in it."""
    return f"evt.{service}.{type_name.rpartition('.')[2]}.{bucket}"


def work_subject(service: str, queue: str, bucket: int) -> str:
    """The subject of one job."""
    return f"wrk.{service}.{queue}.{bucket}"


def bucket_of_subject(subject: str) -> int:
    """Where consumers apply the message: the subject's last token."""
    return int(subject.rpartition(".")[2])


def source_of(message: type[Message]) -> str:
    """The service that emits this event, from its contract.

    Raises:
        ValueError: the message declares no (tenfold.options.v1.event).
    """
    service = message.DESCRIPTOR.GetOptions().Extensions[policy_pb2.event].service
    if not service:
        raise ValueError(f"{message.DESCRIPTOR.full_name} declares no event option")
    return service


def dead_letter_id(bucket: int, consumer: str, message_id: UUID) -> UUID:
    """The dead letter's id, the same for every try: a UUIDv8 that carries its bucket."""
    digest = blake2b(f"{consumer}\0{message_id}".encode(), digest_size=16).digest()
    number = int.from_bytes(digest, "big")
    number &= _HIGH_48_BITS | _LOW_62_BITS
    return UUID(int=number | _VERSION_8 | (bucket << 64) | _VARIANT)
