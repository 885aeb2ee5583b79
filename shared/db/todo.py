"""Steps that must happen after a commit, whoever takes them.

The transaction that makes a step necessary writes its row; the caller takes the step at
once and deletes the row; if it dies, a worker finds the row when it is due.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from shared.clock import CLOCKS_APART_US
from shared.db.port import Shard, Transaction

DUE_ROWS_MAX = 100
BACKOFF_FIRST_US = 500_000
BACKOFF_MAX_US = 60_000_000

_INSERT = """
INSERT INTO todo (bucket, id, kind, next_at_us, payload) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (bucket, id, kind) DO NOTHING
"""
_DELETE = "DELETE FROM todo WHERE bucket = $1 AND id = $2 AND kind = $3"
_POSTPONE = """
UPDATE todo SET tries = tries + 1, next_at_us = $4 WHERE bucket = $1 AND id = $2 AND kind = $3
"""
_DUE = f"""
SELECT bucket, id, kind, tries, payload FROM todo
WHERE kind = $1 AND (next_at_us <= $2 OR next_at_us > $3) AND tenfold_owned(bucket)
ORDER BY next_at_us LIMIT {DUE_ROWS_MAX}
"""  # noqa: S608 - a constant of ours


@dataclass(frozen=True)
class Todo:
    """One step.

    Attributes:
        bucket: where the row is.
        id: of what the step is about; one step of a kind for each.
        kind: which step.
        payload: what the step needs to know.
        tries: how often it has failed.
    """

    bucket: int
    id: UUID
    kind: str
    payload: bytes
    tries: int = 0


async def add_todo(tx: Transaction, todo: Todo, *, next_at_us: int) -> None:
    """Make sure that the step is taken from next_at_us on; repeating it is harmless.

    It is at most a minute from now.
    """
    await tx.execute(_INSERT, todo.bucket, todo.id, todo.kind, next_at_us, todo.payload)


async def finish_todo(tx: Transaction, todo: Todo) -> None:
    """The step has been taken; harmless if another has finished it before."""
    await tx.execute(_DELETE, todo.bucket, todo.id, todo.kind)


async def postpone_todo(tx: Transaction, todo: Todo, *, now_us: int) -> None:
    """The step has failed: try again later, later each time, at most a minute."""
    wait_us = min(BACKOFF_FIRST_US << min(todo.tries, 20), BACKOFF_MAX_US)
    await tx.execute(_POSTPONE, todo.bucket, todo.id, todo.kind, now_us + wait_us)


async def list_due_todos(shard: Shard, kind: str, *, now_us: int) -> Sequence[Todo]:
    """Steps of one kind that are due on a shard, the longest due first; at most 100.

    One that is due later than any can be was put off before the clock was set back.
    """
    rows = await shard.fetch_all(_DUE, kind, now_us, now_us + BACKOFF_MAX_US + CLOCKS_APART_US)
    return [
        Todo(row["bucket"], row["id"], row["kind"], row["payload"], row["tries"]) for row in rows
    ]
