"""Control of a service on Postgres: the schema tenfold_control of its first shard."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar
from uuid import UUID

import asyncpg

from shared.db.errors import DatabaseRefused
from shared.db.limits import CLOSE_S_MAX
from shared.db.load import HALF_LIFE_S, faded
from shared.db.move.port import Move, MoveFailed, Recorded
from shared.db.move.protocol import NOBODY, Decision, Phase, Token
from shared.db.move.sqlite_control import just_ended, map_of_rows, refused
from shared.db.postgres_connection import ERRORS, Server
from shared.db.postgres_primary import connect_to_primary
from shared.db.shards import BucketMap

T = TypeVar("T")
MOVE_TABLE = """
CREATE TABLE IF NOT EXISTS tenfold_control.bucket_move (
    move_id uuid PRIMARY KEY, bucket smallint NOT NULL, src bigint NOT NULL, dst bigint NOT NULL,
    phase text NOT NULL, counter bigint NOT NULL, mover text NOT NULL,
    lease_until_us bigint NOT NULL, facts text NOT NULL, reason text NOT NULL,
    is_collected smallint NOT NULL DEFAULT 0);
CREATE UNIQUE INDEX IF NOT EXISTS bucket_move_of_bucket ON tenfold_control.bucket_move (bucket)
    WHERE phase NOT IN ('DONE', 'ABORTED');
CREATE UNIQUE INDEX IF NOT EXISTS bucket_move_of_source ON tenfold_control.bucket_move (src)
    WHERE phase NOT IN ('DONE', 'ABORTED');
"""
_COLUMNS = "move_id, bucket, src, dst, phase, counter, mover, lease_until_us, facts, reason"
_OPEN = "phase NOT IN ('DONE', 'ABORTED')"
_MINE = "move_id = $1 AND counter = $2 AND mover = $3"
_SELECT = f"SELECT {_COLUMNS} FROM tenfold_control.bucket_move"  # noqa: S608
_INSERT = f"""
INSERT INTO tenfold_control.bucket_move ({_COLUMNS})
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
"""  # noqa: S608
_DECIDE = f"""
UPDATE tenfold_control.bucket_move
SET phase = $4, reason = CASE $5::text WHEN '' THEN reason ELSE $5::text END
WHERE {_MINE} AND phase = ANY ($6::text[])
"""  # noqa: S608
_RENEW = f"""
UPDATE tenfold_control.bucket_move SET lease_until_us = $4 WHERE {_MINE} AND {_OPEN}
"""  # noqa: S608
_TAKE_OVER = f"""
UPDATE tenfold_control.bucket_move SET counter = $2, mover = $3, lease_until_us = $4
WHERE move_id = $1 AND counter < $2 AND lease_until_us <= $5 AND {_OPEN}
"""  # noqa: S608
_POINT = "UPDATE tenfold_control.bucket_map SET shard_id = $2, epoch = $3 WHERE bucket = $1"

_SHARDS = "SELECT shard_id, weight, state FROM tenfold_control.shard ORDER BY shard_id"
_WEIGH = "UPDATE tenfold_control.shard SET weight = $2 WHERE shard_id = $1"

# Processes add at the same moment: in the order of buckets, none waits for one that waits for it.
_ADD_BUSY = f"""
INSERT INTO tenfold_control.bucket_busy AS known (bucket, busy_us, at_us)
SELECT bucket, busy_us, $3::bigint FROM unnest($1::smallint[], $2::bigint[])
    AS told (bucket, busy_us) ORDER BY bucket
ON CONFLICT (bucket) DO UPDATE SET at_us = greatest(known.at_us, excluded.at_us),
    busy_us = excluded.busy_us + known.busy_us
        * power(0.5, greatest(excluded.at_us - known.at_us, 0) / {HALF_LIFE_S * 1e6}::float8)
"""  # noqa: S608
_SELECT_BUSY = "SELECT bucket, busy_us, at_us FROM tenfold_control.bucket_busy"


class PostgresControl:
    """See Control.

    Args:
        server: the service's first shard.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._raw: Any = None
        self._is_kept = False
        self._one_at_a_time = asyncio.Lock()  # the lease is renewed beside the work

    @asynccontextmanager
    async def kept(self) -> AsyncIterator["PostgresControl"]:
        """See Control.kept. One connection, opened anew after a failure."""
        kept = PostgresControl(self._server)
        kept._is_kept = True
        try:
            yield kept
        finally:
            await kept._close()

    async def list_moves(self, *, is_open: bool) -> Sequence[Move]:
        """See Control.list_moves."""
        condition = f"WHERE {_OPEN}" if is_open else ""
        return await self._moves(f"{_SELECT} {condition} ORDER BY move_id DESC")

    async def list_uncollected(self) -> Sequence[Move]:
        """See Control.list_uncollected."""
        return await self._moves(f"{_SELECT} WHERE phase = 'DONE' AND is_collected = 0")

    async def mark_collected(self, move: Move) -> None:
        """See Control.mark_collected."""
        sql = "UPDATE tenfold_control.bucket_move SET is_collected = 1 WHERE move_id = $1"
        await self._run(lambda raw: raw.execute(sql, move.move_id))

    async def highest_token(self, bucket: int) -> Token:
        """See Control.highest_token."""
        sql = "SELECT max(counter) FROM tenfold_control.bucket_move WHERE bucket = $1"
        counter = await self._run(lambda raw: raw.fetchval(sql, bucket))
        return Token(counter, "") if counter is not None else NOBODY

    async def begin(self, move: Move) -> None:
        """See Control.begin."""
        places = (move.move_id, move.bucket, move.src, move.dst, str(move.phase))
        token = (move.token.counter, move.token.mover)
        row = (*places, *token, move.lease_until_us, move.facts, move.reason)
        try:
            await self._run(lambda raw: raw.execute(_INSERT, *row))
        except asyncpg.UniqueViolationError as error:
            for other in await self.list_moves(is_open=True):
                if other.bucket == move.bucket or other.src == move.src:
                    raise refused(move, other) from error
            raise just_ended(move) from error

    async def decide(self, move: Move, decision: Decision, reason: str = "") -> bool:
        """See Control.decide."""
        return await self._run(lambda raw: _decide(raw, move, decision, reason))

    async def finish(self, move: Move, decision: Decision, epoch: int) -> bool:
        """See Control.finish."""

        async def finish(raw: Any) -> bool:  # noqa: ANN401 - asyncpg is untyped
            is_mine = await _decide(raw, move, decision, "")
            if is_mine:
                await raw.execute(_POINT, move.bucket, move.dst, epoch)
            return is_mine

        return await self._run(finish)

    async def renew(self, move: Move, lease_until_us: int) -> bool:
        """See Control.renew."""
        arguments = (*_mine(move), lease_until_us)
        return await self._run(lambda raw: _changed(raw, _RENEW, *arguments))

    async def take_over(self, move: Move, token: Token, lease_until_us: int, now_us: int) -> bool:
        """See Control.take_over."""
        arguments = (move.move_id, token.counter, token.mover, lease_until_us, now_us)
        return await self._run(lambda raw: _changed(raw, _TAKE_OVER, *arguments))

    async def read_map(self) -> BucketMap:
        """See Control.read_map."""
        sql = "SELECT shard_id, epoch FROM tenfold_control.bucket_map ORDER BY bucket"
        rows = await self._run(lambda raw: raw.fetch(sql))
        return map_of_rows([(row["shard_id"], row["epoch"]) for row in rows])

    async def list_shards(self) -> Sequence[Recorded]:
        """See Control.list_shards."""
        rows = await self._run(lambda raw: raw.fetch(_SHARDS))
        return [Recorded(row["shard_id"], row["weight"], row["state"]) for row in rows]

    async def weigh(self, index: int, weight: int) -> bool:
        """See Control.weigh."""
        return await self._run(lambda raw: _changed(raw, _WEIGH, index, weight))

    async def add_busy(self, busy_us: Mapping[int, int], now_us: int) -> None:
        """See Control.add_busy."""
        columns = (list(busy_us), list(busy_us.values()))
        await self._run(lambda raw: raw.execute(_ADD_BUSY, *columns, now_us))

    async def read_busy(self, now_us: int) -> Mapping[int, float]:
        """See Control.read_busy."""
        rows = await self._run(lambda raw: raw.fetch(_SELECT_BUSY))
        return {row["bucket"]: faded(row["busy_us"], now_us - row["at_us"]) for row in rows}

    async def _moves(self, sql: str) -> list[Move]:
        rows = await self._run(lambda raw: raw.fetch(sql))
        return [
            Move(
                move_id=UUID(bytes=row["move_id"].bytes),
                bucket=row["bucket"],
                src=row["src"],
                dst=row["dst"],
                phase=Phase(row["phase"]),
                token=Token(row["counter"], row["mover"]),
                lease_until_us=row["lease_until_us"],
                facts=row["facts"],
                reason=row["reason"],
            )
            for row in rows
        ]

    async def _run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """One transaction."""
        try:
            async with self._connected() as raw, raw.transaction():
                await raw.execute("SET LOCAL synchronous_commit = 'remote_apply'")
                return await work(raw)
        except asyncpg.UniqueViolationError:
            raise
        except asyncpg.UndefinedTableError as error:
            raise DatabaseRefused(
                f"{self._server} has no Control: start the service once, or migrate it"
            ) from error
        except ERRORS as error:
            reason = str(error) or type(error).__name__
            raise MoveFailed(f"{self._server.name} cannot be used now: {reason}") from error

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        async with self._one_at_a_time:
            if self._raw is None or self._raw.is_closed():
                self._raw = await connect_to_primary(self._server)
            try:
                yield self._raw
            except BaseException:
                self._raw.terminate()  # what it is in the middle of is not known here
                raise
            finally:
                if not self._is_kept:
                    await self._close()

    async def _close(self) -> None:
        if self._raw is not None:
            with suppress(*ERRORS):
                await asyncio.shield(self._raw.close(timeout=CLOSE_S_MAX))


async def _decide(raw: Any, move: Move, decision: Decision, reason: str) -> bool:  # noqa: ANN401
    before = [str(phase) for phase in decision.before]
    return await _changed(raw, _DECIDE, *_mine(move), str(decision.after), reason, before)


async def _changed(raw: Any, sql: str, *arguments: object) -> bool:  # noqa: ANN401
    tag: str = await raw.execute(sql, *arguments)
    return tag.endswith(" 1")


def _mine(move: Move) -> tuple[UUID, int, str]:
    return move.move_id, move.token.counter, move.token.mover
