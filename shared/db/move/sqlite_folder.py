"""A service's folder of SQLite files, as a Place."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.db.errors import DatabaseRefused
from shared.db.move.sqlite_control import SqliteControl
from shared.db.move.sqlite_side import SqliteSide
from shared.db.move.sqlite_survey import measure_file, survey_folder
from shared.db.move.survey import Survey


@dataclass(frozen=True)
class SqliteFolder:
    """See Place. A folder that a service has opened at least once.

    Attributes:
        path: holds control.sqlite and shard-<n>.sqlite.
    """

    path: Path

    @property
    def control(self) -> SqliteControl:
        """See Place.control."""
        return SqliteControl(self.path.absolute() / "control.sqlite")

    @asynccontextmanager
    async def side(self, index: int, bucket: int) -> AsyncIterator[SqliteSide]:
        """See Place.side."""
        with SqliteSide.opened(self._shard_path(index), index, bucket) as side:
            yield side

    async def sizes(self, index: int) -> Mapping[int, int]:
        """See Place.sizes."""
        return await asyncio.to_thread(measure_file, self._shard_path(index))

    async def survey(self) -> Sequence[Survey]:
        """See Place.survey."""
        return await asyncio.to_thread(survey_folder, self.path)

    def _shard_path(self, index: int) -> Path:
        path = self.path.absolute() / f"shard-{index}.sqlite"
        if not path.is_file():
            raise DatabaseRefused(f"{self.path} has no shard {index}: there is no file {path.name}")
        return path
