"""Buckets that move all the time, to random shards; how long each move kept its writers waiting."""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from shared.db.errors import DatabaseRefused
from shared.db.move.mover import Pace, Progress, Tools
from shared.db.move.place import move_bucket, settle_left
from shared.db.move.port import MoveFailed, MoveLost, MoveRefused
from tests.integration.shared.db.move.grounds import Ground

PACE = Pace(page_rows=2000, pass_s_max=0.5, passes_max=50, grace_s=0.0, rest_share=0.0)
PAUSE_S = 0.05


@dataclass
class Roaming:
    """One mover after the other, in a thread.

    Attributes:
        ground: where.
        buckets: that roam.
        pauses_ms: of the moves that came to their end.
        ends: how often which end was met.
    """

    ground: Ground
    buckets: Sequence[int]
    pauses_ms: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    _resting: threading.Lock = field(default_factory=threading.Lock)
    _is_over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """No move of ours is under way in this block; one that failed may be left open."""
        with self._resting:
            yield

    def run(self) -> None:
        """Move until the end."""
        while not self._is_over.is_set():
            with self._resting:
                self.ends[asyncio.run(self._move())] += 1
            time.sleep(PAUSE_S)  # or whoever wants us to rest would wait in vain

    async def _move(self) -> str:
        bucket = random.choice(self.buckets)
        dst = random.randrange(self.ground.shard_count)
        tools = Tools(pace=replace(PACE), report=self._report)
        try:
            await settle_left(self.ground.moves, bucket, tools)
            return str(await move_bucket(self.ground.moves, bucket, dst, tools))
        except (MoveFailed, MoveLost, MoveRefused, DatabaseRefused) as error:
            return type(error).__name__

    def _report(self, progress: Progress) -> None:
        if progress.step == "dst_active" and progress.pause_s is not None:
            self.pauses_ms.append(progress.pause_s * 1000)

    def stop(self) -> None:
        """End with the move that is under way."""
        self._is_over.set()


@contextmanager
def roaming(ground: Ground, buckets: Sequence[int]) -> Iterator[Roaming]:
    """Buckets that roam until the end of the block."""
    mover = Roaming(ground, buckets)
    thread = threading.Thread(target=mover.run)
    thread.start()
    try:
        yield mover
    finally:
        mover.stop()
        thread.join()
