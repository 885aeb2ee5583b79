"""What a database refuses: plain exceptions, for a store to translate into its own errors.

    raise ReferenceTaken(reference) from error

After one of these the transaction is over: its effects are undone, as Postgres does it,
and every further statement in it is a ValueError.
"""


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


class DatabaseRefused(Exception):
    """A database cannot be opened; the message says which file and what to do."""


class DatabaseDamaged(DatabaseRefused):
    """The integrity check found a file that is not sound."""


class MigrationRefused(DatabaseRefused):
    """The applied migrations and the files do not fit together."""
