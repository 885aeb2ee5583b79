"""What a move needs of Control and of a shard; SQLite and Postgres each implement it."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, Self
from uuid import UUID

from shared.clock import is_over
from shared.db.move.protocol import NOBODY, Change, Decision, Phase, State, Token
from shared.db.shards import BucketMap

Key = tuple[object, ...]
"""The columns that tell a row from the others of its bucket, in the order of its table's key."""


LEASE_US_MAX = 60_000_000


class MoveRefused(Exception):
    """A move cannot begin; the sentence says why and what to do. Nothing has been changed."""


class MoveFailed(Exception):
    """A move cannot be finished: it is aborted with this reason."""


class MoveLost(Exception):
    """Another mover has taken this move over: whoever is told so changes nothing any more."""


@dataclass(frozen=True)
class Move:
    """A row of bucket_move.

    Attributes:
        src, dst: shard indexes.
        lease_until_us: from then on another mover may take it over.
        facts: what must not change between the first step and the fence: timelines, schema.
        reason: why it was aborted, or "".
    """

    move_id: UUID
    bucket: int
    src: int
    dst: int
    phase: Phase
    token: Token
    lease_until_us: int
    facts: str
    reason: str = ""

    def is_left(self, now_us: int) -> bool:
        """Whether its mover has died, as far as its lease tells."""
        return is_over(self.lease_until_us, now_us=now_us, lasts_us=LEASE_US_MAX)


@dataclass(frozen=True)
class Held:
    """What a shard says of a bucket."""

    state: State
    token: Token = NOBODY
    move_id: UUID | None = None
    epoch: int = 0
    fence_until_us: int = 0


@dataclass(frozen=True)
class Shape:
    """A table as a move sees it.

    Attributes:
        columns: all that are copied, in the table's order.
        key: of those, the ones that identify a row within its bucket.
        page_order: what pages follow: the key, or the identity column of a table that has one.
        numbered: the identity column, which each shard fills itself, or "".
        kinds: column -> its declared type, lower case.
    """

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    page_order: tuple[str, ...]
    numbered: str
    kinds: Mapping[str, str]

    def key_of(self, row: Sequence[object]) -> Key:
        """The key of a row of `columns`."""
        return tuple(row[self.columns.index(name)] for name in self.key)


@dataclass(frozen=True)
class Page:
    """Rows of one table, and where the next page begins; `last` is "" with no rows."""

    rows: Sequence[tuple[object, ...]]
    last: str


@dataclass(frozen=True)
class Batch:
    """What was written since the copy began, read in one snapshot.

    Attributes:
        seqs: the marks to delete once the rows are at the destination.
        rows: by table, the present rows of the marked keys.
        gone: by table, the marked keys that have no row any more.
        left: marks beyond these.
    """

    seqs: Sequence[int]
    rows: Mapping[str, Sequence[tuple[object, ...]]]
    gone: Mapping[str, Sequence[Key]]
    left: int


@dataclass(frozen=True)
class Recorded:
    """A shard as Control has it.

    Attributes:
        weight: how much of the load it shall carry, relative to the others; 0 for none.
        state: ACTIVE; ADDING or NEW as long as it has not got its tables.
    """

    index: int
    weight: int
    state: str

    @property
    def is_active(self) -> bool:
        """Whether it may be used."""
        return self.state == "ACTIVE"


class Control(Protocol):
    """The small database that holds the map, and each move's one decision."""

    def kept(self) -> AbstractAsyncContextManager[Self]:
        """The same, ready to answer at once: a fenced bucket waits for it."""
        ...

    async def list_moves(self, *, is_open: bool) -> Sequence[Move]:
        """Moves, the newest first; the unfinished alone if `is_open`."""
        ...

    async def list_uncollected(self) -> Sequence[Move]:
        """Moves that are done, whose source may still hold rows."""
        ...

    async def mark_collected(self, move: Move) -> None:
        """The source holds no row of the bucket any more."""
        ...

    async def highest_token(self, bucket: int) -> Token:
        """The highest token that Control remembers of a bucket."""
        ...

    async def begin(self, move: Move) -> None:
        """Write the row of a new move.

        Raises:
            MoveRefused: the bucket, or the source shard, is on an open move already.
        """
        ...

    async def decide(self, move: Move, decision: Decision, reason: str = "") -> bool:
        """Take one step; False if the move is not this token's or not where the step begins."""
        ...

    async def finish(self, move: Move, decision: Decision, epoch: int) -> bool:
        """As decide, and point the map at the destination in the same commit."""
        ...

    async def renew(self, move: Move, lease_until_us: int) -> bool:
        """Hold on to a move; False if it is another's."""
        ...

    async def take_over(self, move: Move, token: Token, lease_until_us: int, now_us: int) -> bool:
        """Make a move that was left this token's; False if its lease runs, or it has ended."""
        ...

    async def read_map(self) -> BucketMap:
        """Where buckets were when the last move was done; a hint."""
        ...

    async def list_shards(self) -> Sequence[Recorded]:
        """Every shard, by index."""
        ...

    async def weigh(self, index: int, weight: int) -> bool:
        """Set a shard's weight; False if there is no such shard."""
        ...

    async def add_busy(self, busy_us: Mapping[int, int], now_us: int) -> None:
        """Add statement time by bucket; see shared/db/load.py."""
        ...

    async def read_busy(self, now_us: int) -> Mapping[int, float]:
        """Statement time by bucket, as much as it counts now, in microseconds."""
        ...


class Side(Protocol):
    """One shard, seen by the mover of one bucket. False always means: not yours any more."""

    @property
    def index(self) -> int:
        """The shard's."""
        ...

    @property
    def shapes(self) -> Sequence[Shape]:
        """Every table that has a bucket: those of services and those of the framework."""
        ...

    async def facts(self) -> str:
        """Timeline and schema: a move does not survive a change of either."""
        ...

    async def look(self) -> Held:
        """The bucket's row."""
        ...

    async def change(
        self,
        change: Change,
        move: Move,
        *,
        peer: int | None = None,
        epoch: int = 0,
        fence_until_us: int = 0,
        facts: str = "",
    ) -> bool:
        """One step of the table, alone with the bucket.

        Args:
            change: its guard, and what it leaves.
            move: whose token must fit.
            peer: where writers are sent.
            epoch: to set; 0 raises the shard's own by what the step says.
            fence_until_us: until when a fenced bucket may still be read.
            facts: refuse if they are others now; "" for no matter.
        """
        ...

    async def take(self, token: Token) -> bool:
        """Raise the bucket's token, whatever its state."""
        ...

    async def read_page(self, shape: Shape, after: str, rows_max: int) -> Page:
        """The next rows of a bucket; no transaction outlives the call."""
        ...

    async def read_rows(self, shape: Shape, keys: Collection[Key]) -> Mapping[Key, Key]:
        """Rows as they are now, by key."""
        ...

    async def read_range(
        self, shape: Shape, after: str, last: str, rows_max: int
    ) -> tuple[Mapping[Key, Key], str]:
        """Rows by key beyond `after`, up to `last` if it is given; and the last key's text."""
        ...

    async def count_rows(self, shape: Shape) -> int:
        """How many rows of the bucket a table has."""
        ...

    async def read_dirty(self, move: Move, marks_max: int) -> Batch | None:
        """What was written and not yet carried over; None: not yours any more."""
        ...

    async def acknowledge(self, move: Move, seqs: Sequence[int]) -> bool:
        """Delete marks whose rows are at the destination."""
        ...

    async def mark_dirty(self, move: Move, shape: Shape, keys: Collection[Key]) -> bool:
        """Have these rows carried over again."""
        ...

    async def mark_count(self) -> int:
        """Marks that wait, at least as many as there are: a look that costs nothing."""
        ...

    async def misses_standby(self) -> bool:
        """Whether its commits wait for a synchronous standby that is not there."""
        ...

    async def unsent_count(self) -> int:
        """Events of the bucket that wait for their relay."""
        ...

    async def apply(
        self, move: Move, batch: Batch, cursor: tuple[str, str, int] | None = None
    ) -> bool:
        """Write rows as they were at the source, no trigger asked.

        Args:
            move: whose token must fit.
            batch: rows to write and keys to delete.
            cursor: (table, where its next page begins, rows so far), kept in the same commit.
        """
        ...

    async def analyze(self, shape: Shape) -> None:
        """Have the planner know of the rows that have come, before others ask for them."""
        ...

    async def read_cursors(self, move: Move) -> Mapping[str, tuple[str, int]]:
        """How far the copy has come: by table, where the next page begins, rows so far."""
        ...

    async def is_on_standby(self) -> bool:
        """Whether a replica has all that the shard has now; also if there is none."""
        ...

    async def delete_page(self, move: Move, state: State, rows_max: int) -> int | None:
        """Delete rows of a bucket that is in this state; 0 when none is left, None: not yours."""
        ...
