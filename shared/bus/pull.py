"""A durable pull consumer that survives what a client library forgets.

One pull request is outstanding at a time, for as many messages as there are free
slots; messages are handed on as they come. The server's heartbeat says that the
request is alive: silence means that it was lost (a server restart forgets requests),
and everything is set up again, streams and consumer included.
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.js.api import ConsumerConfig

from shared.bus.checkpoint import checkpoint
from shared.bus.jetstream import Bus
from shared.errors import Unavailable

REQUEST_S = 5.0
HEARTBEAT_S = 1.0
SILENCE_S = 2.5
"""Two heartbeats missed: the request is lost."""

PENDING_COUNT_MAX = 2048
PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 0.5

_log = structlog.get_logger(__name__)


class Slots:
    """How many messages may be in hand at once."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._changed = asyncio.Event()

    def take(self) -> None:
        """One more in hand. May go below zero when an old request answers late."""
        self._free -= 1

    def give_back(self) -> None:
        """One fewer in hand."""
        self._free += 1
        self._changed.set()

    async def wait_free(self) -> int:
        """The number of free slots, once there is one."""
        while self._free < 1:
            self._changed.clear()
            await self._changed.wait()
        return self._free


@dataclass(frozen=True)
class Pull:
    """What to pull, and who takes it.

    Attributes:
        stream: the stream's name.
        consumer: the durable consumer's configuration.
        prepare: makes sure the stream exists; called before the consumer is made.
        slots: bounds the messages in hand; `accept` takes one slot per message.
        accept: receives each message; must not block.
        has_ended: set when nothing is pulled any more. A message is given back after it,
            or the server would hand it to the request that is just being taken back.
    """

    stream: str
    consumer: ConsumerConfig
    prepare: Callable[[], Awaitable[None]]
    slots: Slots
    accept: Callable[[Msg], None]
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)


async def run_pull(bus: Bus, pull: Pull) -> None:
    """Hand on messages until cancelled.

    Raises:
        BusClosed: the connection will never come back.
    """
    try:
        await _run_pull(bus, pull)
    finally:
        pull.has_ended.set()


async def _run_pull(bus: Bus, pull: Pull) -> None:
    while True:
        checkpoint()
        generation = await bus.wait_connected()
        try:
            await pull.prepare()
            await bus.ensure_consumer(pull.stream, pull.consumer)
            await _pull_while_connected(bus, pull, generation)
        except (Unavailable, nats.errors.Error, OSError) as error:
            _log.warning("bus.pull_interrupted", consumer=pull.consumer.name, error=str(error))
        await asyncio.sleep(random.uniform(PAUSE_MIN_S, PAUSE_MAX_S))  # noqa: S311 -- jitter


async def _pull_while_connected(bus: Bus, pull: Pull, generation: int) -> None:
    """Until the connection or the consumer is gone: the subscription dies with it."""
    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox, pending_count_max=PENDING_COUNT_MAX)
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{pull.stream}.{pull.consumer.durable_name}"
    try:
        is_alive = True
        while is_alive and bus.generation == generation and bus.is_connected:
            checkpoint()
            batch = await pull.slots.wait_free()
            await bus.send(subject, _request(batch), reply=inbox)
            is_alive = await _collect(subscription, pull, batch)
    finally:
        with suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()


def _request(batch: int) -> bytes:
    wanted = {
        "batch": batch,
        "expires": int(REQUEST_S * 1e9),
        "idle_heartbeat": int(HEARTBEAT_S * 1e9),
    }
    return json.dumps(wanted).encode()


async def _collect(subscription: NatsSubscription, pull: Pull, batch: int) -> bool:
    """Take one request's messages; False when it was lost or its consumer is gone."""
    while batch:
        checkpoint()
        try:
            message = await subscription.next_msg(timeout=SILENCE_S)
        except TimeoutError:
            return False
        status = (message.headers or {}).get("Status")
        if status is None:
            pull.slots.take()
            pull.accept(message)
            batch -= 1
        elif status in {"404", "408"}:  # the request ended, there was no more
            return True
        elif status != "100":  # 409 consumer deleted or leader moved; 503 nobody there
            return False
    return True
