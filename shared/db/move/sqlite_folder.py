"""A service's folder of SQLite files, for who moves its buckets: its Control and its sides."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shared.db.errors import DatabaseRefused
from shared.db.move.mover import Mover, Tools, begin_move, take_over
from shared.db.move.port import Move, MoveFailed, MoveLost, MoveRefused
from shared.db.move.protocol import Phase, Preference
from shared.db.move.sqlite_control import SqliteControl
from shared.db.move.sqlite_side import SqliteSide
from shared.db.move.sqlite_survey import OWNING


@dataclass(frozen=True)
class SqliteFolder:
    """A folder that a service has opened at least once.

    Attributes:
        path: holds control.sqlite and shard-<n>.sqlite.
    """

    path: Path

    @property
    def control(self) -> SqliteControl:
        """The service's Control."""
        return SqliteControl(self.path.absolute() / "control.sqlite")

    def shard_path(self, index: int) -> Path:
        """A shard's file.

        Raises:
            DatabaseRefused: there is none of that number.
        """
        path = self.path.absolute() / f"shard-{index}.sqlite"
        if not path.is_file():
            raise DatabaseRefused(f"{self.path} has no shard {index}: there is no file {path.name}")
        return path

    @contextmanager
    def side(self, index: int, bucket: int) -> Iterator[SqliteSide]:
        """Open one shard for the move of one bucket."""
        with SqliteSide.opened(self.shard_path(index), index, bucket) as side:
            yield side

    async def move(self, bucket: int, dst: int, tools: Tools) -> Phase:
        """Move a bucket to another shard, from wherever it is.

        Raises:
            MoveRefused: it cannot begin; nothing has been changed.
            MoveFailed: it was aborted; the sentence says why.
            MoveLost: another mover goes on with it.
        """
        await self.collect_left(tools)
        src = await self.owner_of(bucket)
        if src == dst:
            raise MoveRefused(f"bucket {bucket} is on shard {dst} already")
        with self.side(src, bucket) as source, self.side(dst, bucket) as destination:
            mover = await begin_move(self.control, source, destination, bucket, tools)
            return await mover.run()

    async def owner_of(self, bucket: int) -> int:
        """The shard that has a bucket: by the map, unless that shard itself knows better.

        Raises:
            MoveRefused: it cannot be said; a move of it has not been settled.
        """
        index = (await self.control.read_map()).shard_index(bucket)
        with self.side(index, bucket) as side:
            held = await side.look()
        if held.state not in OWNING:
            raise MoveRefused(
                f"bucket {bucket} is {held.state} on shard {index}, where the map has it: settle "
                "its move first"
            )
        return index

    async def collect_left(self, tools: Tools) -> int:
        """Delete the rows that movers which died at the very end left behind; how many moves."""
        left = await self.control.list_uncollected()
        for move in left:
            with (
                self.side(move.src, move.bucket) as source,
                self.side(move.dst, move.bucket) as destination,
            ):
                mover = Mover(
                    self.control,
                    src=source,
                    dst=destination,
                    move=move,
                    tools=tools,
                    action="forward",
                )
                await mover.collect()
        return len(left)

    async def settle_left(self, bucket: int, tools: Tools) -> None:
        """End the move of a bucket whose mover has died; nothing if it lives, or there is none."""
        for move in await self.control.list_moves(is_open=True):
            if move.bucket == bucket and move.lease_until_us <= tools.now_us():
                with suppress(MoveRefused, MoveLost, MoveFailed):  # another was faster
                    await self.settle(move, tools, preference="abort")

    async def settle(
        self, move: Move, tools: Tools, *, preference: Preference, is_forced: bool = False
    ) -> Phase:
        """End a move that another mover left. See take_over, and `move`."""
        with (
            self.side(move.src, move.bucket) as source,
            self.side(move.dst, move.bucket) as destination,
        ):
            mover = await take_over(
                self.control,
                source,
                destination,
                move,
                tools,
                preference=preference,
                is_forced=is_forced,
            )
            return await mover.run()
