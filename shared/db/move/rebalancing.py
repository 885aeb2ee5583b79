"""What a balancer must know of a service's shards, and what it clears up before it begins."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from shared.db.move.balance import Step, loads_of, plan, shares_of
from shared.db.move.mover import Tools
from shared.db.move.place import Place, settle_move
from shared.db.move.port import Move, MoveRefused
from shared.db.move.protocol import Phase

LEASE_PAUSE_S = 0.5


@dataclass(frozen=True)
class Picture:
    """A service's shards as they were measured.

    Attributes:
        sizes: bytes by bucket, estimated.
        busy: statement time by bucket; see shared/db/load.py.
        owners: bucket -> shard.
        weights: by shard.
    """

    sizes: Mapping[int, int]
    busy: Mapping[int, float]
    owners: Mapping[int, int]
    weights: Mapping[int, int]

    def steps(self, moves_max: int) -> list[Step]:
        """See balance.plan."""
        return plan(self._shares(), self.owners, self.weights, moves_max=moves_max)

    def loads(self, steps: "list[Step] | None" = None) -> dict[int, float]:
        """See balance.loads_of; as they will be after these moves."""
        owners = dict(self.owners) | {step.bucket: step.dst for step in steps or ()}
        return loads_of(self._shares(), owners, self.weights)

    def _shares(self) -> list[float]:
        return shares_of(self.sizes, self.busy)


async def take_picture(place: Place, tools: Tools) -> Picture:
    """Measure every shard; nothing is changed.

    Raises:
        DatabaseRefused: one cannot be read; named.
        MoveFailed: Control cannot be read.
    """
    recorded = [shard for shard in await place.control.list_shards() if shard.is_active]
    surveys = await place.survey()
    owners = {bucket: survey.index for survey in surveys for bucket in survey.owned}
    sizes: dict[int, int] = {}
    for survey in surveys:  # one after the other: the service's own work comes first
        found = await place.sizes(survey.index)
        sizes |= {bucket: found.get(bucket, 0) for bucket in survey.owned}
    return Picture(
        sizes=sizes,
        busy=await place.control.read_busy(tools.now_us()),
        owners=owners,
        weights={shard.index: shard.weight for shard in recorded},
    )


async def settle_dead(place: Place, tools: Tools) -> list[tuple[int, Phase]]:
    """End the moves whose movers have died: forward where that can be; waits for their leases.

    Raises:
        MoveRefused: a mover lives.
    """
    return [
        (move.bucket, await settle_move(place, move, tools, preference="go on"))
        for move in await place.control.list_moves(is_open=True)
        if await _is_dead(place, move, tools)
    ]


async def _is_dead(place: Place, move: Move, tools: Tools) -> bool:
    """Whether its lease runs out; False if the move ends meanwhile.

    Raises:
        MoveRefused: the lease is renewed.
    """
    while not move.is_left(tools.now_us()):
        await asyncio.sleep(LEASE_PAUSE_S)
        open_moves = {one.move_id: one for one in await place.control.list_moves(is_open=True)}
        if move.move_id not in open_moves:
            return False
        if open_moves[move.move_id].lease_until_us > move.lease_until_us:
            raise MoveRefused(
                f"bucket {move.bucket} is just being moved from shard {move.src} to {move.dst}: "
                "let it end, or abort it"
            )
    return True
