"""A service's Postgres databases, as a Place."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from shared.db.errors import DatabaseRefused
from shared.db.move.postgres_control import PostgresControl
from shared.db.move.postgres_side import PostgresSide
from shared.db.move.postgres_survey import measure_server, survey_server
from shared.db.move.survey import Survey
from shared.db.postgres_connection import Server


@dataclass(frozen=True)
class PostgresPlace:
    """See Place.

    Attributes:
        servers: every shard, in the order in which they were made.
        imports: whether moves may begin; else they are only ended, which needs no right beyond
            those of a service.
        is_gatekeeper: settles moves of a shard that was promoted and that nobody else may use.
    """

    servers: Sequence[Server]
    imports: bool = True
    is_gatekeeper: bool = False

    @property
    def control(self) -> PostgresControl:
        """See Place.control."""
        return PostgresControl(self.servers[0])

    @asynccontextmanager
    async def side(self, index: int, bucket: int) -> AsyncIterator[PostgresSide]:
        """See Place.side."""
        if index >= len(self.servers):
            raise DatabaseRefused(f"there is no shard {index}: {len(self.servers)} are named")
        server = self.servers[index]
        async with PostgresSide.opened(
            server, index, bucket, imports=self.imports, is_gatekeeper=self.is_gatekeeper
        ) as side:
            yield side

    async def sizes(self, index: int) -> Mapping[int, int]:
        """See Place.sizes."""
        return await measure_server(self.servers[index])

    async def survey(self) -> Sequence[Survey]:
        """See Place.survey."""
        surveys = [survey_server(server, index) for index, server in enumerate(self.servers)]
        return await asyncio.gather(*surveys)
