"""Wakes what waits for a change in this process; what it misses, polling finds.

A ring is a hint and carries nothing: it may come before the change is committed, twice,
or, from another process, not at all. So whoever hears it looks again, and for a moment
more often.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

# After a ring the commit is near: look again this soon, then each time twice as late.
EAGER_FIRST_S = 0.01


class Waiter:
    """One listener's view of a signal; belongs to one task."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._eager_s = 0.0

    def ring(self) -> None:
        """Something may have changed, or is about to."""
        self._rung.set()

    async def wait(self, timeout_s: float) -> None:
        """Return when rung, soon after that a few times more, or when the time is over."""
        is_eager = 0 < self._eager_s < timeout_s
        wait_s = self._eager_s if is_eager else timeout_s
        try:
            async with asyncio.timeout(wait_s):
                await self._rung.wait()
        except TimeoutError:
            self._eager_s = 2 * self._eager_s if is_eager else 0.0
        else:
            self._rung.clear()
            self._eager_s = EAGER_FIRST_S

    def calm(self) -> None:
        """The change has been seen: back to waiting."""
        self._eager_s = 0.0


class InboxSignal:
    """Rings the watchers of one inbox, and the mail sender with every inbox."""

    def __init__(self) -> None:
        self._watchers: defaultdict[tuple[str, UUID], set[Waiter]] = defaultdict(set)
        self._senders: set[Waiter] = set()

    def ring(self, tenant: str, owner: UUID) -> None:
        """An inbox has changed, or is about to."""
        for waiter in (*self._watchers.get((tenant, owner), ()), *self._senders):
            waiter.ring()

    def count(self, tenant: str, owner: UUID) -> int:
        """How many watch this inbox in this process."""
        return len(self._watchers.get((tenant, owner), ()))

    @contextmanager
    def watching(self, tenant: str, owner: UUID) -> Iterator[Waiter]:
        """Hear the rings of one inbox inside the block."""
        waiter, key = Waiter(), (tenant, owner)
        self._watchers[key].add(waiter)
        try:
            yield waiter
        finally:
            self._watchers[key].discard(waiter)
            if not self._watchers[key]:
                del self._watchers[key]

    @contextmanager
    def sending(self) -> Iterator[Waiter]:
        """Hear the rings of every inbox inside the block."""
        waiter = Waiter()
        self._senders.add(waiter)
        try:
            yield waiter
        finally:
            self._senders.discard(waiter)
