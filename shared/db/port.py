"""Database, Transaction: the interface that SQLite and Postgres share.

A service's data lives in shards; a shard holds some of the 4,096 buckets. Every
write is one transaction of one bucket (a few may join when they share a shard):
business rows, the idempotency row and outbox rows commit together.

SQL is written once, in the subset both engines speak: $1 parameters, types
uuid, text, bigint, smallint, bytea and boolean, moments as bigint microseconds
(shared.clock.to_us), RETURNING, ON CONFLICT. No min or max of uuids: Postgres below 18 has none.
A trailing FOR UPDATE is honoured
by Postgres; SQLite's writer is alone anyway. RETURNING on SQLite gives a row as the statement
wrote it, before triggers: what a trigger computes (version, a balance) is read by a SELECT. A
uuid comes back as UUID from any result column that is, or is named like, a uuid column of the
schema; an aggregate under another name gives bytes on SQLite.

Every statement on a service's own table filters by tenant; one that must not says
/* any tenant: why */, or it is refused with a ValueError.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from uuid import UUID

from shared.identity import Principal

Row = Mapping[str, Any]


def only(rows: Sequence[Row]) -> Row | None:
    """The only row, or None. Several are a bug: ValueError."""
    if len(rows) > 1:
        raise ValueError(f"{len(rows)} rows where at most one was expected")
    return rows[0] if rows else None


@dataclass(frozen=True)
class Once:
    """The identity of an effect that must happen once.

    Attributes:
        principal: who asked; its tenant, kind and subject scope the key.
        method: the full RPC method name, "/package.Service/Method".
        request_id: the client's key, 1 to 255 characters; "" when the method needs none
            and none was given, and then nothing is remembered.
        fingerprint: SHA-256 of the canonical request without its request id.
        on_replay: called when the effect has happened before, so that the answer can say so.
    """

    principal: Principal
    method: str
    request_id: str
    fingerprint: bytes
    on_replay: Callable[[], None] = field(default=lambda: None, compare=False)

    @property
    def scope(self) -> str:
        """What the key is unique within."""
        principal = self.principal
        parts = (principal.tenant, str(principal.kind), principal.subject, self.method)
        return "\x1f".join(parts)  # a separator that no part may hold; Postgres refuses \0


@dataclass(frozen=True)
class OutboxRow:
    """One event or job, to be published after the transaction commits.

    Attributes:
        type: the message's full name ("tenfold.ledger.v1.TransactionPosted"), or a job's
            name for a work queue.
        aggregate: resource name the event is about; events of one aggregate are numbered
            without a gap and published in order.
        payload: the serialized message.
        tenant: whose event it is.
        bucket: where consumers apply it; None for the transaction's own bucket.
        queue: "" for an event (evt.<service>.<Type>.<bucket>), else the work queue's name
            (wrk.<service>.<queue>.<bucket>).
    """

    type: str
    aggregate: str
    payload: bytes
    tenant: str
    bucket: int | None = None
    queue: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class Transaction(Protocol):
    """One open write transaction of one bucket. It belongs to one task.

    Leaving the `async with` block commits and returns only when the commit is
    durable; leaving it by an exception rolls back. A FailedPrecondition raised in a
    transaction with a request id rolls back the effects and stores the refusal, so
    that a retry is refused alike.
    """

    @property
    def bucket(self) -> int:
        """The bucket that this transaction was admitted to."""
        ...

    @property
    def answered(self) -> bool:
        """Whether this request id has had its effect: repeat `answer`, do nothing."""
        ...

    @property
    def answer(self) -> bytes:
        """What answer_with stored the first time; b"" if not answered."""
        ...

    async def fetch_one(self, sql: str, *arguments: object) -> Row | None:
        """The only row, or None. Several rows are a bug: ValueError."""
        ...

    async def fetch_all(self, sql: str, *arguments: object) -> Sequence[Row]:
        """Every row, in the statement's order."""
        ...

    async def execute(self, sql: str, *arguments: object) -> int:
        """The number of rows that were changed.

        Raises:
            UniqueViolation, ConstraintViolation: shared.db.errors, naming the constraint;
                the transaction is over then, and further statements in it are a ValueError.
        """
        ...

    async def append_outbox(self, row: OutboxRow) -> None:
        """Publish this after the commit: at least once, in order per aggregate."""
        ...

    def wake_relay(self) -> None:
        """Say that the transaction wrote outbox rows by a statement of its own."""
        ...

    async def answer_with(self, payload: bytes) -> None:
        """Remember the answer under the request id; without one, do nothing."""
        ...


class Reader(Protocol):
    """Reads that need no transaction of their own; each call sees one snapshot."""

    async def fetch_one(self, sql: str, *arguments: object) -> Row | None:
        """See Transaction.fetch_one."""
        ...

    async def fetch_all(self, sql: str, *arguments: object) -> Sequence[Row]:
        """See Transaction.fetch_all."""
        ...


class Bucket(Reader, Protocol):
    """One bucket where it lives now."""

    @property
    def number(self) -> int:
        """0 to 4095."""
        ...

    @property
    def causal(self) -> Reader:
        """Reads that a replica may answer, if the call's contract says `causal_reads`.

        What they see is no older than the caller's own writes (shared/causal.py), and at most a
        lag guard old for all others'. They go to the primary in every other call, outside of
        calls, and where no replica is new enough. Inside a transaction they are a ValueError:
        no decision rests on them.
        """
        ...

    def transaction(
        self, once: Once | None = None, *, also: Collection[int] = ()
    ) -> AbstractAsyncContextManager[Transaction]:
        """Open a write transaction, admitted to this bucket and to those in `also`.

        Args:
            once: makes the effect happen once per request id; None when the caller has
                its own way (an inbox row, a unique key).
            also: further buckets; they must live on the same shard.

        Raises:
            IdempotencyKeyReused: the request id came with another request, in this bucket
                or in any other.
            FailedPrecondition: the stored refusal of the first request.
            Unavailable: the bucket is moving or its shard is down; retry_after_s is set.
            DeadlineExceeded: the caller's deadline passed while waiting for the writer.
        """
        ...


@dataclass(frozen=True)
class Covered:
    """What one shard answered, and for which buckets it spoke.

    Attributes:
        rows: in the statement's order.
        epochs: the epoch of each bucket that the shard owned when it read the rows.
    """

    rows: Sequence[Row]
    epochs: Mapping[int, int]


class Shard(Reader, Protocol):
    """One database of one service."""

    @property
    def index(self) -> int:
        """0 to shard_count - 1."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a write transaction admitted to every bucket that this shard owns.

        For what serves the shard as a whole: relays, sweepers, leases. Its `bucket` is -1
        and it has no request id; append_outbox in it is a ValueError.
        """
        ...

    async def fetch_covered(self, sql: str, *arguments: object, is_causal: bool = False) -> Covered:
        """Rows, and the buckets that this shard owned in the same snapshot.

        Args:
            sql: filters its rows by tenfold_owned(<table>.bucket).
            arguments: of the statement.
            is_causal: whether a replica may answer; see Bucket.causal.
        """
        ...


class Shards(Protocol):
    """All of one service's shards: routes a key to its bucket."""

    def holding(self, key: UUID) -> Bucket:
        """The bucket that an id carries."""
        ...

    def bucket(self, number: int) -> Bucket:
        """The bucket of that number, 0 to 4095."""
        ...

    @property
    def engine(self) -> Literal["postgres", "sqlite"]:
        """Whose SQL is spoken, for the few statements that both do not share."""
        ...

    def shard_index(self, bucket: int) -> int:
        """The shard that has a bucket, as far as this process knows."""
        ...

    def all(self) -> Sequence[Shard]:
        """Every shard that is known by now, for scatter reads and relays."""
        ...

    async def learn(self) -> bool:
        """Open shards that were added meanwhile; whether there were any.

        It is asked every few seconds, and where a bucket cannot be found. False also where
        nobody can say.
        """
        ...

    async def wait_for_more(self, count: int) -> None:
        """Return when there are more shards than that."""
        ...

    async def settle_moves(self) -> None:
        """End moves whose movers have died, if that can be done now.

        What is written of a bucket on its way is marked for its mover, and marks take room.
        """
        ...

    async def wait_for_outbox(self, timeout_s: float) -> bool:
        """Wait for a commit with outbox rows in it; False if none came in time.

        Commits of other processes on the same database are not seen: relays also poll.
        """
        ...
