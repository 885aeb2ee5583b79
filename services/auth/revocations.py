"""Tells every watcher what has been revoked: at once from here, soon from other processes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from services.auth.domain import Revocation
from services.auth.store import REVOCATION_LIFE
from shared.clock import Clock
from shared.errors import TenfoldError, Unavailable
from shared.identity import RevocationList

# What other auth processes commit is looked up this often while somebody watches.
POLL_PERIOD_S = 0.5
# Their clocks may be behind ours, and their commits later than their dates, by this much: a
# revocation is dated before it waits for the writer, 30 s at most, and its turn, 15 s.
OVERLAP = timedelta(seconds=60)
HEARTBEAT_S = 5.0
# Revocations that one slow watcher may leave unread; beyond that it must start over.
UNREAD_MAX = 10_000
SEEN_MAX = 100_000

ListRevocations = Callable[[datetime], Awaitable[Sequence[Revocation]]]


@dataclass(frozen=True)
class CaughtUp:
    """The stored revocations have all been sent; also the heartbeat."""


@dataclass(eq=False)
class _Watcher:
    unread: "asyncio.Queue[Revocation]" = field(
        default_factory=lambda: asyncio.Queue(maxsize=UNREAD_MAX)
    )
    is_lost: bool = False


class RevocationHub:
    """Between those who revoke and those who watch.

    Args:
        clock: where time comes from.
        own: the process's own list, which needs no stream to be told.
    """

    def __init__(self, clock: Clock, own: RevocationList) -> None:
        self._clock = clock
        self._own = own
        self._watchers: set[_Watcher] = set()
        self._seen: dict[Revocation, None] = {}

    def publish(self, revocation: Revocation) -> None:
        """Tell every watcher; a repeat is told once."""
        if revocation in self._seen:
            return
        self._seen[revocation] = None
        if len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        self._own.revoke(str(revocation.credential), revocation.forget_at.timestamp())
        for watcher in self._watchers:
            try:
                watcher.unread.put_nowait(revocation)
            except asyncio.QueueFull:
                watcher.is_lost = True

    async def watch(
        self, list_revocations: ListRevocations
    ) -> AsyncIterator[Revocation | CaughtUp]:
        """Everything still of interest, then CaughtUp, then each as it happens.

        Raises:
            Unavailable: the reader is too slow; it must start over.
        """
        with self._watching() as watcher:
            # Watching began before the look-up: nothing falls between the two.
            for revocation in await list_revocations(self._clock.now() - REVOCATION_LIFE):
                yield revocation
            yield CaughtUp()
            while not watcher.is_lost:
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        revocation = await watcher.unread.get()
                except TimeoutError:
                    yield CaughtUp()
                else:
                    yield revocation
            raise Unavailable("too many revocations are unread; watch again")

    @contextmanager
    def _watching(self) -> Iterator[_Watcher]:
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    async def run(self, list_revocations: ListRevocations) -> None:
        """Publish what other processes have committed, until cancelled."""
        since = self._clock.now() - REVOCATION_LIFE
        while True:
            started = self._clock.now()
            try:
                found = await list_revocations(since)
            except TenfoldError:
                pass  # a shard is down or busy: look again from the same moment
            else:
                for revocation in found:
                    self.publish(revocation)
                since = started - OVERLAP
            await asyncio.sleep(POLL_PERIOD_S)
