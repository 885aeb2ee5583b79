"""Who sends a shard's mail: one process at a time, and a successor soon after a crash.

A lease keeps two senders out of each other's way; it is not what makes sending safe.
A holder that was frozen past its end still meets the version of each row it touches.
"""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from uuid import UUID, uuid4

import structlog

from shared.bus.checkpoint import checkpoint
from shared.clock import Clock, to_us
from shared.db.leases import Lease, release_lease, renew_lease, take_lease
from shared.db.port import Shard
from shared.errors import TenfoldError

LEASE_NAME = "mail"
LEASE_S = 6.0
LEASE_US = int(LEASE_S * 1e6)
RENEW_S = LEASE_S / 3
RELEASE_S = 1.0

_log = structlog.get_logger(__name__)


class ShardLease:
    """One shard's lease, as this process sees it.

    Attributes:
        holder: this process's name for itself; what it claims carries it.
        tenure: the token of the lease; another one each time it is gained, 0 before.
        is_wanted: set while there is work; an idle shard costs no writes.
    """

    def __init__(self, shard: Shard, *, clock: Clock) -> None:
        self.holder: UUID = uuid4()
        self.tenure = 0
        self.is_wanted = asyncio.Event()
        self._shard = shard
        self._clock = clock
        self._lease: Lease | None = None
        self._held_until_s = float("-inf")
        self._gained = asyncio.Event()

    @property
    def is_held(self) -> bool:
        """Whether nobody else may be sending."""
        return self._clock.monotonic_s() < self._held_until_s

    async def wait_held(self) -> int:
        """The tenure, once the lease is held."""
        while not self.is_held:
            self._gained.clear()
            await self._gained.wait()
        return self.tenure

    async def run(self) -> None:
        """While wanted, take the lease when it is free and renew it; give it back at the end."""
        try:
            while True:
                checkpoint()
                await self.is_wanted.wait()
                try:
                    await self.take()
                except TenfoldError as error:
                    _log.warning("mail.lease", shard=self._shard.index, error=str(error))
                await asyncio.sleep(RENEW_S)
        finally:
            await _at_the_end(self.release())

    async def take(self) -> bool:
        """Take or renew the lease; False if somebody else has it."""
        # Counted from before the write, so our end comes before the one others read.
        until_s = self._clock.monotonic_s() + LEASE_S
        now_us = to_us(self._clock.now())
        async with self._shard.transaction() as tx:
            held = self._lease
            if held is None or not await renew_lease(tx, held, now_us=now_us, ttl_us=LEASE_US):
                self._lease = await take_lease(
                    tx, LEASE_NAME, holder=str(self.holder), now_us=now_us, ttl_us=LEASE_US
                )
        if self._lease is None:
            self._held_until_s = float("-inf")
            return False
        self.tenure = self._lease.token
        self._held_until_s = until_s
        self._gained.set()
        return True

    async def release(self) -> None:
        """Let a successor start at once."""
        self._held_until_s = float("-inf")
        if self._lease is not None:
            async with self._shard.transaction() as tx:
                await release_lease(tx, self._lease)


async def _at_the_end(work: Awaitable[None]) -> None:
    with suppress(TenfoldError, TimeoutError):
        async with asyncio.timeout(RELEASE_S):
            await work
