"""A call follows its bucket to where it has gone, for a while."""

import asyncio
import random
import time
from typing import Protocol

from shared.db.errors import BucketElsewhere
from shared.db.limits import RETRY_AFTER_S
from shared.errors import Unavailable

# How long a call follows a bucket that is on its way before it says so (spec/data.md §4).
FOLLOW_S_MAX = 2.0
FOLLOW_PAUSE_S = 0.03


class Locator(Protocol):
    """Who can find out where a bucket is."""

    async def locate(self, bucket: int) -> bool:
        """Look for it; True if it is elsewhere than was thought."""
        ...


class Following:
    """One call's patience with a bucket that is not where the map says."""

    def __init__(self, locator: Locator) -> None:
        self._locator = locator
        self._ends_s = time.monotonic() + FOLLOW_S_MAX

    async def step(self, elsewhere: BucketElsewhere) -> None:
        """Find the bucket, or wait a little.

        Raises:
            Unavailable: it is nowhere for too long.
        """
        if await self._locator.locate(elsewhere.bucket):
            return
        if time.monotonic() > self._ends_s:
            raise moving(elsewhere.bucket) from elsewhere
        await asyncio.sleep(FOLLOW_PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter


class BucketsParted(Unavailable):
    """Buckets that a transaction needs together were on one shard by the map, and are not."""

    def __init__(self) -> None:
        super().__init__("data of this call has moved apart; try again", retry_after_s=0.0)


def moving(bucket: int) -> Unavailable:
    """What a caller is told of a bucket that is on its way."""
    return Unavailable(
        "this part of the data is moving; try again",
        metadata={"bucket": str(bucket)},
        retry_after_s=RETRY_AFTER_S,
    )
