"""How many streams and uploads one caller may have open at once.

An edge of a mesh counts them in Valkey for all edges (`edge.slots_valkey`), any other here.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from shared.errors import QuotaExceeded

SLOT_RETRY_AFTER_S = 1.0

# Of this process: contracts that change make new Slots over the same store.
_numbers = count()


@dataclass(frozen=True)
class SlotLimit:
    """What may be open at once.

    Attributes:
        kind: as it is called in refusals and in RateLimit-Policy: "streams", "uploads".
        count_max: of one caller, over all edges.
    """

    kind: str
    count_max: int

    @property
    def policy(self) -> bytes:
        """A quota policy item of the RateLimit draft."""
        return f'"{self.kind}";q={self.count_max};qu="concurrent-requests"'.encode()


class SlotStore(Protocol):
    """Knows which slots are taken."""

    async def take(self, key: str, member: str, count_max: int) -> bool:
        """Take a slot, if fewer than count_max are taken."""
        ...

    def release(self, key: str, member: str) -> None:
        """Let another have it; does not wait."""
        ...


class LocalSlots:
    """See SlotStore. Those of this process alone.

    Args:
        part: of a limit that may be taken here, since others grant the rest.
    """

    def __init__(self, *, part: float = 1.0) -> None:
        self._part = part
        self.taken: dict[str, set[str]] = {}

    async def take(self, key: str, member: str, count_max: int) -> bool:
        """See SlotStore.take."""
        return self.take_now(key, member, count_max)

    def take_now(self, key: str, member: str, count_max: int) -> bool:
        """See SlotStore.take; needs no waiting."""
        members = self.taken.setdefault(key, set())
        if len(members) >= max(1, int(count_max * self._part)):
            return False
        members.add(member)
        return True

    def release(self, key: str, member: str) -> None:
        """See SlotStore.release."""
        members = self.taken.get(key, set())
        members.discard(member)
        if not members:
            self.taken.pop(key, None)


class Slots:
    """Grants slots to callers.

    Args:
        store: which are taken.
    """

    def __init__(self, store: SlotStore) -> None:
        self._store = store

    @asynccontextmanager
    async def taken(self, limit: SlotLimit, owner: str) -> AsyncIterator[None]:
        """Hold a slot inside.

        Args:
            limit: of what.
            owner: the caller's own bucket's key: whose.

        Raises:
            QuotaExceeded: the caller has as many open as it may.
        """
        key, member = f"{owner}:{limit.kind}", str(next(_numbers))
        if not await self._store.take(key, member, limit.count_max):
            message = f"At most {limit.count_max} {limit.kind} may be open at once."
            metadata = {"quota": limit.kind, "subject": "credential"}
            raise QuotaExceeded(
                message,
                metadata=metadata,
                retry_after_s=SLOT_RETRY_AFTER_S,
                reason=f"{limit.kind.upper()}_EXCEEDED",
            )
        try:
            yield
        finally:
            self._store.release(key, member)
