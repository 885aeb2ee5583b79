"""All at once, on pairs of Postgres servers: eight writers whose maps are wrong, buckets that move
all the time, a mover that dies after every step, and primaries that die.

Whoever comes next ends what was left: a writer that is kept out, the gate of a promoted shard, or
the next mover. The writers' journals tell whether anything was lost, doubled or made up.
"""

import asyncio
import random
import tempfile
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shared.db.move.failpoints import FAILPOINTS
from tests.integration.shared.db.move.arena import ON_POSTGRES, Arena, fought_over
from tests.integration.shared.db.move.grounds import BUCKET
from tests.integration.shared.db.move.journal import Books, read_books
from tests.integration.shared.db.move.pairs import Pairs, running_pairs
from tests.integration.shared.db.move.roaming import Roaming, roaming

SHARDS, WRITERS = 3, 8
ROAMING = (6, 2000, 4000)
"""Buckets that begin on each of the shards; BUCKET is the one that the stories are told of."""

FAILOVER_EVERY = 3
# Behind one of these nobody can write the bucket until its move is settled.
FENCED = ("fence", "fence2", "drain.read", "drain.apply", "drain.ack", "verify2", "commit")
BOUNDS_MS = (10, 25, 50, 100, 250, 500, 1000)


def run(*, rounds: int, seed: int) -> dict[str, object]:
    """Kill movers after every step so often, and a primary now and then, while writers go on."""
    with tempfile.TemporaryDirectory() as folder:
        storm = asyncio.run(_told(Path(folder), rounds, random.Random(seed)))
        books = read_books(Path(folder))
    return {
        "what": f"{WRITERS} writers with wrong maps while buckets move, movers die after every "
        "step, and primaries die and their synchronous standbys take over",
        "faults": storm.mover_kills + storm.failovers,
        "operations": len(books.sent),
        "violations": len(storm.wrong),
        "measured": _measured(storm, books),
    }


class _Storm:
    """The driver of one run; it lives in a thread of its own, the servers in the loop."""

    def __init__(
        self, pairs: Pairs, folder: Path, loop: asyncio.AbstractEventLoop, chance: random.Random
    ) -> None:
        self.mover_kills = self.failovers = self.settled_by_others = 0
        self.wrong: list[str] = []
        self.ends: dict[str, int] = {}
        self.pauses_ms: list[float] = []
        self._pairs = pairs
        self._folder = folder
        self._loop = loop
        self._chance = chance

    def tell(self, rounds: int) -> None:
        """Every step, one after the other: what one leaves is what the next finds."""
        buckets = (BUCKET, *ROAMING)
        with ExitStack() as stack:
            arena = stack.enter_context(
                fought_over(
                    self._pairs.ground,
                    self._folder,
                    writer_count=WRITERS,
                    buckets=buckets,
                    pace=ON_POSTGRES,
                )
            )
            movers = stack.enter_context(roaming(self._pairs.ground, ROAMING))
            for number, failpoint in enumerate(FAILPOINTS * rounds):
                found = self._step(arena, movers, number, failpoint)
                print(f"{failpoint}: {found or 'nothing wrong'}", flush=True)
                self.wrong += found
        self.ends, self.pauses_ms = dict(movers.ends), movers.pauses_ms
        self.wrong += arena.left

    def _step(self, arena: Arena, movers: Roaming, number: int, failpoint: str) -> list[str]:
        arena.end_at(failpoint, "kill")
        self.mover_kills += 1
        victim = self._chance.randrange(SHARDS) if number % FAILOVER_EVERY == 0 else None
        if victim is not None:
            print(f"the primary of shard {victim} is killed", flush=True)
            self._in_loop(self._pairs.fail_over(victim))
            self.failovers += 1
        if victim is not None or failpoint in FENCED:
            self.settled_by_others += arena.is_settled_by_others()
        with movers.resting():
            arena.settle("go on" if number % 2 else "abort")
            found = arena.violations()
        if victim is not None:
            self._in_loop(self._pairs.mend(victim))
        return found

    def _in_loop(self, work: Coroutine[Any, Any, object]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _told(folder: Path, rounds: int, chance: random.Random) -> _Storm:
    async with running_pairs(SHARDS) as pairs:
        storm = _Storm(pairs, folder, asyncio.get_running_loop(), chance)
        await asyncio.to_thread(storm.tell, rounds)
    return storm


def _measured(storm: _Storm, books: Books) -> dict[str, object]:
    return {
        "mover_kills": storm.mover_kills,
        "primary_kills": storm.failovers,
        "settled_by_writers_or_gate": storm.settled_by_others,
        "moves_beside": storm.ends,
        "acknowledged": len(books.done),
        "refused": len(books.refused),
        "unknown": len(books.unknown),
        "fence_ms": histogram(storm.pauses_ms),
        "write_ms": histogram(books.took_ms),
    }


def histogram(values: Sequence[float]) -> dict[str, float]:
    """How many are at most so large, and their quantiles."""
    ordered: list[float] = sorted(values)
    told: dict[str, float] = {}
    for bound in BOUNDS_MS:
        told[f"<={bound}"] = sum(value <= bound for value in ordered)
    told["more"] = sum(value > BOUNDS_MS[-1] for value in ordered)
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        place = min(int(len(ordered) * share), len(ordered) - 1)
        told[name] = round(ordered[place], 1) if ordered else 0.0
    return told
