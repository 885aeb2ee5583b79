"""What a database refuses: plain exceptions, for a store to translate into its own errors.

    raise ReferenceTaken(reference) from error

After one of these the transaction is over: its effects are undone, as Postgres does it,
and every further statement in it is a ValueError.
"""

import json


class ConstraintViolation(Exception):
    """A rule of the schema forbids this write.

    Args:
        constraint: the rule's name: of a CHECK, or what a trigger raised;
            "not_null:<table>.<column>" and "foreign_key" where SQL gives no name.
    """

    def __init__(self, constraint: str) -> None:
        super().__init__(constraint)
        self.constraint = constraint


class UniqueViolation(ConstraintViolation):
    """A row with this key is there: `constraint` is the index, "<table>_pkey" the primary key."""


class BucketNotAdmitted(ConstraintViolation):
    """A write to a bucket that this transaction was not opened for: a bug in the caller."""


class BucketElsewhere(Exception):
    """The shard does not take writes of this bucket: the map is old, or the bucket is moving.

    Args:
        bucket: the first that was refused.
        state: the shard's word for it.
        peer: the shard index that has it now, if the shard knows.
    """

    def __init__(self, bucket: int, state: str, peer: int | None) -> None:
        super().__init__(f"bucket {bucket} is {state}")
        self.bucket = bucket
        self.state = state
        self.peer = peer

    @classmethod
    def of_detail(cls, detail: str) -> "BucketElsewhere":
        """What tenfold_enter said."""
        told = json.loads(detail)
        peer = told.get("peer")
        return cls(told["bucket"], told["state"], None if peer is None else int(peer))


class DatabaseRefused(Exception):
    """A database cannot be opened; the message says which file or shard, and what to do."""


class DatabaseDamaged(DatabaseRefused):
    """The integrity check found a file that is not sound."""


class MigrationRefused(DatabaseRefused):
    """The applied migrations and the files do not fit together."""
