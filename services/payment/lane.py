"""Batching lanes: one batch of orders at a time per shard, decided together, written together.

There is no timer. What arrives while a batch is on its way forms the next, so a lone order waits
for nobody and a crowd shares one commit. A hot account is read once and written in one go, however
many orders of a batch name it.

A caller that gives up leaves its orders in the batch: what was asked for may happen, as with any
call whose answer is not awaited. Orders are known by their ids, so a batch whose commit failed or
whose fate is unknown is decided again.
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from services.payment.journal import Journal, journal_of
from services.payment.posting import Answer, Order, Outcome, apply
from shared.clock import Clock, to_us
from shared.db.errors import ConstraintViolation
from shared.db.ids import bucket_of
from shared.db.limits import RETRY_AFTER_S
from shared.db.port import Shards, Transaction
from shared.errors import Aborted, FailedPrecondition, Overloaded, Unavailable

BATCH_ORDERS_MAX = 1024
WAITING_ORDERS_MAX = 16_384
# Of one batch, while its shard cannot be reached or another process is faster.
TRIES_MAX = 4
RETRY_PAUSE_S = 0.05
# Of one group, from shard to shard.
ROUTES_MAX = 4


class OnSeveralShards(FailedPrecondition):
    """These orders' accounts live on more than one shard."""

    def __init__(self) -> None:
        super().__init__("these accounts are kept in different places")


class _Rerouted(Exception):
    """The group's accounts have gone to another shard meanwhile."""


@dataclass(eq=False, slots=True)
class Group:
    """Orders that one caller waits for; never divided between two batches.

    Attributes:
        buckets: of all that they name.
        answers: resolved once, after the commit.
    """

    orders: Sequence[Order]
    buckets: frozenset[int]
    answers: "asyncio.Future[list[Answer]]" = field(default_factory=asyncio.Future)

    def refuse(self, error: BaseException) -> None:
        """Tell the caller, if it still waits."""
        if not self.answers.done():
            self.answers.set_exception(error)


class Lane:
    """One shard's batches, one after the other."""

    def __init__(self, shards: Shards, index: int, journal: Journal, clock: Clock) -> None:
        self._shards = shards
        self._index = index
        self._journal = journal
        self._clock = clock
        self._waiting: deque[Group] = deque()
        self._order_count = 0
        self._has_work = asyncio.Event()
        self.batch_count = 0

    async def submit(self, group: Group) -> list[Answer]:
        """Wait for the group's answers.

        Raises:
            Overloaded: too many wait already.
            Unavailable, Aborted: nothing is known to have happened; repeat with the same ids.
        """
        if self._order_count + len(group.orders) > WAITING_ORDERS_MAX:
            raise Overloaded("too many transfers are waiting", retry_after_s=RETRY_AFTER_S)
        self._waiting.append(group)
        self._order_count += len(group.orders)
        self._has_work.set()
        return await group.answers

    async def run(self) -> None:
        """Serve batches until cancelled; whoever waits then is told."""
        groups: list[Group] = []
        try:
            while True:
                await self._has_work.wait()
                groups = self._next_batch()
                await self._serve(groups)
        finally:
            closing = Unavailable("the ledger is closing", retry_after_s=RETRY_AFTER_S)
            for group in [*groups, *self._waiting]:
                group.refuse(closing)

    def _next_batch(self) -> list[Group]:
        groups, count = [], 0
        while self._waiting and count + len(self._waiting[0].orders) <= BATCH_ORDERS_MAX:
            groups.append(self._waiting.popleft())
            count += len(groups[-1].orders)
        self._order_count -= count
        if not self._waiting:
            self._has_work.clear()
        return groups

    async def _serve(self, groups: Sequence[Group]) -> None:
        """Decide these groups; if that fails for a reason of one of them, each half by itself."""
        here = [group for group in groups if self._is_here(group)]
        for group in groups:
            if group not in here:
                group.refuse(_Rerouted())
        if not here:
            return
        try:
            answers = await self._decide_again([order for group in here for order in group.orders])
        except Exception as error:  # the boundary: a batch's failure is its callers' answer
            if len(here) > 1 and not isinstance(error, Unavailable):
                middle = len(here) // 2
                await self._serve(here[:middle])
                await self._serve(here[middle:])
                return
            for group in here:
                group.refuse(error)
            return
        self._answer(here, answers)

    def _is_here(self, group: Group) -> bool:
        return all(self._shards.shard_index(bucket) == self._index for bucket in group.buckets)

    def _answer(self, groups: Sequence[Group], answers: Sequence[Answer]) -> None:
        at = 0
        for group in groups:
            count = len(group.orders)
            if not group.answers.done():
                group.answers.set_result(list(answers[at : at + count]))
            at += count

    async def _decide_again(self, orders: Sequence[Order]) -> list[Answer]:
        """Decide, and once more if the database could not or another process was faster."""
        for attempt in range(TRIES_MAX):
            try:
                return await self._decide(orders)
            except (Aborted, Unavailable, ConstraintViolation):
                if attempt == TRIES_MAX - 1:
                    raise
            await asyncio.sleep(RETRY_PAUSE_S * attempt * random.uniform(0.5, 1.5))  # noqa: S311
        raise AssertionError("the last try returns or raises")

    async def _decide(self, orders: Sequence[Order]) -> list[Answer]:
        async with self._deciding(orders, is_exclusive=True) as (tx, outcome):
            if outcome.records:
                await self._journal.write(tx, outcome)
        self.batch_count += 1
        return outcome.answers

    async def preview(self, orders: Sequence[Order]) -> list[Answer]:
        """What these orders would be answered now; nothing is written."""
        async with self._deciding(orders, is_exclusive=False) as (_, outcome):
            return outcome.answers

    @asynccontextmanager
    async def _deciding(
        self, orders: Sequence[Order], *, is_exclusive: bool
    ) -> AsyncIterator[tuple[Transaction, Outcome]]:
        journal, ids = self._journal, [order.order_id for order in orders]
        holds = {order.pending_id for order in orders if order.pending_id is not None}
        accounts = {entry.account_id for order in orders for entry in order.entries}
        accounts |= await self._accounts_of_holds(holds)
        buckets = {bucket_of(key) for key in [*ids, *holds, *accounts]}
        first = min(buckets)
        async with self._shards.bucket(first).transaction(also=buckets - {first}) as tx:
            if is_exclusive:
                await journal.begin(tx, buckets)
            standings = await journal.standings(tx, list(accounts)) if accounts else {}
            known = await journal.records(tx, [*ids, *holds])
            wanted = {
                (order.tenant, order.owner.id, order.reference)
                for order in orders
                if order.reference
            }
            references = await journal.references(tx, list(wanted)) if wanted else {}
            now_us = to_us(self._clock.now())
            yield tx, apply(standings, known, orders, now_us=now_us, references=references)

    async def _accounts_of_holds(self, holds: set[UUID]) -> set[UUID]:
        """What holds name never changes, so it may be read before the transaction."""
        accounts: set[UUID] = set()
        for hold in holds:
            accounts |= await self._journal.accounts_of(self._shards.holding(hold), hold)
        return accounts


class Lanes:
    """Every shard's lane."""

    def __init__(self, shards: Shards, clock: Clock, tasks: asyncio.TaskGroup) -> None:
        journal = journal_of(shards.engine)
        self._shards = shards
        self._tasks = tasks
        self._running: list[asyncio.Task[None]] = []
        self._make = partial(Lane, shards, journal=journal, clock=clock)
        self.lanes: list[Lane] = []
        self._open(len(shards.all()))

    async def submit(self, orders: Sequence[Order]) -> list[Answer]:
        """Have these orders decided in one batch, in their order.

        Args:
            orders: 1 to BATCH_ORDERS_MAX, with accounts of one shard.

        Raises:
            OnSeveralShards: they are on more than one.
            Overloaded, Unavailable, Aborted: see Lane.submit.
        """
        buckets = _buckets_of(orders)
        for _ in range(ROUTES_MAX):
            try:
                return await self._lane_of(buckets).submit(Group(orders, buckets))
            except _Rerouted:
                continue
        raise Unavailable("this part of the data is moving; try again", retry_after_s=RETRY_AFTER_S)

    async def preview(self, orders: Sequence[Order]) -> list[Answer]:
        """What `submit` would answer now; nothing is written, and nothing waits for it."""
        return await self._lane_of(_buckets_of(orders)).preview(orders)

    def _lane_of(self, buckets: Collection[int]) -> Lane:
        indexes = {self._shards.shard_index(bucket) for bucket in buckets}
        if len(indexes) > 1:
            raise OnSeveralShards
        index = indexes.pop()
        self._open(index + 1)  # shards may have been added
        return self.lanes[index]

    def _open(self, count: int) -> None:
        for index in range(len(self.lanes), count):
            self.lanes.append(self._make(index))
            run = self.lanes[index].run()
            # Not as a part of the call that may have asked for it.
            task = self._tasks.create_task(run, name=f"lane-{index}", context=Context())
            self._running.append(task)

    def close(self) -> None:
        """End every lane; whoever waits is told."""
        for task in self._running:
            task.cancel()


def _buckets_of(orders: Sequence[Order]) -> frozenset[int]:
    return frozenset(
        bucket_of(key)
        for order in orders
        for key in (order.order_id, *(entry.account_id for entry in order.entries))
    )


@asynccontextmanager
async def open_lanes(shards: Shards, clock: Clock) -> AsyncIterator[Lanes]:
    """Run every shard's lane while the block runs."""
    async with asyncio.TaskGroup() as tasks:
        lanes = Lanes(shards, clock, tasks)
        try:
            yield lanes
        finally:
            lanes.close()
