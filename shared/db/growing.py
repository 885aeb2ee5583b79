"""Shards that are added while their service runs: every process finds them and works on them."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from shared.db.port import Shard, Shards

# A process that meets no bucket of a new shard has opened it after this; one that does, at once.
LEARN_S = 5.0


class Growth:
    """Tells those who wait that there are more shards than before."""

    def __init__(self) -> None:
        self._grown = asyncio.Event()

    def tell(self) -> None:
        """Wake up all who wait."""
        self._grown.set()
        self._grown = asyncio.Event()

    async def wait(self) -> None:
        """Until there are more."""
        await self._grown.wait()


class Learner(Protocol):
    """Who can look for further shards."""

    async def learn(self) -> bool:
        """See Shards.learn."""
        ...


async def run_learning(learner: Learner) -> None:
    """Look for further shards every few seconds until cancelled."""
    while True:
        await asyncio.sleep(LEARN_S * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, no secret
        await learner.learn()


async def run_on_each(shards: Shards, run: Callable[[Shard], Coroutine[Any, Any, None]]) -> None:
    """Run a loop on every shard, also on those that are added meanwhile, until cancelled."""
    running_count = 0
    async with asyncio.TaskGroup() as tasks:
        while True:
            for shard in shards.all()[running_count:]:
                tasks.create_task(run(shard))
                running_count += 1
            await shards.wait_for_more(running_count)
