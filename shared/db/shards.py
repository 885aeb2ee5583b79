"""Bucket -> shard: the versioned map, pure arithmetic.

The map is a hint that saves a question; the truth is `tenfold_bucket` in each shard, read
in the writer's own transaction.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from shared.db.ids import BUCKET_COUNT

SHARD_COUNT_MAX = 64


class CoverageBroken(Exception):
    """Some bucket is owned by no shard or by two; the message names the first of them."""


@dataclass(frozen=True)
class BucketMap:
    """Which shard holds each bucket.

    Attributes:
        version: grows with every change.
        shard_indexes: 4,096 shard indexes, by bucket.
    """

    version: int
    shard_indexes: tuple[int, ...]

    def __post_init__(self) -> None:  # noqa: D105 - checks what the attributes promise
        if len(self.shard_indexes) != BUCKET_COUNT:
            raise ValueError(f"a map has {BUCKET_COUNT} buckets, not {len(self.shard_indexes)}")

    @classmethod
    def even(cls, shard_count: int) -> Self:
        """Runs of neighbouring buckets of the same length, give or take one."""
        if not 1 <= shard_count <= SHARD_COUNT_MAX:
            raise ValueError(f"shard_count {shard_count} is not between 1 and {SHARD_COUNT_MAX}")
        return cls(1, tuple(bucket * shard_count // BUCKET_COUNT for bucket in range(BUCKET_COUNT)))

    @classmethod
    def first_owns_all(cls) -> Self:
        """Every bucket on shard 0, for a service that cannot yet write across shards."""
        return cls(1, (0,) * BUCKET_COUNT)

    @classmethod
    def of_owners(cls, owned: Mapping[int, Iterable[int]], *, version: int) -> Self:
        """The map that the shards themselves report.

        Args:
            owned: the buckets that each shard index owns.
            version: of the map to make.

        Raises:
            CoverageBroken: they do not cover every bucket exactly once.
        """
        shard_indexes: list[int | None] = [None] * BUCKET_COUNT
        for shard_index, buckets in owned.items():
            for bucket in buckets:
                other = shard_indexes[bucket]
                if other is not None:
                    raise CoverageBroken(
                        f"bucket {bucket} is owned by shards {other} and {shard_index}"
                    )
                shard_indexes[bucket] = shard_index
        known = tuple(index for index in shard_indexes if index is not None)
        if len(known) != BUCKET_COUNT:
            raise CoverageBroken(f"bucket {shard_indexes.index(None)} is owned by no shard")
        return cls(version, known)

    def shard_index(self, bucket: int) -> int:
        """Where this bucket (0 to 4095) lives."""
        if not 0 <= bucket < BUCKET_COUNT:
            raise ValueError(f"bucket {bucket} is not between 0 and {BUCKET_COUNT - 1}")
        return self.shard_indexes[bucket]

    def buckets_of(self, shard_index: int) -> list[int]:
        """The buckets of one shard, ascending."""
        return [bucket for bucket, index in enumerate(self.shard_indexes) if index == shard_index]

    def moved(self, bucket: int, shard_index: int) -> Self:
        """The map after one bucket has moved."""
        indexes = list(self.shard_indexes)
        indexes[bucket] = shard_index
        return replace(self, version=self.version + 1, shard_indexes=tuple(indexes))
