"""How long each bucket keeps its shard busy, for the balancer.

Each process adds up in memory how long reads of a bucket took and transactions of it were open,
which costs two looks at the clock and an addition. Twice a minute it adds what has come to
Control, one row for each bucket that was used: 4,096 at most, whatever the traffic. What is there
loses half of its weight every hour, so that last week's traffic moves nothing today. A process
that dies takes half a minute's count with it: the balancer needs proportions, not an account.
"""

import asyncio
import random
from array import array
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Protocol

from shared.clock import Clock, to_us
from shared.db.errors import DatabaseRefused
from shared.db.ids import BUCKET_COUNT
from shared.db.move.port import MoveFailed

TELL_S = 30.0
HALF_LIFE_S = 3600.0


class Book(Protocol):
    """Where it is added up: Control."""

    async def add_busy(self, busy_us: Mapping[int, int], now_us: int) -> None:
        """See Control.add_busy."""
        ...


class LoadMeter:
    """What one process has counted since it last told."""

    def __init__(self) -> None:
        self._busy_s = array("d", bytes(8 * BUCKET_COUNT))

    def add(self, buckets: Collection[int], took_s: float) -> None:
        """Count this for these buckets together."""
        each_s = took_s / len(buckets)
        for bucket in buckets:
            self._busy_s[bucket] += each_s

    def take(self) -> dict[int, int]:
        """Microseconds by bucket, where there are any; counting begins anew."""
        counted, self._busy_s = self._busy_s, array("d", bytes(8 * BUCKET_COUNT))
        return {bucket: int(s * 1e6) for bucket, s in enumerate(counted) if s >= 1e-6}


def faded(amount: float, age_us: int) -> float:
    """What an amount of that age counts now."""
    return float(amount * 0.5 ** (max(age_us, 0) / 1e6 / HALF_LIFE_S))


async def run_telling(meter: LoadMeter, book: Book, clock: Clock) -> None:
    """Add to Control what has come, until cancelled."""
    while True:
        await asyncio.sleep(TELL_S * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, no secret
        await tell(meter, book, clock)


async def tell(meter: LoadMeter, book: Book, clock: Clock) -> None:
    """Add to Control what has come; lost if Control is away."""
    if counted := meter.take():
        with suppress(MoveFailed, DatabaseRefused):
            await book.add_busy(counted, to_us(clock.now()))
