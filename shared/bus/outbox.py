"""Publishes what transactions left in the outbox: at least once, in order per aggregate.

The outbox is read as a set, every row that is not marked sent, and never as a cursor:
sequence numbers are taken before a commit and become visible out of order, so "everything
after the last one seen" loses events. A row that shows up late is simply published later.

One event of an aggregate is in flight at a time, many aggregates side by side. A failure
holds back its own aggregate and nothing else. A row is marked after the stream's answer;
a relay killed in between publishes again, under the same message id.

One relay per shard holds a lease. A relay that lost it without noticing (frozen, then
woken) can only publish duplicates, which the stream and the consumers' inboxes drop.

A bucket on its way to another shard is relayed where it may be written: what was published
and could not be marked before it left is published again from there, and dropped as above.

The broker may forget: rows stay for a while after they were sent, each with the stream
(and its birth) that took it and its sequence there. When a stream was made anew, or ends
before a row's sequence, the row is published again.
"""

import asyncio
import json
import os
import random
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from shared.bus import rules
from shared.bus.checkpoint import checkpoint
from shared.bus.jetstream import Bus, StreamMissing
from shared.clock import Clock, of_us, to_us
from shared.crashpoints import CrashPoint
from shared.db.growing import run_on_each
from shared.db.port import Row, Shard, Shards
from shared.errors import TenfoldError

PAGE_ROWS = 200
PARALLEL_KEYS_MAX = 64
POLL_MIN_S, POLL_MAX_S = 0.05, 0.5
LEASE_S = 3.0
"""A killed relay's successor waits this long, so it is well below the five seconds in
which events must flow again after a restart."""

LEASE_NAME = "relay"
RELEASE_S = 1.0
LOOK_S = 5.0
"""How often the streams' birth is compared: a stream made anew is empty."""

SWEEP_S = 60.0
SENT_KEPT_S = 15 * 60.0
"""How long the broker may have forgotten without a loss: many times its sync interval."""

INBOX_KEPT_S = 7 * 24 * 3600.0
"""Longer than any stream keeps a message, so that a replay is always recognised."""

SWEEP_ROWS = 500

PUBLISHED_NOT_MARKED = CrashPoint(
    "relay.published_not_marked", "the stream has the events, the outbox says unsent"
)

SELECT_UNSENT = f"""
SELECT seq, bucket, event_id, aggregate, event_no, subject, headers, payload, tenant,
       created_at_us
FROM outbox WHERE sent = 0 AND seq > $1 AND tenfold_writable(bucket) ORDER BY seq LIMIT {PAGE_ROWS}
"""  # noqa: S608 -- a constant of ours
TAKE_LEASE = """
INSERT INTO tenfold_lease (name, holder, token, expires_at_us) VALUES ($1, $2, 1, $3)
ON CONFLICT (name) DO UPDATE
SET holder = excluded.holder, token = tenfold_lease.token + 1,
    expires_at_us = excluded.expires_at_us
WHERE tenfold_lease.holder = excluded.holder OR tenfold_lease.expires_at_us < $4
"""
RELEASE_LEASE = "UPDATE tenfold_lease SET expires_at_us = 0 WHERE name = $1 AND holder = $2"
MARK_SENT = """
UPDATE outbox SET sent = 1, ack_stream = $1, ack_seq = acked.column2
FROM (VALUES {}) AS acked WHERE outbox.seq = acked.column1 AND tenfold_writable(outbox.bucket)
"""
MARK_UNSENT = "UPDATE outbox SET sent = 0 WHERE seq IN ({}) AND tenfold_writable(bucket)"
DELETE_SENT = """
DELETE FROM outbox WHERE sent = 1 AND seq IN ({}) AND tenfold_writable(bucket)
"""
SELECT_FORGOTTEN = f"""
SELECT seq FROM outbox
WHERE sent = 1 AND ack_stream >= $1 AND ack_stream < $2 AND (ack_stream <> $3 OR ack_seq > $4)
    AND tenfold_writable(bucket)
ORDER BY seq LIMIT {SWEEP_ROWS}
"""  # noqa: S608
SELECT_OLD_SENT = f"""
SELECT seq FROM outbox
WHERE sent = 1 AND created_at_us < $1 AND tenfold_writable(bucket) LIMIT {SWEEP_ROWS}
"""  # noqa: S608
SELECT_OLD_INBOX = f"""
SELECT bucket, consumer, msg_id FROM inbox
WHERE at_us < $1 AND tenfold_writable(bucket) LIMIT {SWEEP_ROWS}
"""  # noqa: S608
DELETE_INBOX = """
DELETE FROM inbox
WHERE bucket = $1 AND consumer = $2 AND msg_id = $3 AND tenfold_writable(bucket)
"""

Key = tuple[int, str]
"""(bucket, what the row is numbered under): what keeps its order."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Sent:
    seq: int
    ack_stream: str
    ack_seq: int


async def run_relay(shards: Shards, bus: Bus, *, service: str, clock: Clock) -> None:
    """Publish this service's outbox until cancelled; owns the service's streams.

    Raises:
        BusClosed: the connection will never come back.
    """
    streams = _Streams(bus, service)
    relays: list[_ShardRelay] = []

    async def relay_shard(shard: Shard) -> None:
        relay = _ShardRelay(shard, bus, streams, clock)
        relays.append(relay)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(relay.run())
            tasks.create_task(relay.run_sweep())

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(streams.run())
            tasks.create_task(_run_wake(shards, relays))
            tasks.create_task(run_on_each(shards, relay_shard))
    finally:
        for relay in relays:
            await relay.release()


async def _run_wake(shards: Shards, relays: Sequence["_ShardRelay"]) -> None:
    """The shards have one signal for all; each relay has its own."""
    while True:
        if await shards.wait_for_outbox(POLL_MAX_S):
            for relay in relays:
                relay.wake.set()


class _Streams:
    """The service's own streams: made and corrected after each connection, and when missing.

    Attributes:
        epoch: raised by each look; what the broker may have forgotten is sought once in
            each, before anything new is published.
        ends: stream name -> (its name and birth, its last sequence), as of that look.
    """

    def __init__(self, bus: Bus, service: str) -> None:
        self._bus = bus
        self._service = service
        self._is_ready = asyncio.Event()
        self._is_wanted = asyncio.Event()
        self.epoch = 0
        self.ends: dict[str, tuple[str, int]] = {}

    async def run(self) -> None:
        """Keep the streams until cancelled."""
        while True:
            checkpoint()
            generation = await self._bus.wait_connected()
            self._is_wanted.clear()
            try:
                await self._prepare()
                while not await self._is_outdated(generation):
                    checkpoint()
            except TenfoldError as error:
                _log.warning("relay.streams", service=self._service, error=str(error))
                await asyncio.sleep(random.uniform(0.1, 0.5))  # noqa: S311 -- jitter
            self._is_ready.clear()

    async def _prepare(self) -> None:
        await self._bus.ensure_streams(self._service)
        self.ends = await self._look()
        self.epoch += 1
        self._is_ready.set()

    async def _is_outdated(self, generation: int) -> bool:
        """Waits a while, then says whether the streams may be other ones now."""
        deadline_s = asyncio.get_running_loop().time() + LOOK_S
        while asyncio.get_running_loop().time() < deadline_s:
            if generation != self._bus.generation or not self._bus.is_connected:
                return True
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_MAX_S):
                    await self._is_wanted.wait()
                return True
        births = {name: birth for name, (birth, _) in (await self._look()).items()}
        return births != {name: birth for name, (birth, _) in self.ends.items()}

    async def _look(self) -> dict[str, tuple[str, int]]:
        ends = {}
        for name in (rules.event_stream(self._service), rules.work_stream(self._service)):
            info = await self._bus.stream_info(name)
            if info is not None:
                ends[name] = (f"{name}@{info.created}", int(info.state.last_seq))
        return ends

    def stamp(self, stream: str) -> str:
        """The stream's name with its birth: what a row remembers."""
        return self.ends[stream][0] if stream in self.ends else stream

    def missing(self) -> None:
        """Somebody was told that a stream is not there."""
        self._is_ready.clear()
        self._is_wanted.set()

    async def wait_ready(self) -> int:
        """The epoch, once the streams are there."""
        await self._is_ready.wait()
        return self.epoch


class _ShardRelay:
    """The relay of one shard."""

    def __init__(self, shard: Shard, bus: Bus, streams: _Streams, clock: Clock) -> None:
        self._shard = shard
        self._bus = bus
        self._streams = streams
        self._clock = clock
        self._holder = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._leased_until_us = 0
        self._repaired_epoch = 0
        self._parallel = asyncio.Semaphore(PARALLEL_KEYS_MAX)
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Publish until cancelled; a failing shard is tried again, the others do not notice."""
        poll_s = POLL_MIN_S
        while True:
            checkpoint()
            self.wake.clear()
            try:
                epoch = await self._streams.wait_ready()
                if epoch != self._repaired_epoch:
                    await self._republish_forgotten()
                    self._repaired_epoch = epoch
                is_done = await self._publish_all()
            except TenfoldError as error:
                _log.warning("relay.failed", shard=self._shard.index, error=str(error))
                is_done = True
            poll_s = min(poll_s * 2, POLL_MAX_S) if is_done else POLL_MIN_S
            if is_done:
                with suppress(TimeoutError):
                    async with asyncio.timeout(poll_s):
                        await self.wake.wait()

    async def _publish_all(self) -> bool:
        """One pass over the unsent set. True if nothing more can be sent now."""
        held_back: set[Key] = set()
        floor, sent_count = -1, 0
        while rows := await self._shard.fetch_all(SELECT_UNSENT, floor):
            if not await self._hold_lease():
                return True
            sent = await self._publish_page(rows, held_back)
            if sent:
                PUBLISHED_NOT_MARKED.visit()
                await self._mark(sent)
            sent_count += len(sent)
            floor = int(rows[-1]["seq"])
            if len(rows) < PAGE_ROWS:
                break
        return sent_count == 0

    async def _publish_page(self, rows: Sequence[Row], held_back: set[Key]) -> list[_Sent]:
        by_key: dict[Key, list[Row]] = defaultdict(list)
        for row in rows:
            by_key[int(row["bucket"]), str(row["aggregate"])].append(row)
        sent: list[_Sent] = []
        async with asyncio.TaskGroup() as tasks:
            for key, events in by_key.items():
                if key not in held_back:
                    tasks.create_task(self._publish_key(key, events, sent, held_back))
        return sent

    async def _publish_key(
        self, key: Key, rows: Sequence[Row], sent: list[_Sent], held_back: set[Key]
    ) -> None:
        """One aggregate's events, each after the answer to the one before."""
        async with self._parallel:
            for row in rows:
                checkpoint()
                try:
                    sent.append(await self._publish(row))
                except TenfoldError as error:
                    held_back.add(key)
                    if isinstance(error, StreamMissing):
                        self._streams.missing()
                    _log.warning("relay.held_back", aggregate=key[1], error=str(error))
                    return

    async def _publish(self, row: Row) -> _Sent:
        ack = await self._bus.publish(str(row["subject"]), bytes(row["payload"]), headers_of(row))
        return _Sent(int(row["seq"]), self._streams.stamp(ack.stream), ack.seq)

    async def _mark(self, sent: Sequence[_Sent]) -> None:
        """One statement per stream. The numbers are ours, so they may stand in the text."""
        by_stream: dict[str, list[str]] = defaultdict(list)
        for one in sent:
            by_stream[one.ack_stream].append(f"({one.seq}, {one.ack_seq})")
        async with self._shard.transaction() as tx:
            for stream, values in by_stream.items():
                await tx.execute(MARK_SENT.format(", ".join(values)), stream)

    async def _hold_lease(self) -> bool:
        """Whether this process relays this shard now. Written only while there is work."""
        now_us = to_us(self._clock.now())
        if self._leased_until_us - now_us > LEASE_S / 2 * 1e6:
            return True
        until_us = now_us + int(LEASE_S * 1e6)
        async with self._shard.transaction() as tx:
            is_ours = await tx.execute(TAKE_LEASE, LEASE_NAME, self._holder, until_us, now_us)
        self._leased_until_us = until_us if is_ours else 0
        return bool(is_ours)

    async def release(self) -> None:
        """Let a successor start at once; without it the lease runs out by itself."""
        if not self._leased_until_us:
            return
        with suppress(TenfoldError, TimeoutError):
            async with asyncio.timeout(RELEASE_S), self._shard.transaction() as tx:
                await tx.execute(RELEASE_LEASE, LEASE_NAME, self._holder)

    async def _republish_forgotten(self) -> None:
        """Publish again what the broker acknowledged and does not have any more."""
        for name, (stamp, last_seq) in self._streams.ends.items():
            while rows := await self._shard.fetch_all(
                SELECT_FORGOTTEN, f"{name}@", f"{name}A", stamp, last_seq
            ):
                _log.error("relay.broker_forgot", stream=name, events=len(rows))
                await self._for_rows(rows, MARK_UNSENT)

    async def run_sweep(self) -> None:
        """Remove what nobody needs any more, until cancelled."""
        while True:
            await self._until_repaired()
            try:
                await self._sweep()
            except TenfoldError as error:
                _log.warning("relay.sweep", shard=self._shard.index, error=str(error))
            await asyncio.sleep(SWEEP_S)

    async def _until_repaired(self) -> None:
        """Sent rows are what the broker is repaired from: none goes while it may lack some.

        However old they are: the mesh, or the broker, may have been down for a day.
        """
        while self._repaired_epoch != await self._streams.wait_ready():  # noqa: ASYNC110
            await asyncio.sleep(POLL_MAX_S)

    async def _sweep(self) -> None:
        now_us = to_us(self._clock.now())
        old_us = now_us - int(SENT_KEPT_S * 1e6)
        while rows := await self._shard.fetch_all(SELECT_OLD_SENT, old_us):
            await self._for_rows(rows, DELETE_SENT)
        while rows := await self._shard.fetch_all(
            SELECT_OLD_INBOX, now_us - int(INBOX_KEPT_S * 1e6)
        ):
            async with self._shard.transaction() as tx:
                for row in rows:
                    await tx.execute(DELETE_INBOX, row["bucket"], row["consumer"], row["msg_id"])

    async def _for_rows(self, rows: Sequence[Row], statement: str) -> None:
        numbers = ", ".join(str(int(row["seq"])) for row in rows)
        async with self._shard.transaction() as tx:
            await tx.execute(statement.format(numbers))


def headers_of(row: Mapping[str, object]) -> dict[str, str]:
    """What travels beside an event's payload.

    The aggregate's name is in the row's headers: jobs and hops are numbered under another.
    """
    extra: dict[str, str] = json.loads(str(row["headers"]))
    return {
        rules.AGGREGATE: str(row["aggregate"]),
        **extra,
        rules.MESSAGE_ID: str(row["event_id"]),
        rules.EVENT_NO: str(row["event_no"]),
        rules.SOURCE_BUCKET: str(row["bucket"]),
        rules.TENANT: str(row["tenant"]),
        rules.TIME: of_us(int(str(row["created_at_us"]))).isoformat(),
    }
