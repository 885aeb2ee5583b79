"""The Reader behind Bucket.causal, the same on both engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.db.port import Row, only


class CausalBucket(Protocol):
    """A bucket of one engine."""

    async def fetch_causally(self, sql: str, *arguments: object) -> Sequence[Row]:
        """What a replica answers that is new enough, else the primary.

        Raises:
            ValueError: inside a transaction.
        """
        ...


@dataclass(frozen=True)
class CausalReader:
    """See Bucket.causal."""

    bucket: CausalBucket

    async def fetch_one(self, sql: str, *arguments: object) -> Row | None:
        """See Reader.fetch_one."""
        return only(await self.fetch_all(sql, *arguments))

    async def fetch_all(self, sql: str, *arguments: object) -> Sequence[Row]:
        """See Reader.fetch_all."""
        return await self.bucket.fetch_causally(sql, *arguments)
