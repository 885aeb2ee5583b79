"""A service's folder of SQLite files, for who moves its buckets: its Control and its sides."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.db.errors import DatabaseRefused
from shared.db.move.mover import Tools, begin_move, take_over
from shared.db.move.port import Move, MoveRefused
from shared.db.move.protocol import Phase, Preference
from shared.db.move.sqlite_control import SqliteControl
from shared.db.move.sqlite_side import SqliteSide


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
        src = (await self.control.read_map()).shard_index(bucket)
        if src == dst:
            raise MoveRefused(f"bucket {bucket} is on shard {dst} already")
        with self.side(src, bucket) as source, self.side(dst, bucket) as destination:
            mover = await begin_move(self.control, source, destination, bucket, tools)
            return await mover.run()

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
