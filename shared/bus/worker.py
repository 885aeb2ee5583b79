"""A durable consumer: inbox, positions, retries, back-off, dead letters.

The effect of an event commits in one transaction of the event's bucket, together with

* an inbox row, so that a second delivery finds it and does nothing;
* the aggregate's position, so that a missing event is noticed: numbers have no gap;
* the outbox rows that the effect causes.

Only then is the message acknowledged. An ack may be lost; the inbox is what counts.

What fails is delivered again after half a second, doubling to a minute. The eighth
failure writes the event to the dead letters, once, and its aggregate goes on. A part
that is down (Unavailable and its like) is no fault of the event: it is retried in place
and never dead-lettered. An event that was delivered often without an outcome may be what
kills its workers: it runs alone, each start counted beforehand, and is dead-lettered
without another run.
"""

import asyncio
import builtins
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar
from uuid import UUID

import nats.errors
import structlog
from google.protobuf.message import DecodeError, Message
from nats.aio.msg import Msg

from shared.bus import rules
from shared.bus.checkpoint import checkpoint
from shared.bus.jetstream import (
    ADVISORY_STREAM,
    ADVISORY_SUBJECT,
    Bus,
    consumer_definition,
)
from shared.bus.jobs import Job, JobQueue, run_jobs
from shared.bus.pull import Pull, Slots, run_pull
from shared.bus.rules import Verdict
from shared.clock import Clock, to_us
from shared.crashpoints import CrashPoint
from shared.db.ids import BUCKET_COUNT
from shared.db.port import Shards, Transaction
from shared.errors import Aborted, DeadlineExceeded, Overloaded, QuotaExceeded, Unavailable

__all__ = [
    "Event",
    "EventGap",
    "Job",
    "JobQueue",
    "MalformedEvent",
    "Subscription",
    "redrive",
    "run_jobs",
    "run_subscription",
]

LANE_COUNT = 16
PREFETCH_PER_LANE = 8
ACK_PENDING_MAX = 1000
"""More than the slots of one process: messages that wait for their next try count too."""

STARTS = "#starts"
"""Suffix of the consumer under whose positions the starts of a suspect are counted."""

APPLY_S = 20.0
WAITING_KEYS_MAX = 10_000
HOLD_PAUSE_S = 5.0
ERROR_CHARACTERS_MAX = 1000
GIVE_BACK_S = 1.0

WAIT_AND_RETRY = (
    Unavailable,
    Overloaded,
    DeadlineExceeded,
    Aborted,
    QuotaExceeded,
    TimeoutError,
)
"""Errors that say nothing about the event: some part is down or busy."""

BEFORE_COMMIT = CrashPoint(
    "worker.before_commit", "the event's effect and inbox row are written, not committed"
)
COMMITTED_NOT_ACKED = CrashPoint(
    "worker.committed_not_acked", "the event's effect is committed, the message not acked"
)

INSERT_INBOX = """
INSERT INTO inbox (bucket, consumer, msg_id, at_us) VALUES ($1, $2, $3, $4)
ON CONFLICT DO NOTHING
"""
SELECT_POSITION = """
SELECT event_no FROM inbox_pos WHERE bucket = $1 AND consumer = $2 AND aggregate = $3
"""
ADVANCE_POSITION = """
INSERT INTO inbox_pos (bucket, consumer, aggregate, event_no) VALUES ($1, $2, $3, $4)
ON CONFLICT (bucket, consumer, aggregate) DO UPDATE SET event_no = excluded.event_no
WHERE inbox_pos.event_no < excluded.event_no
"""
DELETE_POSITION = """
DELETE FROM inbox_pos WHERE bucket = $1 AND consumer = $2 AND aggregate = $3
"""
INSERT_DEAD_LETTER = """
INSERT INTO dead_letter
  (bucket, id, consumer, subject, headers, payload, error, tries, at_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT DO NOTHING
"""
SELECT_DEAD_LETTER = """
SELECT consumer, subject, headers, payload FROM dead_letter WHERE bucket = $1 AND id = $2
"""
DELETE_DEAD_LETTER = "DELETE FROM dead_letter WHERE bucket = $1 AND id = $2"

M = TypeVar("M", bound=Message)
_log = structlog.get_logger(__name__)


class MalformedEvent(ValueError):
    """A message without the headers that every event carries."""


class EventGap(Exception):
    """An event came before its predecessor."""

    def __init__(self, aggregate: str, seen: int | None, event_no: int) -> None:
        super().__init__(f"{aggregate}: event {event_no} came after {seen or 0}")


@dataclass(frozen=True)
class Event:
    """One event as it was delivered.

    Attributes:
        id: the same for every delivery.
        type: the message's full name.
        bucket: where the effect is applied.
        aggregate: the resource's name.
        event_no: 1 or more, without a gap per aggregate (and source bucket).
        tenant: whose event it is.
        time: when the event was committed, UTC.
        payload: the serialized message.
        headers: everything else that came along, traceparent for one.
        subject: the NATS subject it came by.
    """

    id: UUID
    type: str
    bucket: int
    aggregate: str
    event_no: int
    tenant: str
    time: datetime
    payload: bytes
    headers: Mapping[str, str]
    subject: str = ""

    def parse(self, message_class: builtins.type[M]) -> M:
        """The payload as a message.

        Raises:
            MalformedEvent: the bytes are no such message.
        """
        try:
            return message_class.FromString(self.payload)
        except DecodeError as error:
            raise MalformedEvent(f"{self.id} is no {self.type}: {error}") from error

    @property
    def is_hop(self) -> bool:
        """Whether it was sent on from another bucket: its numbers are that bucket's."""
        return int(self.headers.get(rules.SOURCE_BUCKET, self.bucket)) != self.bucket


Handle = Callable[[Transaction, Event], Awaitable[None]]


@dataclass(frozen=True)
class Subscription:
    """Which events a service wants, and what it does with each.

    Attributes:
        service: the consuming service.
        name: what it is for; with the service, the durable consumer's name. Never reuse it.
        messages: the event types; each names its emitting service in the contract.
        handle: applies one event inside the given transaction of the event's bucket. It
            must touch nothing but that transaction: the event may be delivered again.
        is_ordered: events of an aggregate are applied by number, and a missing one is
            waited for; the consumer then reads every event of its sources. False when
            the effect is a sum or a set, which needs no order: then the inbox alone
            makes it once.
        ack_wait_s: how long one delivery may take.
    """

    service: str
    name: str
    messages: tuple[type[Message], ...]
    handle: Handle
    is_ordered: bool = True
    ack_wait_s: float = rules.ACK_WAIT_S

    @property
    def consumer(self) -> str:
        """The name under which inbox, positions and dead letters are kept."""
        return f"{self.service}-{self.name}"


def event_of(subject: str, headers: Mapping[str, str], payload: bytes) -> Event:
    """Read one delivered message.

    Raises:
        MalformedEvent: a header is missing or not what it should be.
    """
    try:
        return Event(
            id=UUID(headers[rules.MESSAGE_ID]),
            type=headers[rules.TYPE],
            bucket=_checked_bucket(subject),
            aggregate=headers[rules.AGGREGATE],
            event_no=int(headers[rules.EVENT_NO]),
            tenant=headers[rules.TENANT],
            time=datetime.fromisoformat(headers[rules.TIME]),
            payload=payload,
            headers=headers,
            subject=subject,
        )
    except (KeyError, ValueError) as error:
        raise MalformedEvent(f"{subject}: {error!r}") from error


async def run_subscription(
    bus: Bus, shards: Shards, subscription: Subscription, *, clock: Clock
) -> None:
    """Apply events until cancelled.

    Raises:
        BusClosed: the connection will never come back.
    """
    worker = _Worker(bus, shards, subscription, clock)
    try:
        async with asyncio.TaskGroup() as tasks:
            for lane in worker.lanes:
                tasks.create_task(worker.run_lane(lane))
            for source, subject, durable in _filters(subscription):
                tasks.create_task(run_pull(bus, worker.pull(source, subject, durable)))
                tasks.create_task(run_pull(bus, worker.given_up(source, durable)))
            tasks.create_task(worker.run_given_up())
    finally:
        await worker.give_back()


def _filters(subscription: Subscription) -> list[tuple[str, str, str]]:
    """(source service, filter, durable name) of each JetStream consumer that is needed."""
    if subscription.is_ordered:
        # Every event of the source: one that is not wanted still moves its aggregate on.
        sources = sorted({rules.source_of(message) for message in subscription.messages})
        return [(source, f"evt.{source}.>", subscription.consumer) for source in sources]
    return [
        (
            rules.source_of(message),
            f"evt.{rules.source_of(message)}.{message.DESCRIPTOR.name}.*",
            f"{subscription.consumer}-{message.DESCRIPTOR.name}",
        )
        for message in subscription.messages
    ]


class _Worker:
    """One subscription's state in this process."""

    def __init__(self, bus: Bus, shards: Shards, subscription: Subscription, clock: Clock) -> None:
        self._bus = bus
        self._shards = shards
        self._subscription = subscription
        self._clock = clock
        self._wanted = {message.DESCRIPTOR.full_name for message in subscription.messages}
        self._slots = Slots(LANE_COUNT * PREFETCH_PER_LANE)
        self._suspects = asyncio.Lock()
        self._waiting: dict[tuple[int, str], int] = {}
        """The lowest event of an aggregate that failed here and will come again."""
        self._advisories: asyncio.Queue[Msg] = asyncio.Queue()
        self.lanes: list[asyncio.Queue[Msg]] = [asyncio.Queue() for _ in range(LANE_COUNT)]

    def pull(self, source: str, subject: str, durable: str) -> Pull:
        """What brings this subscription's events of one source."""
        return Pull(
            stream=rules.event_stream(source),
            consumer=consumer_definition(
                durable,
                subject=subject,
                ack_wait_s=self._subscription.ack_wait_s,
                max_deliver=rules.MAX_DELIVER,
                max_ack_pending=ACK_PENDING_MAX,
            ),
            prepare=lambda: self._bus.ensure_readable(source),
            slots=self._slots,
            accept=self._accept,
        )

    def _accept(self, message: Msg) -> None:
        """One aggregate's events share a lane, so that they are applied one by one."""
        key = (message.headers or {}).get(rules.AGGREGATE, message.subject)
        self.lanes[hash(key) % LANE_COUNT].put_nowait(message)

    async def run_lane(self, lane: "asyncio.Queue[Msg]") -> None:
        """Settle the messages of one lane, one after the other."""
        while True:
            checkpoint()
            message = await lane.get()
            try:
                await self._settle(message)
            except (nats.errors.Error, OSError) as error:
                # The ack did not go out: the message comes again and the inbox knows it.
                _log.info("bus.not_settled", subject=message.subject, error=str(error))
            finally:
                self._slots.give_back()

    async def _settle(self, message: Msg) -> None:
        """Apply, acknowledge, or say when to try again: the boundary of one delivery."""
        deliveries = message.metadata.num_delivered
        headers, payload = message.headers or {}, message.data
        try:
            event = event_of(message.subject, headers, payload)
        except MalformedEvent as error:
            _log.error("bus.malformed", subject=message.subject, error=str(error))
            return await self._park_malformed(message, str(error))
        while True:
            checkpoint()
            try:
                await self._apply_or_bury(event, deliveries)
            except WAIT_AND_RETRY as error:
                _log.info("bus.retry", event_id=str(event.id), error=repr(error))
                if deliveries < rules.POISON_AT:
                    return await self._try_later(message, deliveries)
                await self._hold(message)
            except Exception as error:
                _log.warning("bus.failed", event_id=str(event.id), error=repr(error))
                self._note_waiting(event)
                return await self._try_later(message, deliveries)
            else:
                COMMITTED_NOT_ACKED.visit()
                self._forget_waiting(event)
                return await message.ack()

    async def _apply_or_bury(self, event: Event, deliveries: int) -> None:
        """Returns when the event is dealt with for good; the last failure is buried."""
        async with asyncio.timeout(APPLY_S):
            try:
                if deliveries < rules.SUSPECT_AT:
                    await self._apply(event, accepts_gap=False)
                else:
                    await self._apply_suspect(event, deliveries)
            except (EventGap, *WAIT_AND_RETRY):
                raise  # a predecessor is late, a part is down: no fault of this event
            except Exception as error:
                if deliveries < rules.POISON_AT:
                    raise
                _log.error("bus.dead_letter", event_id=str(event.id), error=repr(error))
                await self._bury(event, deliveries, f"{type(error).__name__}: {error}")

    async def _apply_suspect(self, event: Event, deliveries: int) -> None:
        """Apply an event that came so often that it may be what ends its workers.

        Suspects run one at a time, and each start is committed before it: an event that
        merely was in hand when another ended the process is not blamed for it.
        """
        accepts_gap = deliveries >= rules.POISON_AT and self._is_foremost(event)
        async with self._suspects:
            if await self._count_start(event) > rules.STARTS_MAX:
                _log.error("bus.killer", event_id=str(event.id))
                return await self._bury(event, deliveries, "it ended every worker that ran it")
            try:
                await self._apply(event, accepts_gap=accepts_gap)
            finally:
                with suppress(*WAIT_AND_RETRY):
                    await self._forget_starts(event)

    async def _count_start(self, event: Event) -> int:
        key = (event.bucket, f"{self._subscription.consumer}{STARTS}", str(event.id))
        async with self._shards.bucket(event.bucket).transaction() as tx:
            row = await tx.fetch_one(SELECT_POSITION, *key)
            starts = 1 if row is None else int(row["event_no"]) + 1
            await tx.execute(ADVANCE_POSITION, *key, starts)
        return starts

    async def _forget_starts(self, event: Event) -> None:
        key = (event.bucket, f"{self._subscription.consumer}{STARTS}", str(event.id))
        async with self._shards.bucket(event.bucket).transaction() as tx:
            await tx.execute(DELETE_POSITION, *key)

    async def _park_malformed(self, message: Msg, error: str) -> None:
        """Keep what cannot even be read where an operator finds it."""
        metadata = message.metadata
        event = Event(
            id=UUID(int=metadata.sequence.stream),
            type="",
            bucket=_bucket_or_first(message.subject),
            aggregate="",
            event_no=0,
            tenant="",
            time=metadata.timestamp,
            payload=message.data,
            headers=message.headers or {},
            subject=message.subject,
        )
        try:
            async with self._shards.bucket(event.bucket).transaction() as tx:
                await self._insert_dead_letter(tx, event, metadata.num_delivered, error)
        except WAIT_AND_RETRY:
            await self._try_later(message, metadata.num_delivered)
        else:
            await message.ack()

    def _note_waiting(self, event: Event) -> None:
        if len(self._waiting) >= WAITING_KEYS_MAX:
            self._waiting.clear()  # only a hint: the worst is that an event is parked
        key = (event.bucket, event.aggregate)
        self._waiting[key] = min(event.event_no, self._waiting.get(key, event.event_no))

    def _is_foremost(self, event: Event) -> bool:
        """Whether no earlier event of the aggregate is being tried again in this process."""
        key = (event.bucket, event.aggregate)
        return self._waiting.get(key, event.event_no) >= event.event_no

    def _forget_waiting(self, event: Event) -> None:
        key = (event.bucket, event.aggregate)
        if self._waiting.get(key, 0) == event.event_no:
            del self._waiting[key]

    async def _apply(self, event: Event, *, accepts_gap: bool) -> None:
        async with self._shards.bucket(event.bucket).transaction() as tx:
            if not await self._note(tx, event):
                return
            if not await self._is_next(tx, event, accepts_gap=accepts_gap):
                return
            if event.type in self._wanted:
                await self._subscription.handle(tx, event)
            BEFORE_COMMIT.visit()

    async def _note(self, tx: Transaction, event: Event) -> bool:
        """Whether this consumer meets the event for the first time."""
        at_us = to_us(self._clock.now())
        consumer = self._subscription.consumer
        return bool(await tx.execute(INSERT_INBOX, event.bucket, consumer, event.id, at_us))

    async def _is_next(self, tx: Transaction, event: Event, *, accepts_gap: bool) -> bool:
        """Whether to apply it; moves the aggregate's position on.

        Raises:
            EventGap: a predecessor is missing. The transaction must roll back, or the
                inbox row would swallow this event for ever.
        """
        if not self._subscription.is_ordered or event.is_hop:
            return True
        key = (event.bucket, self._subscription.consumer, event.aggregate)
        row = await tx.fetch_one(SELECT_POSITION, *key)
        seen = None if row is None else int(row["event_no"])
        verdict = rules.verdict_of(seen, event.event_no)
        if verdict is Verdict.STALE:
            await self._insert_dead_letter(tx, event, 1, f"came after event {seen} was applied")
            return False
        if verdict is Verdict.GAP:
            gap = EventGap(event.aggregate, seen, event.event_no)
            if not accepts_gap:
                raise gap
            # The predecessor is neither coming nor buried: the stream lost it, or this
            # consumer is younger than the stream's memory. Go on, and say so.
            _log.error("bus.gap_accepted", event_id=str(event.id), gap=str(gap))
        await tx.execute(ADVANCE_POSITION, *key, event.event_no)
        return True

    async def _bury(self, event: Event, tries: int, error: str) -> None:
        """Move the event to the dead letters, once; its aggregate goes on without it."""
        async with self._shards.bucket(event.bucket).transaction() as tx:
            if not await self._note(tx, event):
                return
            await self._insert_dead_letter(tx, event, tries, error)
            if self._subscription.is_ordered and not event.is_hop:
                key = (event.bucket, self._subscription.consumer, event.aggregate)
                await tx.execute(ADVANCE_POSITION, *key, event.event_no)

    async def _insert_dead_letter(
        self, tx: Transaction, event: Event, tries: int, error: str
    ) -> None:
        consumer = self._subscription.consumer
        await tx.execute(
            INSERT_DEAD_LETTER,
            event.bucket,
            rules.dead_letter_id(event.bucket, consumer, event.id),
            consumer,
            event.subject,
            json.dumps(dict(event.headers)),
            event.payload,
            error[:ERROR_CHARACTERS_MAX],
            tries,
            to_us(self._clock.now()),
        )

    async def _try_later(self, message: Msg, deliveries: int) -> None:
        spread = random.uniform(-1, 1)  # noqa: S311 -- jitter, no secret
        await message.nak(delay=rules.backoff_s(deliveries, spread=spread))

    async def _hold(self, message: Msg) -> None:
        """Keep the message in hand while a part is down: each delivery is counted, time is not."""
        await asyncio.sleep(min(HOLD_PAUSE_S, self._subscription.ack_wait_s / 3))
        await message.in_progress()

    def given_up(self, source: str, durable: str) -> Pull:
        """What brings the server's notices that it gave up a message of ours.

        Our own rules end earlier, so this finds only what they could not reach: a worker
        that was killed at every single delivery.
        """
        stream = rules.event_stream(source)
        return Pull(
            stream=ADVISORY_STREAM,
            consumer=consumer_definition(
                f"{stream}-{durable}",
                subject=f"{ADVISORY_SUBJECT}.{stream}.{durable}",
                ack_wait_s=rules.ACK_WAIT_S,
                max_deliver=-1,
                max_ack_pending=LANE_COUNT,
            ),
            prepare=lambda: self._bus.ensure_readable(source),
            slots=Slots(LANE_COUNT),
            accept=self._advisories.put_nowait,
        )

    async def run_given_up(self) -> None:
        """Bury what the server gave up."""
        while True:
            checkpoint()
            advisory = await self._advisories.get()
            try:
                await self._bury_given_up(json.loads(advisory.data))
                await advisory.ack()
            except (*WAIT_AND_RETRY, nats.errors.Error, OSError, MalformedEvent) as error:
                _log.warning("bus.advisory_failed", error=repr(error))
                with suppress(nats.errors.Error, OSError):
                    await self._try_later(advisory, advisory.metadata.num_delivered)

    async def _bury_given_up(self, advisory: Mapping[str, object]) -> None:
        stream, sequence = str(advisory["stream"]), int(str(advisory["stream_seq"]))
        stored = await self._bus.stored_message(stream, sequence)
        if stored is not None:
            event = event_of(str(stored.subject), stored.headers or {}, stored.data or b"")
            _log.error("bus.given_up", event_id=str(event.id))
            await self._bury(event, int(str(advisory["deliveries"])), "given up by the server")

    async def give_back(self) -> None:
        """Hand unstarted messages to other workers now rather than after ack_wait."""
        with suppress(TimeoutError, nats.errors.Error, OSError):
            async with asyncio.timeout(GIVE_BACK_S):
                for lane in self.lanes:
                    while not lane.empty():
                        await lane.get_nowait().nak()


def _checked_bucket(subject: str) -> int:
    bucket = rules.bucket_of_subject(subject)
    if not 0 <= bucket < BUCKET_COUNT:
        raise ValueError(f"there is no bucket {bucket}")
    return bucket


def _bucket_or_first(subject: str) -> int:
    try:
        return _checked_bucket(subject)
    except ValueError:
        return 0


async def redrive(shards: Shards, subscription: Subscription, *, bucket: int, letter: UUID) -> bool:
    """Apply a dead letter again, and remove it in the same transaction.

    Returns:
        False if this subscription has no such letter.

    Raises:
        Exception: whatever the handler raises; the letter then stays.
    """
    async with shards.bucket(bucket).transaction() as tx:
        row = await tx.fetch_one(SELECT_DEAD_LETTER, bucket, letter)
        if row is None or row["consumer"] != subscription.consumer:
            return False
        event = event_of(row["subject"], json.loads(row["headers"]), row["payload"])
        await subscription.handle(tx, event)
        await tx.execute(DELETE_DEAD_LETTER, bucket, letter)
    return True
