"""Where a service's shards are, for who moves its buckets; each engine says how to open them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Protocol

from shared.db.move.mover import Mover, Tools, begin_move, take_over
from shared.db.move.port import Control, Move, MoveFailed, MoveLost, MoveRefused, Side
from shared.db.move.protocol import OWNING, Phase, Preference
from shared.db.move.survey import Survey


class Place(Protocol):
    """All shards of one service, and its Control."""

    @property
    def control(self) -> Control:
        """The service's Control."""
        ...

    def side(self, index: int, bucket: int) -> AbstractAsyncContextManager[Side]:
        """Open one shard for the move of one bucket.

        Raises:
            DatabaseRefused: from the block, if it cannot be opened; named.
            MoveRefused: from the block, if its tables cannot be moved.
        """
        ...

    async def sizes(self, index: int) -> Mapping[int, int]:
        """About how many bytes of rows each bucket has on a shard, whoever owns it; estimated.

        Raises:
            DatabaseRefused: it cannot be read; named.
        """
        ...

    async def survey(self) -> Sequence[Survey]:
        """What every shard says of itself, by index; nothing is changed.

        Raises:
            DatabaseRefused: one cannot be read; named.
        """
        ...


async def move_bucket(place: Place, bucket: int, dst: int, tools: Tools) -> Phase:
    """Move a bucket to another shard, from wherever it is.

    Raises:
        MoveRefused: it cannot begin; nothing has been changed.
        MoveFailed: it was aborted; the sentence says why.
        MoveLost: another mover goes on with it.
        DatabaseRefused: a shard cannot be opened.
    """
    await collect_left(place, tools)
    src = await owner_of(place, bucket)
    if src == dst:
        raise MoveRefused(f"bucket {bucket} is on shard {dst} already")
    async with (
        place.side(src, bucket) as source,
        place.side(dst, bucket) as destination,
        place.control.kept() as control,
    ):
        mover = await begin_move(control, source, destination, bucket, tools)
        return await mover.run()


async def settle_move(
    place: Place, move: Move, tools: Tools, *, preference: Preference, is_forced: bool = False
) -> Phase:
    """End a move that another mover left. See take_over, and move_bucket."""
    async with (
        place.side(move.src, move.bucket) as source,
        place.side(move.dst, move.bucket) as destination,
        place.control.kept() as control,
    ):
        mover = await take_over(
            control,
            source,
            destination,
            move,
            tools,
            preference=preference,
            is_forced=is_forced,
        )
        return await mover.run()


async def settle_left(place: Place, bucket: int | None, tools: Tools) -> None:
    """End the move of a bucket whose mover has died; nothing if it lives, or there is none.

    None ends all such moves: what is written of a bucket that nobody carries over piles up.
    """
    for move in await place.control.list_moves(is_open=True):
        if bucket in (None, move.bucket) and move.is_left(tools.now_us()):
            with suppress(MoveRefused, MoveLost, MoveFailed):  # another was faster
                await settle_move(place, move, tools, preference="abort")


async def collect_left(place: Place, tools: Tools) -> int:
    """Delete the rows that movers which died at the very end left behind; how many moves."""
    left = await place.control.list_uncollected()
    for move in left:
        async with (
            place.side(move.src, move.bucket) as source,
            place.side(move.dst, move.bucket) as destination,
        ):
            mover = Mover(
                place.control,
                src=source,
                dst=destination,
                move=move,
                tools=tools,
                action="forward",
            )
            await mover.collect()
    return len(left)


async def owner_of(place: Place, bucket: int) -> int:
    """The shard that has a bucket: by the map, unless that shard itself knows better.

    Raises:
        MoveRefused: it cannot be said; a move of it has not been settled.
    """
    index = (await place.control.read_map()).shard_index(bucket)
    async with place.side(index, bucket) as side:
        held = await side.look()
    if held.state not in OWNING:
        raise MoveRefused(
            f"bucket {bucket} is {held.state} on shard {index}, where the map has it: settle "
            "its move first"
        )
    return index
