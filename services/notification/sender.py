"""Sends what is due by e-mail: at least once, and again only where nothing was heard.

One sender per shard and lease. It connects first, so that a mail server that is down
costs no delivery an attempt, and then takes one delivery at a time:

    claim (durable) → hand over → record (durable, with the event)

A process that dies in between leaves SENDING. The next holder of the lease repeats
such a delivery once under the same Message-ID, so at most one duplicate is seen, and
a receiver that looks can tell (K25). An answer that is lost on the wire is UNKNOWN at
once and never repeated: the mail server may well have taken the message.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import structlog

from services.notification.domain import Delivery, Outcome, Reply
from services.notification.lease import ShardLease
from services.notification.mail import Letter, MailRefused, Sender, check_address, compose
from services.notification.smtp import MailConnection, MailServerUnavailable
from services.notification.store import DeliveryStore
from services.notification.wake import InboxSignal, Waiter
from shared.bus.checkpoint import checkpoint
from shared.clock import Clock
from shared.crashpoints import CrashPoint
from shared.db.port import Shard
from shared.db.stock import StockExceeded
from shared.errors import Aborted, DeadlineExceeded, Overloaded, Unavailable

CLAIMED_NOT_SENT = CrashPoint(
    "notification.claimed_not_sent", "the attempt is durable, the mail server knows nothing"
)
SENT_NOT_RECORDED = CrashPoint(
    "notification.sent_not_recorded", "the mail server has answered, the row says SENDING"
)

# Messages per connection: servers close long-lived ones, and due rows are read again.
BATCH_COUNT_MAX = 50
ORPHAN_COUNT_MAX = 500
CONNECT_RETRY_FIRST_S = 0.5
CONNECT_RETRY_MAX_S = 30.0
RECORD_TRY_COUNT_MAX = 8
RECORD_RETRY_FIRST_S = 0.1
# A stop lets the message in hand be finished and recorded within this time.
STOP_GRACE_S = 5.0

_log = structlog.get_logger(__name__)
RETRYABLE = (Aborted, DeadlineExceeded, Overloaded, Unavailable)

T = TypeVar("T")
OpenMail = Callable[[], AbstractAsyncContextManager[MailConnection]]


@dataclass(frozen=True)
class SenderSettings:
    """How the sender behaves.

    Attributes:
        claim_s: how long an attempt may take before it counts as lost; longer than every
            time limit of one message together.
        poll_s: how soon work is found that nobody rang for.
    """

    sender: Sender
    claim_s: float
    poll_s: float


class MailSender:
    """Drains shards of due deliveries, each while it holds the shard's lease.

    Args:
        open_mail: opens one connection to the mail server.
    """

    def __init__(
        self,
        store: DeliveryStore,
        *,
        open_mail: OpenMail,
        settings: SenderSettings,
        signal: InboxSignal,
        clock: Clock,
    ) -> None:
        self._store = store
        self._open_mail = open_mail
        self._settings = settings
        self._signal = signal
        self._clock = clock

    async def run(self, shard: Shard) -> None:
        """Send what is due in this shard, whenever its lease can be had, until cancelled."""
        lease = ShardLease(shard, clock=self._clock)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(lease.run())
            tasks.create_task(self._run_leased(shard, lease))

    async def _run_leased(self, shard: Shard, lease: ShardLease) -> None:
        retry_s = CONNECT_RETRY_FIRST_S
        with self._signal.sending() as waiter:
            while True:
                checkpoint()
                try:
                    if await self._has_work(shard, lease.holder):
                        await self._work(shard, lease, waiter)
                    retry_s = CONNECT_RETRY_FIRST_S
                    await waiter.wait(self._settings.poll_s)
                except (MailServerUnavailable, *RETRYABLE) as error:
                    _log.warning("mail.waiting", shard=shard.index, reason=str(error))
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, CONNECT_RETRY_MAX_S)

    async def _has_work(self, shard: Shard, holder: UUID) -> bool:
        now = self._clock.now()
        return bool(
            await self._store.list_due(shard, now=now, limit=1)
            or await self._store.list_orphaned(shard, holder=holder, limit=1)
        )

    async def _work(self, shard: Shard, lease: ShardLease, waiter: Waiter) -> None:
        lease.is_wanted.set()
        try:
            await lease.wait_held()
            # Nobody else is sending now: what others began and did not end is nobody's.
            await self.adopt_orphans(shard, lease.holder)
            while lease.is_held and await self.send_due(shard, lease.holder):
                waiter.calm()
        finally:
            lease.is_wanted.clear()

    async def adopt_orphans(self, shard: Shard, holder: UUID) -> None:
        """Make what an earlier holder left in SENDING due now, not when its time ends."""
        now = self._clock.now()
        for delivery in await self._store.list_orphaned(
            shard, holder=holder, limit=ORPHAN_COUNT_MAX
        ):
            await self._store.update(delivery, delivery.orphaned(now=now), now=now)

    async def send_due(self, shard: Shard, holder: UUID) -> int:
        """Send one batch over one connection; the number of deliveries that were due.

        Raises:
            MailServerUnavailable: the connection failed; what is left stays due.
        """
        due = await self._store.list_due(shard, now=self._clock.now(), limit=BATCH_COUNT_MAX)
        sendable = [
            (delivery, letter) for delivery in due if (letter := await self._letter(delivery))
        ]
        if not sendable:
            return len(due)
        async with self._open_mail() as connection:
            for delivery, letter in sendable:
                checkpoint()
                await connection.prepare()
                await to_its_end(self._send(connection, delivery, letter, holder))
        return len(due)

    async def _letter(self, delivery: Delivery) -> Letter | None:
        letter = await self._store.get_letter(delivery)
        if letter is None:
            now = self._clock.now()
            await self._store.update(delivery, delivery.wait_for_contact(now=now), now=now)
        return letter

    async def _send(
        self, connection: MailConnection, delivery: Delivery, letter: Letter, holder: UUID
    ) -> None:
        now = self._clock.now()
        decided = delivery.claim(holder, now=now, claim_s=self._settings.claim_s)
        try:
            claimed = await self._store.update(delivery, decided, now=now)
        except StockExceeded as error:
            _log.info("mail.postponed", delivery=str(delivery.delivery_id), reason=error.message)
            await self._store.update(delivery, delivery.wait_for_tomorrow(now=now), now=now)
            return
        if claimed is None or claimed.state.is_final:
            return
        CLAIMED_NOT_SENT.visit()
        outcome = await self._hand_over(connection, letter)
        SENT_NOT_RECORDED.visit()
        await self._record(claimed, outcome)

    async def _hand_over(self, connection: MailConnection, letter: Letter) -> Outcome:
        sender = self._settings.sender
        try:
            recipient, message = check_address(letter.address), compose(letter, sender)
        except MailRefused as error:
            return Outcome(Reply.REFUSED, error.reason)
        return await connection.send(sender.address, recipient, message)

    async def _record(self, claimed: Delivery, outcome: Outcome) -> None:
        """Store what became of it; the message is out, so a busy shard is asked again."""
        retry_s = RECORD_RETRY_FIRST_S
        jitter = random.uniform(-1, 1)  # noqa: S311 # spreads retries, guards nothing
        for tries_left in reversed(range(RECORD_TRY_COUNT_MAX)):
            now = self._clock.now()
            after = claimed.conclude(outcome, now=now, jitter=jitter)
            try:
                if await self._store.update(claimed, after, now=now) is None:
                    # Only a holder that outlived its lease gets here; its successor decided.
                    _log.warning("mail.superseded", delivery=str(claimed.delivery_id))
                return
            except RETRYABLE:
                if not tries_left:
                    raise
            await asyncio.sleep(retry_s)
            retry_s *= 2


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Run work that must not be cut in the middle: a cancellation waits STOP_GRACE_S for it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait([task], timeout=STOP_GRACE_S)
            task.cancel()
            await asyncio.wait([task])
        raise
