"""Publish and consume on NATS JetStream: one connection, the streams, their consumers.

The connection never gives up; while it is down nothing is kept in this process: a
publish fails at once and its outbox row stays unsent. A publish without an answer is
unknown, never lost or sent for sure: it is repeated under the same message id, which
the stream refuses as a duplicate for two minutes and consumers for ever.

A stream has one owner, the service in its name. The owner creates it and corrects it
when it differs; readers create a missing one from the same definition and otherwise
leave it alone, so that the order in which services start does not matter.

Durability on one node needs the server's own setting `sync_interval: always` (deploy);
without it a power cut can take the last seconds of a stream, which the relay then fills
again from the outbox (shared/bus/outbox.py).
"""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import nats.errors
import structlog
from nats.aio.client import Client, Server
from nats.aio.subscription import Subscription as NatsSubscription
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    PubAck,
    RawStreamMsg,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
)
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError

from shared.bus.rules import dead_stream, event_stream, work_stream
from shared.errors import Unavailable

CONNECT_FIRST_S = 3.0
"""How long open_bus waits for the first connection before it goes on without one."""

CONNECT_S = 2
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.1, 0.5
PING_INTERVAL_S = 5
CLOSE_S = 5.0
API_S = 5.0
PUBLISH_S = 5.0
EVENT_AGE_S = 72 * 3600.0
ADVISORY_AGE_S = 7 * 24 * 3600.0
DUPLICATE_WINDOW_S = 120.0
"""Each remembered id costs the server memory, so this is minutes, never hours; a later
duplicate meets the consumer's inbox."""

ADVISORY_STREAM = "ADV_max_deliveries"
ADVISORY_SUBJECT = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"

_log = structlog.get_logger(__name__)


class BusUnavailable(Unavailable):
    """The bus does not answer; a publish may or may not have happened."""


class StreamMissing(BusUnavailable):
    """No stream takes this subject: it was never made, or the server lost it."""


class BusClosed(Exception):
    """The connection was closed for good; the process must end and be started again."""


def stream_definitions(service: str, *, replicas: int = 1) -> tuple[StreamConfig, ...]:
    """The streams of one service, as owner and readers alike create them.

    Events are kept 72 hours for every consumer; jobs until one worker has acked them;
    given-up jobs until an operator removes them.
    """
    common = StreamConfig(
        storage=StorageType.FILE,
        num_replicas=replicas,
        duplicate_window=DUPLICATE_WINDOW_S,
        retention=RetentionPolicy.LIMITS,
        max_age=0.0,
    )
    return (
        replace(
            common,
            name=event_stream(service),
            subjects=[f"evt.{service}.>"],
            max_age=EVENT_AGE_S,
        ),
        replace(
            common,
            name=work_stream(service),
            subjects=[f"wrk.{service}.>"],
            retention=RetentionPolicy.WORK_QUEUE,
        ),
        replace(common, name=dead_stream(service), subjects=[f"dlq.{service}.>"]),
    )


def advisory_definition(*, replicas: int = 1) -> StreamConfig:
    """The stream that keeps the server's notices of deliveries it gave up."""
    return StreamConfig(
        name=ADVISORY_STREAM,
        subjects=[f"{ADVISORY_SUBJECT}.>"],
        storage=StorageType.FILE,
        num_replicas=replicas,
        retention=RetentionPolicy.LIMITS,
        max_age=ADVISORY_AGE_S,
        duplicate_window=DUPLICATE_WINDOW_S,
    )


def drift_of(wanted: StreamConfig, actual: StreamConfig) -> list[str]:
    """The names of the fields that differ and matter."""
    names = ("subjects", "retention", "max_age", "duplicate_window", "storage", "num_replicas")
    return [name for name in names if getattr(wanted, name) != getattr(actual, name)]


class Bus:
    """One connection to NATS, shared by everything in the process."""

    def __init__(self, client: Client, *, replicas: int) -> None:
        self._client = client
        self._replicas = replicas
        self._is_settled = asyncio.Event()
        self._generation = 0
        self._is_closing = False
        self._jetstream = client.jetstream(timeout=API_S)

    @property
    def is_connected(self) -> bool:
        """Whether the server answers now; readiness shows it."""
        return self._client.is_connected and self._generation > 0

    @property
    def generation(self) -> int:
        """Raised by each (re)connection: what was set up under an older one may be gone."""
        return self._generation

    async def wait_connected(self) -> int:
        """Wait until there is a connection, and return its generation.

        Raises:
            BusClosed: there never will be one again.
        """
        while not self.is_connected:
            if self._client.is_closed and self._generation and not self._is_closing:
                raise BusClosed("the connection to NATS was closed")
            # A poll beside the event: is_connected also changes without a callback.
            with suppress(TimeoutError):
                async with asyncio.timeout(RECONNECT_MAX_S):
                    await self._is_settled.wait()
                await asyncio.sleep(0 if self.is_connected else RECONNECT_MIN_S)
        return self._generation

    async def publish(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str],
        *,
        timeout_s: float = PUBLISH_S,
    ) -> PubAck:
        """Store one message in its stream, and say where.

        Raises:
            StreamMissing: no stream takes the subject; the message is not stored.
            BusUnavailable: no connection, no answer in time, or the server refused; the
                message may be stored.
        """
        if not self.is_connected:
            raise BusUnavailable("NATS is not connected")
        try:
            return await self.jetstream.publish(
                subject, payload, timeout=timeout_s, headers=dict(headers)
            )
        except NoStreamResponseError as error:
            raise StreamMissing(f"no stream takes {subject}") from error
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise BusUnavailable(f"{subject} was not acknowledged: {error}") from error

    @property
    def jetstream(self) -> JetStreamContext:
        """The JetStream context of this connection."""
        return self._jetstream

    async def subscribe(self, subject: str, *, pending_count_max: int) -> NatsSubscription:
        """A plain subscription; the caller unsubscribes it."""
        return await self._client.subscribe(subject, pending_msgs_limit=pending_count_max)

    async def send(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        """A plain publish: nothing says whether it arrived."""
        try:
            await self._client.publish(subject, payload, reply=reply)
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"{subject} could not be sent: {error}") from error

    def new_inbox(self) -> str:
        """A subject nobody else uses."""
        return self._client.new_inbox()

    async def ensure_streams(self, service: str) -> None:
        """Create this service's streams, and correct those that differ: for their owner.

        Raises:
            BusUnavailable: NATS does not answer, or refuses the change.
        """
        for wanted in stream_definitions(service, replicas=self._replicas):
            await self._ensure_stream(wanted, is_owner=True)
        await self._ensure_stream(advisory_definition(replicas=self._replicas), is_owner=False)

    async def ensure_readable(self, service: str) -> None:
        """Create another service's streams if they are missing; never change them.

        Raises:
            BusUnavailable: NATS does not answer.
        """
        for wanted in stream_definitions(service, replicas=self._replicas):
            await self._ensure_stream(wanted, is_owner=False)
        await self._ensure_stream(advisory_definition(replicas=self._replicas), is_owner=False)

    async def _ensure_stream(self, wanted: StreamConfig, *, is_owner: bool) -> None:
        try:
            info = await self.stream_info(str(wanted.name))
            if info is None:
                await self._create_stream(wanted)
            elif is_owner and (drift := drift_of(wanted, info.config)):
                _log.warning("bus.stream_corrected", stream=wanted.name, fields=drift)
                await self.jetstream.update_stream(wanted)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise BusUnavailable(f"stream {wanted.name}: {error}") from error

    async def _create_stream(self, wanted: StreamConfig) -> None:
        try:
            await self.jetstream.add_stream(wanted)
        except APIError:
            # Another process may have created it between the look and the leap.
            if await self.stream_info(str(wanted.name)) is None:
                raise

    async def stream_info(self, name: str) -> StreamInfo | None:
        """What the server knows of a stream; None if there is none.

        Raises:
            BusUnavailable: NATS does not answer.
        """
        try:
            return await self.jetstream.stream_info(name)
        except NotFoundError:
            return None
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise BusUnavailable(f"stream {name}: {error}") from error

    async def ensure_consumer(self, stream: str, wanted: ConsumerConfig) -> None:
        """Create a durable consumer, or bring an existing one to this configuration.

        `pull_subscribe` leaves an existing durable as it is, so a new ack_wait or limit
        would silently never apply; this compares and updates.

        Raises:
            BusUnavailable: NATS does not answer, or refuses the change.
        """
        try:
            await self.jetstream.add_consumer(stream, wanted, timeout=API_S)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise BusUnavailable(f"consumer {wanted.durable_name}: {error}") from error

    async def stored_message(self, stream: str, sequence: int) -> RawStreamMsg | None:
        """A message by its stream sequence; None if the stream no longer has it."""
        try:
            return await self.jetstream.get_msg(stream, sequence)
        except NotFoundError:
            return None
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise BusUnavailable(f"{stream} {sequence}: {error}") from error

    async def _connected(self) -> None:
        self._generation += 1
        self._is_settled.set()
        _log.info("bus.connected", generation=self._generation)

    async def _disconnected(self) -> None:
        self._is_settled.clear()
        if not self._is_closing:
            _log.warning("bus.disconnected")

    async def _closed(self) -> None:
        self._is_settled.set()

    async def _connect(self, url: str, name: str) -> None:
        await self._client.connect(
            url.split(","),
            name=name,
            connect_timeout=CONNECT_S,
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            reconnect_to_server_handler=_next_server,
            ping_interval=PING_INTERVAL_S,
            # No buffer while disconnected: a late event would overtake its successors.
            pending_size=0,
            error_cb=_on_error,
            disconnected_cb=self._disconnected,
            reconnected_cb=self._connected,
            closed_cb=self._closed,
        )
        await self._connected()

    async def _close(self) -> None:
        self._is_closing = True
        if self._generation:
            with suppress(TimeoutError, OSError, nats.errors.Error):
                async with asyncio.timeout(CLOSE_S):
                    await self._client.close()


def _next_server(servers: list[Server], _info: object) -> tuple[Server, float]:
    """Any server, after a random pause: many clients must not return in step."""
    pause_s = random.uniform(RECONNECT_MIN_S, RECONNECT_MAX_S)  # noqa: S311 -- no secret
    return random.choice(servers), pause_s  # noqa: S311


async def _on_error(error: Exception) -> None:
    _log.debug("bus.error", error=repr(error))


def consumer_definition(
    durable: str,
    *,
    subject: str,
    ack_wait_s: float,
    max_deliver: int,
    max_ack_pending: int,
) -> ConsumerConfig:
    """A durable pull consumer with explicit acks. One filter each: older servers know no more."""
    return ConsumerConfig(
        name=durable,
        durable_name=durable,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait_s,
        max_deliver=max_deliver,
        max_ack_pending=max_ack_pending,
        filter_subject=subject,
    )


@asynccontextmanager
async def open_bus(url: str, *, name: str, replicas: int = 1) -> AsyncIterator[Bus]:
    """Connect to NATS and stay connected, for ever.

    If the server does not answer yet, this goes on without it after three seconds: a
    process serves what needs no bus, and its events wait in the outbox.

    Args:
        url: one or more "nats://host:port", comma-separated.
        name: shown in the server's connection list.
        replicas: copies of each stream; 3 on a cluster.
    """
    bus = Bus(Client(), replicas=replicas)
    connecting = asyncio.create_task(bus._connect(url, name), name="bus.connect")
    try:
        await asyncio.wait({connecting}, timeout=CONNECT_FIRST_S)
        if connecting.done():
            connecting.result()
        yield bus
    finally:
        connecting.cancel()
        await asyncio.wait({connecting}, timeout=CLOSE_S)
        await bus._close()
