"""Which buckets to move where, so that every shard carries what its weight says.

Pure arithmetic. A bucket's part of the load is the mean of its part of all bytes and its part of
all statement time: counts of rows, buckets or shards say little (spec/data.md §4). As long as
nothing was measured all buckets count alike, so that what will come is spread.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.db.ids import BUCKET_COUNT

# A shard may carry so much more than its part before anything moves, and what moves goes further:
# else the next row would begin it anew.
TOLERANCE = 0.1
ENOUGH = 0.05
# A bucket that carries less than a tenth of the mean is not worth a move.
SHARE_LEAST = 0.1 / BUCKET_COUNT


@dataclass(frozen=True)
class Step:
    """One move of a plan."""

    bucket: int
    src: int
    dst: int


def shares_of(sizes: Mapping[int, float], busy: Mapping[int, float]) -> list[float]:
    """Each bucket's part of the load; they add up to 1.

    Args:
        sizes: bytes by bucket; those that are missing have none.
        busy: statement time by bucket, in any unit.
    """
    measures = [measure for measure in (sizes, busy) if sum(measure.values()) > 0]
    shares = [0.0 if measures else 1 / BUCKET_COUNT] * BUCKET_COUNT
    for measure in measures:
        whole = sum(measure.values())
        for bucket, amount in measure.items():
            shares[bucket] += amount / whole / len(measures)
    return shares


def loads_of(
    shares: Sequence[float], owners: Mapping[int, int], weights: Mapping[int, int]
) -> dict[int, float]:
    """What each shard carries, by index: 1 is what its weight says, for weight 0 the part of all.

    Args:
        shares: by bucket.
        owners: bucket -> shard; those that are on their way are missing.
        weights: by shard, 0 or more, one above 0.
    """
    carried = dict.fromkeys(weights, 0.0)
    for bucket, shard in owners.items():
        carried[shard] += shares[bucket]
    whole = sum(weights.values())
    return {
        shard: carried[shard] * whole / weight if weight else carried[shard]
        for shard, weight in weights.items()
    }


def plan(
    shares: Sequence[float],
    owners: Mapping[int, int],
    weights: Mapping[int, int],
    *,
    moves_max: int = BUCKET_COUNT,
) -> list[Step]:
    """The moves that make the fullest shards less full, the largest bucket that fits first.

    Shards of weight 0 are emptied first. No bucket moves twice. Nothing moves as long as no
    shard carries more than TOLERANCE above its part; then all that have more than ENOUGH give.

    Args:
        shares: see loads_of, as owners and weights.
        owners: who has what now.
        weights: who shall have how much.
        moves_max: the plan ends there.

    Raises:
        ValueError: no shard has a weight.
    """
    if not any(weights.values()):
        raise ValueError("every shard has weight 0: one must carry the load")
    return _Planner(shares, owners, weights).steps(moves_max)


class _Planner:
    """The state of one plan."""

    def __init__(
        self, shares: Sequence[float], owners: Mapping[int, int], weights: Mapping[int, int]
    ) -> None:
        whole = sum(weights.values())
        self._part = {shard: weight / whole for shard, weight in weights.items()}
        self._carried = dict.fromkeys(weights, 0.0)
        self._movable: dict[int, list[tuple[float, int]]] = {shard: [] for shard in weights}
        for bucket, shard in owners.items():
            self._carried[shard] += shares[bucket]
            self._movable[shard].append((shares[bucket], bucket))
        for movable in self._movable.values():
            movable.sort()

    def steps(self, moves_max: int) -> list[Step]:
        steps: list[Step] = []
        while len(steps) < moves_max and (step := self._emptying()) is not None:
            steps.append(step)
        if max(map(self._load, self._part)) <= 1 + TOLERANCE:
            return steps
        while len(steps) < moves_max and (step := self._levelling()) is not None:
            steps.append(step)
        return steps

    def _emptying(self) -> Step | None:
        for shard, part in self._part.items():
            if not part and self._movable[shard]:
                return self._take(shard, len(self._movable[shard]) - 1, self._emptiest())
        return None

    def _levelling(self) -> Step | None:
        dst = self._emptiest()
        for src in sorted(self._part, key=self._load, reverse=True):
            if self._load(src) <= 1 + ENOUGH:
                return None
            place = self._fitting(src, dst)
            if place is not None:
                return self._take(src, place, dst)
        return None

    def _emptiest(self) -> int:
        return min((shard for shard, part in self._part.items() if part), key=self._load)

    def _load(self, shard: int) -> float:
        return self._carried[shard] / self._part[shard] if self._part[shard] else 0.0

    def _fitting(self, src: int, dst: int) -> int | None:
        """The bucket that leaves the fuller of both least full, if that is an improvement.

        It is one of two: the largest that does not make the destination the fuller one, or the
        next larger.
        """
        movable, part = self._movable[src], self._part
        gap = self._carried[src] * part[dst] - self._carried[dst] * part[src]
        alike = gap / (part[src] + part[dst])
        above = bisect_right(movable, (alike, BUCKET_COUNT))
        best, least = None, self._load(src)
        for place in range(max(above - 1, 0), min(above + 1, len(movable))):
            share = movable[place][0]
            fuller = max(
                (self._carried[src] - share) / part[src], (self._carried[dst] + share) / part[dst]
            )
            if share >= SHARE_LEAST and fuller < least:
                best, least = place, fuller
        return best

    def _take(self, src: int, place: int, dst: int) -> Step:
        share, bucket = self._movable[src].pop(place)
        self._carried[src] -= share
        self._carried[dst] += share
        return Step(bucket, src, dst)
