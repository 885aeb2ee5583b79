"""Control of a folder of SQLite files: control.sqlite, beside the shards."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from shared.db.errors import DatabaseRefused
from shared.db.ids import BUCKET_COUNT
from shared.db.load import faded
from shared.db.move.port import Move, MoveFailed, MoveRefused, Recorded
from shared.db.move.protocol import CLOSED, NOBODY, Decision, Phase, Token
from shared.db.shards import BucketMap

T = TypeVar("T")
BUSY_S_MAX = 5.0
MOVE_TABLE = """
CREATE TABLE IF NOT EXISTS bucket_move (
    move_id text PRIMARY KEY, bucket smallint NOT NULL, src bigint NOT NULL, dst bigint NOT NULL,
    phase text NOT NULL, counter bigint NOT NULL, mover text NOT NULL,
    lease_until_us bigint NOT NULL, facts text NOT NULL, reason text NOT NULL,
    is_collected smallint NOT NULL DEFAULT 0);
CREATE UNIQUE INDEX IF NOT EXISTS bucket_move_of_bucket ON bucket_move (bucket)
    WHERE phase NOT IN ('DONE', 'ABORTED');
CREATE UNIQUE INDEX IF NOT EXISTS bucket_move_of_source ON bucket_move (src)
    WHERE phase NOT IN ('DONE', 'ABORTED');
"""
_COLUMNS = "move_id, bucket, src, dst, phase, counter, mover, lease_until_us, facts, reason"
_OPEN = "phase NOT IN ('DONE', 'ABORTED')"
_MINE = "move_id = ? AND counter = ? AND mover = ?"

_BUSY_TABLE = """
CREATE TABLE IF NOT EXISTS bucket_busy (
    bucket smallint PRIMARY KEY, busy_us double precision NOT NULL, at_us bigint NOT NULL)
"""
_SELECT_BUSY = "SELECT bucket, busy_us, at_us FROM bucket_busy"
_SET_BUSY = "INSERT OR REPLACE INTO bucket_busy (bucket, busy_us, at_us) VALUES (?, ?, ?)"


class SqliteControl:
    """See Control.

    Args:
        path: of control.sqlite, which is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @asynccontextmanager
    async def kept(self) -> AsyncIterator["SqliteControl"]:
        """See Control.kept. To open a file costs nothing."""
        yield self

    async def list_moves(self, *, is_open: bool) -> Sequence[Move]:
        """See Control.list_moves."""
        condition = f"WHERE {_OPEN}" if is_open else ""
        sql = f"SELECT {_COLUMNS} FROM bucket_move {condition} ORDER BY rowid DESC"  # noqa: S608
        rows = await self._run(lambda control: control.execute(sql).fetchall(), is_write=False)
        return [_move_of_row(row) for row in rows]

    async def list_uncollected(self) -> Sequence[Move]:
        """See Control.list_uncollected."""
        sql = f"SELECT {_COLUMNS} FROM bucket_move WHERE phase = 'DONE' AND is_collected = 0"  # noqa: S608
        rows = await self._run(lambda control: control.execute(sql).fetchall(), is_write=False)
        return [_move_of_row(row) for row in rows]

    async def mark_collected(self, move: Move) -> None:
        """See Control.mark_collected."""
        sql = "UPDATE bucket_move SET is_collected = 1 WHERE move_id = ?"
        await self._run(lambda control: control.execute(sql, (str(move.move_id),)))

    async def highest_token(self, bucket: int) -> Token:
        """See Control.highest_token."""
        sql = "SELECT max(counter) FROM bucket_move WHERE bucket = ?"
        row = await self._run(
            lambda control: control.execute(sql, (bucket,)).fetchone(), is_write=False
        )
        return Token(row[0], "") if row[0] is not None else NOBODY

    async def begin(self, move: Move) -> None:
        """See Control.begin."""
        sql = f"INSERT INTO bucket_move ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
        try:
            await self._run(lambda control: control.execute(sql, _row_of_move(move)))
        except sqlite3.IntegrityError as error:
            for other in await self.list_moves(is_open=True):
                if other.bucket == move.bucket or other.src == move.src:
                    raise refused(move, other) from error
            raise just_ended(move) from error

    async def decide(self, move: Move, decision: Decision, reason: str = "") -> bool:
        """See Control.decide."""
        return await self._run(lambda control: _decide(control, move, decision, reason))

    async def finish(self, move: Move, decision: Decision, epoch: int) -> bool:
        """See Control.finish."""

        def finish(control: sqlite3.Connection) -> bool:
            is_mine = _decide(control, move, decision, "")
            if is_mine:
                control.execute(
                    "UPDATE bucket_map SET shard_id = ?, epoch = ? WHERE bucket = ?",
                    (move.dst, epoch, move.bucket),
                )
            return is_mine

        return await self._run(finish)

    async def renew(self, move: Move, lease_until_us: int) -> bool:
        """See Control.renew."""
        sql = f"UPDATE bucket_move SET lease_until_us = ? WHERE {_MINE} AND {_OPEN}"  # noqa: S608
        arguments = (lease_until_us, *_mine(move))
        return await self._run(lambda control: control.execute(sql, arguments).rowcount == 1)

    async def take_over(self, move: Move, token: Token, lease_until_us: int, now_us: int) -> bool:
        """See Control.take_over."""
        sql = f"""
            UPDATE bucket_move SET counter = ?, mover = ?, lease_until_us = ?
            WHERE move_id = ? AND counter < ? AND lease_until_us <= ? AND {_OPEN}
        """  # noqa: S608
        new = (token.counter, token.mover, lease_until_us)
        arguments = (*new, str(move.move_id), token.counter, now_us)
        return await self._run(lambda control: control.execute(sql, arguments).rowcount == 1)

    async def read_map(self) -> BucketMap:
        """See Control.read_map."""
        sql = "SELECT shard_id, epoch FROM bucket_map ORDER BY bucket"
        rows = await self._run(lambda control: control.execute(sql).fetchall(), is_write=False)
        return map_of_rows(rows)

    async def list_shards(self) -> Sequence[Recorded]:
        """See Control.list_shards."""
        sql = "SELECT shard_id, weight, state FROM shard ORDER BY shard_id"
        rows = await self._run(lambda control: control.execute(sql).fetchall(), is_write=False)
        return [Recorded(*row) for row in rows]

    async def weigh(self, index: int, weight: int) -> bool:
        """See Control.weigh."""
        sql = "UPDATE shard SET weight = ? WHERE shard_id = ?"
        return await self._run(lambda control: control.execute(sql, (weight, index)).rowcount == 1)

    async def add_busy(self, busy_us: Mapping[int, int], now_us: int) -> None:
        """See Control.add_busy."""

        def add(control: sqlite3.Connection) -> None:
            control.execute(_BUSY_TABLE)
            before = _faded_rows(control.execute(_SELECT_BUSY).fetchall(), now_us)
            control.executemany(
                _SET_BUSY,
                [(bucket, before.get(bucket, 0) + us, now_us) for bucket, us in busy_us.items()],
            )

        await self._run(add)

    async def read_busy(self, now_us: int) -> Mapping[int, float]:
        """See Control.read_busy."""

        def read(control: sqlite3.Connection) -> Mapping[int, float]:
            is_there = control.execute("SELECT 1 FROM sqlite_master WHERE name = 'bucket_busy'")
            if is_there.fetchone() is None:
                return {}
            return _faded_rows(control.execute(_SELECT_BUSY).fetchall(), now_us)

        return await self._run(read, is_write=False)

    async def _run(self, work: Callable[[sqlite3.Connection], T], *, is_write: bool = True) -> T:
        """One transaction on a connection of its own: the lease is renewed beside the work."""

        def run() -> T:
            try:
                with _transaction(self._path, is_write) as control:
                    return work(control)
            except sqlite3.OperationalError as error:
                raise MoveFailed(f"{self._path.name} cannot be used now: {error}") from error

        return await asyncio.to_thread(run)


def _faded_rows(rows: Sequence[tuple[int, float, int]], now_us: int) -> dict[int, float]:
    return {bucket: faded(busy_us, now_us - at_us) for bucket, busy_us, at_us in rows}


def map_of_rows(rows: Sequence[tuple[int, int]]) -> BucketMap:
    """The map of (shard_id, epoch), by bucket; epochs only grow, and so does its version."""
    version = 1 + sum(epoch for _, epoch in rows) - BUCKET_COUNT
    return BucketMap(max(version, 1), tuple(shard_id for shard_id, _ in rows))


@contextmanager
def _transaction(path: Path, is_write: bool) -> Iterator[sqlite3.Connection]:
    try:
        control = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise DatabaseRefused(f"cannot open {path}: {error}") from error
    try:
        control.execute(f"PRAGMA busy_timeout = {int(BUSY_S_MAX * 1000)}")
        control.execute("PRAGMA synchronous = FULL")
        control.execute("BEGIN IMMEDIATE" if is_write else "BEGIN")
        yield control
        control.execute("COMMIT")
    finally:
        control.close()  # without a COMMIT, nothing has happened


def _decide(control: sqlite3.Connection, move: Move, decision: Decision, reason: str) -> bool:
    before = ", ".join(f"'{phase}'" for phase in sorted(decision.before))
    sql = f"""
        UPDATE bucket_move SET phase = ?, reason = CASE ? WHEN '' THEN reason ELSE ? END
        WHERE {_MINE} AND phase IN ({before})
    """  # noqa: S608
    arguments = (str(decision.after), reason, reason, *_mine(move))
    return control.execute(sql, arguments).rowcount == 1


def _mine(move: Move) -> tuple[str, int, str]:
    return str(move.move_id), move.token.counter, move.token.mover


def _move_of_row(row: Sequence[object]) -> Move:
    move_id, bucket, src, dst, phase, counter, mover, lease_until_us, facts, reason = row
    assert isinstance(bucket, int) and isinstance(src, int) and isinstance(dst, int)
    assert isinstance(counter, int) and isinstance(lease_until_us, int)
    return Move(
        move_id=UUID(str(move_id)),
        bucket=bucket,
        src=src,
        dst=dst,
        phase=Phase(str(phase)),
        token=Token(counter, str(mover)),
        lease_until_us=lease_until_us,
        facts=str(facts),
        reason=str(reason),
    )


def _row_of_move(move: Move) -> tuple[object, ...]:
    places = (str(move.move_id), move.bucket, move.src, move.dst, str(move.phase))
    token = (move.token.counter, move.token.mover)
    return (*places, *token, move.lease_until_us, move.facts, move.reason)


def refused(move: Move, other: Move) -> MoveRefused:
    """Why a move cannot begin beside another."""
    what = f"bucket {move.bucket}" if other.bucket == move.bucket else f"shard {move.src}"
    return MoveRefused(
        f"{what} is on a move already (bucket {other.bucket} from shard {other.src} to "
        f"{other.dst}, {other.phase}): let it end, or abort it"
    )


def just_ended(move: Move) -> MoveRefused:
    """Why a move cannot begin although nobody is in its way any more."""
    return MoveRefused(
        f"a move of bucket {move.bucket}, or from shard {move.src}, has just ended: try again"
    )


assert {Phase.DONE, Phase.ABORTED} == CLOSED  # as the conditions above say
