"""One Postgres database as the mover of one bucket sees it.

A step that changes the bucket's state is alone with its granule (spec/data.md §3): the lock
waits for every writer that has entered, but never long, or writers would queue up behind it. A
step that moves rows holds the bucket's row FOR SHARE, so that no other mover can take the token
before it commits.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, TypeVar
from uuid import UUID

import asyncpg

from shared.db.errors import DatabaseRefused
from shared.db.limits import CLOSE_S_MAX
from shared.db.move.port import Batch, Held, Key, Move, MoveFailed, Page, Shape
from shared.db.move.postgres_shapes import Tables, Unique, read_tables
from shared.db.move.protocol import Change, State, Token
from shared.db.move.shapes import key_of_text, text_of_key
from shared.db.postgres_connection import ERRORS, TIMELINE, Server
from shared.db.postgres_primary import connect_to_primary, has_received, is_behind_gate

T = TypeVar("T")
Lock = Literal["none", "share", "alone"]
GRANULE_MASK = 63
GRANULE_CLASS = 1413826126  # as in tenfold_enter
LOCK_MS_MAX = 200
TRIES_MAX = 60
PAUSE_S = 0.05

_HELD = """
SELECT state, mtoken, mholder, move_id, epoch, coalesce(fence_until_us, 0) AS fence_until_us
FROM tenfold_bucket WHERE bucket = $1
"""
_WRITE = """
INSERT INTO tenfold_bucket (bucket, state, epoch, move_id, mtoken, mholder, peer, fence_until_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, CASE $8::bigint WHEN 0 THEN NULL ELSE
    $8::bigint + (extract(epoch FROM clock_timestamp()) * 1000000)::bigint END)
ON CONFLICT (bucket) DO UPDATE SET state = excluded.state, epoch = excluded.epoch,
    move_id = excluded.move_id, mtoken = excluded.mtoken, mholder = excluded.mholder,
    peer = excluded.peer, fence_until_us = excluded.fence_until_us
"""
_TAKE = """
INSERT INTO tenfold_bucket (bucket, state, epoch, mtoken, mholder) VALUES ($1, 'ABSENT', 0, $2, $3)
ON CONFLICT (bucket) DO UPDATE SET mtoken = excluded.mtoken, mholder = excluded.mholder
"""
_CURSOR = """
INSERT INTO tenfold_cursor (move_id, tbl, last_pk, row_count) VALUES ($1, $2, $3, $4)
ON CONFLICT (move_id, tbl) DO UPDATE SET last_pk = excluded.last_pk, row_count = excluded.row_count
"""
_MAY_IMPORT_VERBATIM = """
SELECT current_setting('is_superuser') = 'on' OR (
    current_setting('server_version_num')::int >= 150000
    AND has_parameter_privilege(current_user, 'session_replication_role', 'SET'))
"""
_FACTS = f"SELECT {TIMELINE} AS timeline, schema_version FROM tenfold_shard"  # noqa: S608
# Keys and pages are found by index, whatever the planner thinks: of a bucket that has just come,
# or just gone, its statistics know nothing.
_BY_INDEX = """
SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off;
SET plan_cache_mode = force_custom_plan
"""
# COPY is several times faster than INSERT, and asyncpg can do it with these.
_COPIED_KINDS = frozenset({"smallint", "integer", "bigint", "boolean", "text", "uuid", "bytea"})
_LOG_END = f"SELECT {TIMELINE} AS timeline, pg_current_wal_lsn()::text AS lsn"
_CARRIED = (State.MOVING, State.FENCED)
_MARK_SPAN = """
SELECT coalesce(max(seq) - min(seq) + 1, 0) FROM tenfold_dirty WHERE bucket = $1
"""
_MISSES_STANDBY = """
SELECT current_setting('synchronous_standby_names') <> ''
    AND pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')
    AND NOT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum'))
"""
_LOST_RACES = (
    asyncpg.LockNotAvailableError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
)


class PostgresSide:
    """See Side. Open it with `opened`."""

    def __init__(
        self,
        server: Server,
        index: int,
        bucket: int,
        *,
        connection: Any,  # noqa: ANN401 - asyncpg is untyped
        tables: Tables,
        is_verbatim: bool,
        is_gatekeeper: bool,
    ) -> None:
        self._server = server
        self._index = index
        self._bucket = bucket
        self._connection = connection
        self._shapes = {shape.name: shape for shape in tables.shapes}
        self._uniques = tables.uniques
        self._is_verbatim = is_verbatim
        self._is_gatekeeper = is_gatekeeper

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        server: Server,
        index: int,
        bucket: int,
        *,
        imports: bool = True,
        is_gatekeeper: bool = False,
    ) -> AsyncIterator["PostgresSide"]:
        """Open a shard for the move of one bucket.

        Args:
            server: where it is.
            index: the shard's.
            bucket: which moves.
            imports: whether rows will come in; without, a move can only be ended.
            is_gatekeeper: whether this ends moves of a shard behind its gate; see postgres_gate.

        Raises:
            DatabaseRefused: it cannot be reached, or was promoted and is not in use yet.
            MoveRefused: its tables cannot be moved.
        """
        connection, side = await _connect(server, is_gatekeeper=is_gatekeeper), None
        try:
            is_verbatim = await connection.fetchval(_MAY_IMPORT_VERBATIM)
            tables = await read_tables(connection, is_verbatim=is_verbatim or not imports)
            side = cls(
                server,
                index,
                bucket,
                connection=connection,
                tables=tables,
                is_verbatim=is_verbatim,
                is_gatekeeper=is_gatekeeper,
            )
            yield side
        finally:
            with suppress(*ERRORS):
                await (side._connection if side else connection).close(timeout=CLOSE_S_MAX)

    @property
    def index(self) -> int:
        """See Side.index."""
        return self._index

    @property
    def shapes(self) -> Sequence[Shape]:
        """See Side.shapes."""
        return list(self._shapes.values())

    # State -----------------------------------------------------------------------------

    async def facts(self) -> str:
        """See Side.facts."""
        return await self._run(self._facts)

    async def look(self) -> Held:
        """See Side.look."""
        return await self._run(self._held)

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
        """See Side.change."""
        # A fence is kept by this server's clock, whatever the mover's says.
        fence_us = max(fence_until_us - time.time_ns() // 1000, 1) if fence_until_us else 0

        async def step(raw: Any) -> bool:  # noqa: ANN401
            held = await self._held(raw)
            if not change.is_allowed(held.state, held.token, move.token):
                return False
            if facts and facts != await self._facts(raw):
                raise MoveFailed(f"{self._server.name} has changed its role or schema meanwhile")
            token = (move.token.counter, move.token.mover)
            where = (None if peer is None else str(peer), fence_us)
            number = epoch or held.epoch + change.epoch_by
            row = (self._bucket, str(change.after), number, move.move_id.bytes, *token, *where)
            await raw.execute(_WRITE, *row)
            await self._tidy(raw, change, move)
            return True

        return await self._run(step, lock="alone")

    async def take(self, token: Token) -> bool:
        """See Side.take."""

        async def take(raw: Any) -> bool:  # noqa: ANN401
            if not token.may_replace((await self._held(raw)).token):
                return False
            await raw.execute(_TAKE, self._bucket, token.counter, token.mover)
            return True

        return await self._run(take, lock="alone")

    async def _tidy(self, raw: Any, change: Change, move: Move) -> None:  # noqa: ANN401
        """What a state leaves behind belongs to nobody in the next one."""
        if change.after in {State.MOVING, State.MOVED, State.ACTIVE}:
            await raw.execute("DELETE FROM tenfold_dirty WHERE bucket = $1", self._bucket)
        if change.after in {State.IMPORTING, State.ACTIVE, State.ABORTED}:
            sql = "DELETE FROM tenfold_cursor WHERE move_id = $1"
            await raw.execute(sql, move.move_id.bytes)

    async def _held(self, raw: Any) -> Held:  # noqa: ANN401
        row = await raw.fetchrow(_HELD, self._bucket)
        if row is None:
            return Held(State.ABSENT)
        token = Token(row["mtoken"], row["mholder"])
        move_id = UUID(bytes=row["move_id"]) if row["move_id"] else None
        return Held(State(row["state"]), token, move_id, row["epoch"], row["fence_until_us"])

    async def _facts(self, raw: Any) -> str:  # noqa: ANN401
        row = await raw.fetchrow(_FACTS)
        return f"timeline {row['timeline']}, schema {row['schema_version']}"

    # The source ------------------------------------------------------------------------

    async def read_page(self, shape: Shape, after: str, rows_max: int) -> Page:
        """See Side.read_page."""
        columns = ", ".join((*shape.columns, *shape.page_order))
        condition, arguments = self._beyond(shape, shape.page_order, after)
        rows = await self._fetch(
            f"SELECT {columns} FROM {shape.name} WHERE {condition} "  # noqa: S608
            f"ORDER BY {', '.join(shape.page_order)} LIMIT {rows_max}",
            arguments,
        )
        width = len(shape.columns)
        last = text_of_key(rows[-1][width:]) if rows else ""
        return Page([row[:width] for row in rows], last)

    async def read_rows(self, shape: Shape, keys: Collection[Key]) -> Mapping[Key, Key]:
        """See Side.read_rows."""
        return await self._run(lambda raw: self._rows_of(raw, shape, keys))

    async def read_range(
        self, shape: Shape, after: str, last: str, rows_max: int
    ) -> tuple[Mapping[Key, Key], str]:
        """See Side.read_range."""
        condition, arguments = self._beyond(shape, shape.key, after, last)
        limit = f"LIMIT {rows_max}" if rows_max >= 0 else ""
        rows = await self._fetch(
            f"SELECT {', '.join(shape.columns)} FROM {shape.name} WHERE {condition} "  # noqa: S608
            f"ORDER BY {', '.join(shape.key)} {limit}",
            arguments,
        )
        found = {shape.key_of(row): row for row in rows}
        return found, text_of_key(shape.key_of(rows[-1])) if rows else ""

    async def count_rows(self, shape: Shape) -> int:
        """See Side.count_rows."""
        sql = f"SELECT count(*) FROM {shape.name} WHERE bucket = $1"  # noqa: S608
        return await self._count(sql)

    async def read_dirty(self, move: Move, marks_max: int) -> Batch | None:
        """See Side.read_dirty."""

        async def read(raw: Any) -> Batch | None:  # noqa: ANN401
            if not await self._is_mine(raw, move, *_CARRIED):
                return None
            return await self._read_dirty(raw, marks_max)

        return await self._run(read, is_snapshot=True)

    async def _read_dirty(self, raw: Any, marks_max: int) -> Batch:  # noqa: ANN401
        marks = await raw.fetch(
            "SELECT seq, tbl, pk FROM tenfold_dirty WHERE bucket = $1 ORDER BY seq LIMIT $2",
            self._bucket,
            marks_max,
        )
        total = await raw.fetchval(
            "SELECT count(*) FROM tenfold_dirty WHERE bucket = $1", self._bucket
        )
        texts: dict[str, dict[str, None]] = {}
        for mark in marks:
            texts.setdefault(mark["tbl"], {})[mark["pk"]] = None
        rows: dict[str, Sequence[Key]] = {}
        gone: dict[str, Sequence[Key]] = {}
        for table, marked in texts.items():
            shape = self._shapes[table]
            keys = [key_of_text(shape, shape.key, text) for text in marked]
            found = await self._rows_of(raw, shape, keys)
            rows[table] = [found[key] for key in keys if key in found]
            gone[table] = [key for key in keys if key not in found]
        return Batch([mark["seq"] for mark in marks], rows, gone, total - len(marks))

    async def acknowledge(self, move: Move, seqs: Sequence[int]) -> bool:
        """See Side.acknowledge."""

        async def acknowledge(raw: Any) -> bool:  # noqa: ANN401
            if not await self._is_mine(raw, move, *_CARRIED):
                return False
            await raw.execute("DELETE FROM tenfold_dirty WHERE seq = ANY ($1)", seqs)
            return True

        return await self._run(acknowledge, lock="share")

    async def mark_dirty(self, move: Move, shape: Shape, keys: Collection[Key]) -> bool:
        """See Side.mark_dirty."""

        async def mark(raw: Any) -> bool:  # noqa: ANN401
            if not await self._is_mine(raw, move, *_CARRIED):
                return False
            await raw.executemany(
                "INSERT INTO tenfold_dirty (bucket, tbl, pk) VALUES ($1, $2, $3)",
                [(self._bucket, shape.name, text_of_key(key)) for key in keys],
            )
            return True

        return await self._run(mark, lock="share")

    async def mark_count(self) -> int:
        """See Side.mark_count. From the first number to the last, both read from the index."""
        return await self._count(_MARK_SPAN)

    async def misses_standby(self) -> bool:
        """See Side.misses_standby. Who may not see the standbys does not miss one."""
        return bool(await self._run(lambda raw: raw.fetchval(_MISSES_STANDBY)))

    async def unsent_count(self) -> int:
        """See Side.unsent_count."""
        sql = "SELECT count(*) FROM outbox WHERE sent = 0 AND bucket = $1"
        return await self._count(sql)

    # The destination -------------------------------------------------------------------

    async def apply(
        self, move: Move, batch: Batch, cursor: tuple[str, str, int] | None = None
    ) -> bool:
        """See Side.apply."""

        async def apply(raw: Any) -> bool:  # noqa: ANN401
            if not await self._is_mine(raw, move, State.IMPORTING):
                return False
            await self._stand_aside(raw)
            for table, keys in batch.gone.items():
                await self._delete_keys(raw, self._shapes[table], keys)
            for table, rows in batch.rows.items():
                await self._write_rows(raw, self._shapes[table], rows)
            if cursor is not None:
                await raw.execute(_CURSOR, move.move_id.bytes, *cursor)
            return True

        return await self._run(apply, lock="share")

    async def analyze(self, shape: Shape) -> None:
        """See Side.analyze. That it fails, or is under way already, is no reason to stop."""
        with suppress(MoveFailed):
            await self._run(lambda raw: raw.execute(f"ANALYZE (SKIP_LOCKED) {shape.name}"))

    async def read_cursors(self, move: Move) -> Mapping[str, tuple[str, int]]:
        """See Side.read_cursors."""
        sql = "SELECT tbl, last_pk, row_count FROM tenfold_cursor WHERE move_id = $1"
        rows = await self._fetch(sql, (move.move_id.bytes,))
        return {str(table): (str(last), int(str(count))) for table, last, count in rows}

    async def is_on_standby(self) -> bool:
        """See Side.is_on_standby."""
        hosts = [self._server.at(dsn) for dsn in self._server.hosts]
        if len(hosts) < 2:
            return True
        end = await self._run(lambda raw: raw.fetchrow(_LOG_END))
        asked = (has_received(host, end["timeline"], end["lsn"]) for host in hosts)
        return any(await asyncio.gather(*asked))

    async def delete_page(self, move: Move, state: State, rows_max: int) -> int | None:
        """See Side.delete_page."""

        async def delete(raw: Any) -> int | None:  # noqa: ANN401
            if not await self._is_mine(raw, move, state):
                return None
            await self._stand_aside(raw)
            for table in self._shapes:
                tag = await raw.execute(
                    f"DELETE FROM {table} WHERE ctid = ANY (ARRAY("  # noqa: S608
                    f"SELECT ctid FROM {table} WHERE bucket = $1 LIMIT {rows_max}))",
                    self._bucket,
                )
                if deleted := int(tag.rpartition(" ")[2]):
                    return deleted
            return 0

        return await self._run(delete, lock="share")

    async def _stand_aside(self, raw: Any) -> None:  # noqa: ANN401
        """Rows come as they were at the source: for this transaction no trigger is asked."""
        await raw.execute("SELECT set_config('tenfold.import', '1', true)")
        if self._is_verbatim:
            await raw.execute("SET LOCAL session_replication_role = 'replica'")

    async def _delete_keys(self, raw: Any, shape: Shape, keys: Collection[Key]) -> None:  # noqa: ANN401
        if keys:
            found, arguments = self._among(shape, keys, "ctid")
            sql = f"DELETE FROM {shape.name} WHERE ctid = ANY (ARRAY({found}))"  # noqa: S608
            await raw.execute(sql, *arguments)

    async def _write_rows(self, raw: Any, shape: Shape, rows: Sequence[Key]) -> None:  # noqa: ANN401
        if not shape.numbered:
            # All first, so that rows of one batch may change places.
            await self._delete_keys(raw, shape, [shape.key_of(row) for row in rows])
        try:
            async with raw.transaction():
                await _insert(raw, shape, rows)
        except asyncpg.UniqueViolationError:
            for row in rows:
                await self._displace(raw, shape, row)
            try:
                await _insert(raw, shape, rows)
            except asyncpg.UniqueViolationError as error:
                raise MoveFailed(
                    f"a row of {shape.name} does not fit into {self._server.name}: another bucket "
                    f"has this value already ({error.constraint_name})"
                ) from error

    async def _displace(self, raw: Any, shape: Shape, row: Key) -> None:  # noqa: ANN401
        """Delete what has a unique value of this row: it has changed at the source since."""
        values = dict(zip(shape.columns, row, strict=True))
        for unique in self._uniques.get(shape.name, []):
            columns = [column for column in unique.columns if column != "bucket"]
            await raw.execute(
                _displace_sql(shape, unique, columns),
                self._bucket,
                *(values[column] for column in columns),
            )

    # Helpers ---------------------------------------------------------------------------

    async def _is_mine(self, raw: Any, move: Move, *states: State) -> bool:  # noqa: ANN401
        held = await self._held(raw)
        return held.token == move.token and held.state in states

    async def _rows_of(self, raw: Any, shape: Shape, keys: Collection[Key]) -> dict[Key, Key]:  # noqa: ANN401
        if not keys:
            return {}
        sql, arguments = self._among(shape, keys, *shape.columns)
        rows = [tuple(row) for row in await raw.fetch(sql, *arguments)]
        return {shape.key_of(row): row for row in rows}

    def _among(
        self, shape: Shape, keys: Collection[Key], *columns: str
    ) -> tuple[str, tuple[object, ...]]:
        """One look-up for each key, in its own index.

        To ask for an order leaves no other index and no join: both would read the whole bucket
        for each key, and look as cheap while statistics know no row of it.
        """
        names = ", ".join(shape.key)
        arrays = ", ".join(
            f"${number}::{shape.kinds[column]}[]" for number, column in enumerate(shape.key, 2)
        )
        own = ", ".join(f"{shape.name}.{column}" for column in shape.key)
        asked = ", ".join(f"wanted.{column}" for column in shape.key)
        sql = (
            f"SELECT found.* FROM unnest({arrays}) AS wanted ({names}) "  # noqa: S608
            f"CROSS JOIN LATERAL (SELECT {', '.join(columns)} FROM {shape.name} "
            f"WHERE bucket = $1 AND ({own}) >= ({asked}) AND ({own}) <= ({asked}) "
            f"ORDER BY {own} LIMIT 1) AS found"
        )
        return sql, (self._bucket, *(list(column) for column in zip(*keys, strict=True)))

    def _beyond(
        self, shape: Shape, columns: Sequence[str], after: str, last: str = ""
    ) -> tuple[str, tuple[object, ...]]:
        condition = "bucket = $1"
        arguments: list[object] = [self._bucket]
        for text, sign in ((after, ">"), (last, "<=")):
            if text:
                first = len(arguments) + 1
                marks = ", ".join(f"${first + offset}" for offset in range(len(columns)))
                condition += f" AND ({', '.join(columns)}) {sign} ({marks})"
                arguments += key_of_text(shape, columns, text)
        return condition, tuple(arguments)

    async def _count(self, sql: str) -> int:
        count: int = await self._run(lambda raw: raw.fetchval(sql, self._bucket))
        return count

    async def _fetch(self, sql: str, arguments: Sequence[object]) -> list[Key]:
        async def fetch(raw: Any) -> list[Key]:  # noqa: ANN401
            return [tuple(row) for row in await raw.fetch(sql, *arguments)]

        return await self._run(fetch)

    async def _run(
        self,
        work: Callable[[Any], Awaitable[T]],
        *,
        lock: Lock = "none",
        is_snapshot: bool = False,
    ) -> T:
        """One transaction; a race that was lost is run again."""
        for _ in range(TRIES_MAX):
            try:
                if self._connection.is_closed():
                    self._connection = await _connect(
                        self._server, is_gatekeeper=self._is_gatekeeper
                    )
                async with self._connection.transaction(
                    isolation="repeatable_read" if is_snapshot else "read_committed"
                ):
                    await self._lock(lock)
                    return await work(self._connection)
            except _LOST_RACES:
                await asyncio.sleep(PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            except ERRORS as error:
                reason = str(error) or type(error).__name__
                raise MoveFailed(f"{self._server.name} cannot be used now: {reason}") from error
            except DatabaseRefused as error:
                raise MoveFailed(str(error)) from error
        raise MoveFailed(f"{self._server.name} is too busy: its locks could not be had")

    async def _lock(self, lock: Lock) -> None:
        if lock == "alone":
            granule = self._bucket & GRANULE_MASK
            await self._connection.execute(
                f"SET LOCAL lock_timeout = '{LOCK_MS_MAX}ms'; "  # noqa: S608 - numbers of ours
                "SET LOCAL synchronous_commit = 'remote_apply'; "
                f"SELECT pg_advisory_xact_lock({GRANULE_CLASS}, {granule}); "
                f"SELECT FROM tenfold_bucket WHERE bucket = {self._bucket} FOR UPDATE"
            )
        elif lock == "share":
            await self._connection.execute(
                f"SELECT FROM tenfold_bucket WHERE bucket = {self._bucket} FOR SHARE"
            )


async def _connect(server: Server, *, is_gatekeeper: bool) -> Any:  # noqa: ANN401
    raw = await connect_to_primary(server)
    try:
        if not is_gatekeeper and await is_behind_gate(raw):
            raise DatabaseRefused(
                f"{server} was promoted and has not been compared with Control since: any "
                "process of the service does it when it is used"
            )
        await raw.execute(_BY_INDEX)
        # Keys and rows are carried, not looked at.
        await raw.set_type_codec(
            "uuid", schema="pg_catalog", encoder=bytes, decoder=bytes, format="binary"
        )
    except BaseException:
        raw.terminate()
        raise
    return raw


async def _insert(raw: Any, shape: Shape, rows: Sequence[Key]) -> None:  # noqa: ANN401
    if shape.numbered or not _COPIED_KINDS.issuperset(shape.kinds.values()):
        await raw.executemany(_insert_sql(shape), rows)
    else:
        await raw.copy_records_to_table(shape.name, records=rows, columns=shape.columns)


def _insert_sql(shape: Shape) -> str:
    marks = ", ".join(f"${number}" for number in range(1, len(shape.columns) + 1))
    sql = f"INSERT INTO {shape.name} ({', '.join(shape.columns)}) VALUES ({marks})"  # noqa: S608
    if not shape.numbered:
        return sql
    # A row that is here already keeps its number, and so its place in the order.
    same = ", ".join(f"{column} = excluded.{column}" for column in shape.columns)
    return f"{sql} ON CONFLICT ({', '.join(shape.key)}) DO UPDATE SET {same}"


def _displace_sql(shape: Shape, unique: Unique, columns: Sequence[str]) -> str:
    same = "".join(f" AND {column} = ${number}" for number, column in enumerate(columns, 2))
    condition = f" AND ({unique.condition})" if unique.condition else ""
    return f"DELETE FROM {shape.name} WHERE bucket = $1{same}{condition}"  # noqa: S608
