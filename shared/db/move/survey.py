"""What shards say of themselves, and where they disagree; the same on both engines."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shared.db.ids import BUCKET_COUNT
from shared.db.move.protocol import OWNING, State
from shared.db.shards import BucketMap

# Rows of a table whose bucket the shard neither owns nor is sending or taking.
STRAYS = """
SELECT count(*) FROM {table} WHERE bucket NOT IN (
    SELECT bucket FROM tenfold_bucket WHERE state NOT IN ('ABSENT', 'ABORTED'))
"""


@dataclass(frozen=True)
class Survey:
    """One shard.

    Attributes:
        place: where it is: a file, or a host and a database.
        size_bytes: of its file without the log beside it, or of its database.
        states: of every bucket that it knows, with its epoch.
        strays: by table, rows of buckets that the shard neither owns nor is sending or taking.
    """

    index: int
    place: str
    size_bytes: int
    states: Mapping[int, tuple[State, int]]
    strays: Mapping[str, int]

    @property
    def owned(self) -> list[int]:
        """The buckets that it owns, ascending."""
        return sorted(bucket for bucket, (state, _) in self.states.items() if state in OWNING)


def disagreements(surveys: Sequence[Survey], bucket_map: BucketMap) -> Iterator[str]:
    """What is not as it must be, a sentence each.

    Buckets between two shards are among them: their move is to be settled.
    """
    for bucket in range(BUCKET_COUNT):
        owners = [
            survey.index
            for survey in surveys
            if bucket in survey.states and survey.states[bucket][0] in OWNING
        ]
        known = bucket_map.shard_index(bucket)
        if len(owners) > 1:
            yield f"bucket {bucket} is owned by shards {owners}: stop all writers and ask for help"
        elif not owners:
            yield f"bucket {bucket} is owned by no shard: settle its move"
        elif owners != [known]:
            yield f"bucket {bucket} is on shard {owners[0]}, the map says {known}: settle its move"
    for survey in surveys:
        for table, count in survey.strays.items():
            yield f"shard {survey.index} holds {count} rows of {table} of buckets it does not know"
