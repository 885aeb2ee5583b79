"""Where a test may kill a process around a commit, on either engine."""

from shared.crashpoints import CrashPoint

BEFORE_COMMIT = CrashPoint(
    "db.before_commit", "effects are written in the transaction, not committed"
)
AFTER_COMMIT = CrashPoint("db.after_commit", "the commit is durable, no caller knows it yet")
CLAIMED_NOT_EFFECTED = CrashPoint(
    "db.claimed_not_effected", "the key is claimed in its home bucket, its effect has not begun"
)
MIGRATED_NOT_COMMITTED = CrashPoint(
    "db.migrated_not_committed", "a migration is done on one shard and remembered, not committed"
)
