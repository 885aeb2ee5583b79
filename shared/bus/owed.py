"""What only the broker knows: messages that no consumer has finished and no outbox has any more.

A backup is made of databases. What they say is whole but for one thing: an event whose outbox row
is forgotten (it was sent long enough ago) and whose consumer has not applied it yet is in the
stream alone; so is a job that still waits. These are read here, to be put back into the outboxes
of a restored mesh (shared/bus/resume.py). The streams themselves are not kept: their messages
would end by age and their sequences would lie, as soon as they are older than the databases.

Of a consumer, everything from its first unacknowledged message on is read; too much does no
harm, since its inbox knows what it has applied. An event stays in its stream when it is
acknowledged, so its consumers' positions are noted before the databases' moment and the events
are read after it. A job leaves its stream when it is done, so jobs are read before.
"""

import base64
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import nats.errors
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError

from shared.bus import rules
from shared.bus.jetstream import Bus, BusUnavailable

EVERY_SUBJECT = ">"
# What one page of the server's lists has (JSApiNamesLimit and JSApiListLimit of nats-server).
LIST_MAX = 256
EVENTS, JOBS, DEAD = rules.event_stream(""), rules.work_stream(""), rules.dead_stream("")


class MalformedMessage(ValueError):
    """A stored line is not a message."""


@dataclass(frozen=True)
class OwedMessage:
    """One message as its stream holds it."""

    subject: str
    headers: Mapping[str, str]
    payload: bytes

    def to_line(self) -> bytes:
        """One line of JSON, with its end."""
        payload = base64.b64encode(self.payload).decode()
        told = {"subject": self.subject, "headers": dict(self.headers), "payload": payload}
        return json.dumps(told).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> "OwedMessage":
        """Read what to_line wrote.

        Raises:
            MalformedMessage: it is something else.
        """
        try:
            told = json.loads(line)
            headers = {str(name): str(value) for name, value in told["headers"].items()}
            payload = base64.b64decode(told["payload"], validate=True)
            return cls(str(told["subject"]), headers, payload)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MalformedMessage(f"not a message: {line[:80]!r}") from error


@dataclass(frozen=True)
class Unread:
    """Part of a stream: the messages on a subject from a sequence on."""

    stream: str
    subject: str
    first_seq: int


async def unfinished_jobs(bus: Bus) -> list[Unread]:
    """Where the jobs are that are not done, and those that were given up.

    Raises:
        BusUnavailable: NATS does not answer.
    """
    names = [name for name, _ in await _streams(bus) if name.startswith((JOBS, DEAD))]
    return [Unread(name, EVERY_SUBJECT, 1) for name in names]


async def unfinished_events(bus: Bus) -> list[Unread]:
    """Where the events are that not every durable consumer has acknowledged by now, or that come.

    Raises:
        BusUnavailable: NATS does not answer.
    """
    first: dict[tuple[str, str], int] = {}
    for stream, last_seq in await _streams(bus):
        if not stream.startswith(EVENTS):
            continue
        with _answering():
            consumers = await bus.jetstream.consumers_info(stream)
        assert len(consumers) < LIST_MAX, "a stream has more consumers than one page"
        for consumer in consumers:
            is_idle = not consumer.num_pending and not consumer.num_ack_pending
            floor = consumer.ack_floor.stream_seq if consumer.ack_floor else 0
            seq = (max(floor, last_seq) if is_idle else floor) + 1
            key = stream, consumer.config.filter_subject or EVERY_SUBJECT
            first[key] = min(seq, first.get(key, seq))
    return [Unread(stream, subject, seq) for (stream, subject), seq in first.items()]


async def read_owed(bus: Bus, unread: Unread) -> AsyncIterator[OwedMessage]:
    """The messages that are there now, oldest first; what comes meanwhile is not waited for.

    Raises:
        BusUnavailable: NATS does not answer.
    """
    ends = dict(await _streams(bus))
    seq, last_seq = unread.first_seq, ends.get(unread.stream, 0)
    while seq <= last_seq:
        stored = await _next(bus, unread, seq)
        if stored is None or stored.seq is None or stored.seq > last_seq:
            return
        yield OwedMessage(str(stored.subject), stored.headers or {}, stored.data or b"")
        seq = stored.seq + 1


async def _next(bus: Bus, unread: Unread, seq: int) -> RawStreamMsg | None:
    with _answering():
        try:
            return await bus.jetstream.get_msg(
                unread.stream, seq=seq, subject=unread.subject, next=True
            )
        except NotFoundError:
            return None


async def _streams(bus: Bus) -> list[tuple[str, int]]:
    """Name and last sequence of every stream. A consumer's list is read after its stream's end."""
    found: list[tuple[str, int]] = []
    while True:
        with _answering():
            page = await bus.jetstream.streams_info(offset=len(found))
        found += [(str(info.config.name), int(info.state.last_seq)) for info in page]
        if len(page) < LIST_MAX:
            return found


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise BusUnavailable(f"NATS does not answer: {error}") from error
