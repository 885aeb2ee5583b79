"""One SQLite file as the mover of one bucket sees it.

Each step is one BEGIN IMMEDIATE: the writer of the file waits for it, as it waits for the
writer. Rows are written as they were at the source: the triggers of their tables are dropped
and made again inside the transaction, so nobody else ever meets a table without them. (Python
below 3.12 cannot switch triggers off for a connection.) Foreign keys are off as well: the
source has checked them, and pages come in no order that they would like.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from shared.db.errors import DatabaseRefused
from shared.db.move.port import Batch, Held, Key, Move, MoveFailed, Page, Shape
from shared.db.move.protocol import Change, State, Token
from shared.db.move.shapes import key_of_text, text_of_key
from shared.db.move.sqlite_shapes import list_shapes

T = TypeVar("T")
BUSY_S_MAX = 5.0
_HELD = """
SELECT state, mtoken, mholder, move_id, epoch, coalesce(fence_until_us, 0) FROM tenfold_bucket
WHERE bucket = ?
"""
_WRITE = """
INSERT INTO tenfold_bucket (bucket, state, epoch, move_id, mtoken, mholder, peer, fence_until_us)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (bucket) DO UPDATE SET state = excluded.state, epoch = excluded.epoch,
    move_id = excluded.move_id, mtoken = excluded.mtoken, mholder = excluded.mholder,
    peer = excluded.peer, fence_until_us = excluded.fence_until_us
"""
_TAKE = """
INSERT INTO tenfold_bucket (bucket, state, epoch, mtoken, mholder) VALUES (?, 'ABSENT', 0, ?, ?)
ON CONFLICT (bucket) DO UPDATE SET mtoken = excluded.mtoken, mholder = excluded.mholder
"""
_TRIGGERS = """
SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? ORDER BY rowid
"""
# A value that is unique on the whole shard may be taken there: never at the cost of its owner.
_ONLY_ITS_OWN = """
CREATE TEMP TRIGGER only_{table} BEFORE DELETE ON main.{table} WHEN OLD.bucket <> {bucket}
BEGIN SELECT RAISE(ABORT, 'another bucket has this value already'); END
"""
_MARK_SPAN = """
SELECT coalesce((SELECT max(seq) FROM tenfold_dirty WHERE bucket = ?)
    - (SELECT min(seq) FROM tenfold_dirty WHERE bucket = ?) + 1, 0)
"""
_CARRIED = (State.MOVING, State.FENCED)


class SqliteSide:
    """See Side. Open it with `opened`."""

    def __init__(self, connection: sqlite3.Connection, index: int, bucket: int, name: str) -> None:
        self._connection = connection
        self._bucket = bucket
        self._name = name
        self._lock = threading.Lock()
        self._index = index
        self._shapes = {shape.name: shape for shape in list_shapes(connection)}
        for table in self._shapes:
            connection.execute(_ONLY_ITS_OWN.format(table=table, bucket=bucket))

    @classmethod
    @contextmanager
    def opened(cls, path: Path, index: int, bucket: int) -> Iterator["SqliteSide"]:
        """Open a shard's file for the move of one bucket.

        Raises:
            DatabaseRefused: it cannot be opened.
            MoveRefused: its tables cannot be moved.
        """
        try:
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.Error as error:
            raise DatabaseRefused(f"cannot open {path}: {error}") from error
        try:
            for setting in (
                f"busy_timeout = {int(BUSY_S_MAX * 1000)}",
                "foreign_keys = OFF",
                "recursive_triggers = ON",  # or what a row replaces would vanish unseen
                "synchronous = FULL",
            ):
                connection.execute(f"PRAGMA {setting}")
            side = cls(connection, index, bucket, path.name)
            yield side
            with side._lock:  # a step whose caller was cancelled runs to its end
                pass
        finally:
            connection.close()

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

        def step() -> bool:
            with self._writing():
                held = self._held()
                if not change.is_allowed(held.state, held.token, move.token):
                    return False
                if facts and facts != self._facts():
                    raise MoveFailed(f"{self._name} has changed its role or its schema meanwhile")
                token = (move.token.counter, move.token.mover)
                where = (None if peer is None else str(peer), fence_until_us or None)
                number = epoch or held.epoch + change.epoch_by
                row = (self._bucket, str(change.after), number, move.move_id.bytes, *token, *where)
                self._connection.execute(_WRITE, row)
                self._tidy(change, move)
            return True

        return await self._run(step)

    async def take(self, token: Token) -> bool:
        """See Side.take."""

        def take() -> bool:
            with self._writing():
                if not token.may_replace(self._held().token):
                    return False
                self._connection.execute(_TAKE, (self._bucket, token.counter, token.mover))
            return True

        return await self._run(take)

    def _tidy(self, change: Change, move: Move) -> None:
        """What a state leaves behind belongs to nobody in the next one."""
        if change.after in {State.MOVING, State.MOVED, State.ACTIVE}:
            self._connection.execute("DELETE FROM tenfold_dirty WHERE bucket = ?", (self._bucket,))
        if change.after in {State.IMPORTING, State.ACTIVE, State.ABORTED}:
            mine = (move.move_id.bytes,)
            self._connection.execute("DELETE FROM tenfold_cursor WHERE move_id = ?", mine)

    def _held(self) -> Held:
        row = self._connection.execute(_HELD, (self._bucket,)).fetchone()
        if row is None:
            return Held(State.ABSENT)
        state, counter, mover, move_id, epoch, fence_until_us = row
        of_move = UUID(bytes=move_id) if move_id else None
        return Held(State(state), Token(counter, mover), of_move, epoch, fence_until_us)

    def _facts(self) -> str:
        row = self._connection.execute("SELECT timeline, schema_version FROM tenfold_shard")
        timeline, schema_version = row.fetchone()
        return f"timeline {timeline}, schema {schema_version}"

    # The source ------------------------------------------------------------------------

    async def read_page(self, shape: Shape, after: str, rows_max: int) -> Page:
        """See Side.read_page."""
        order = ", ".join(shape.page_order)
        columns = ", ".join((*shape.columns, *shape.page_order))
        sql, arguments = self._beyond(shape, shape.page_order, after)
        sql = f"SELECT {columns} FROM {shape.name} WHERE {sql} ORDER BY {order} LIMIT {rows_max}"  # noqa: S608
        rows = await self._run(lambda: self._connection.execute(sql, arguments).fetchall())
        width = len(shape.columns)
        last = text_of_key(rows[-1][width:]) if rows else ""
        return Page([row[:width] for row in rows], last)

    async def read_rows(self, shape: Shape, keys: Collection[Key]) -> Mapping[Key, Key]:
        """See Side.read_rows."""
        return await self._run(lambda: self._rows_of(shape, keys))

    async def read_range(
        self, shape: Shape, after: str, last: str, rows_max: int
    ) -> tuple[Mapping[Key, Key], str]:
        """See Side.read_range."""
        order = ", ".join(shape.key)
        sql, arguments = self._beyond(shape, shape.key, after, last)
        sql = (
            f"SELECT {', '.join(shape.columns)} FROM {shape.name} WHERE {sql} "  # noqa: S608
            f"ORDER BY {order} LIMIT {rows_max}"
        )
        rows = await self._run(lambda: self._connection.execute(sql, arguments).fetchall())
        found = {shape.key_of(row): row for row in rows}
        return found, text_of_key(shape.key_of(rows[-1])) if rows else ""

    async def count_rows(self, shape: Shape) -> int:
        """See Side.count_rows."""
        sql = f"SELECT count(*) FROM {shape.name} WHERE bucket = ?"  # noqa: S608
        return int(
            await self._run(lambda: self._connection.execute(sql, (self._bucket,)).fetchone()[0])
        )

    async def read_dirty(self, move: Move, marks_max: int) -> Batch | None:
        """See Side.read_dirty."""

        def read() -> Batch | None:
            with self._reading():
                return self._read_dirty(marks_max) if self._is_mine(move, *_CARRIED) else None

        return await self._run(read)

    def _read_dirty(self, marks_max: int) -> Batch:
        marks = self._connection.execute(
            "SELECT seq, tbl, pk FROM tenfold_dirty WHERE bucket = ? ORDER BY seq LIMIT ?",
            (self._bucket, marks_max),
        ).fetchall()
        total = self._connection.execute(
            "SELECT count(*) FROM tenfold_dirty WHERE bucket = ?", (self._bucket,)
        ).fetchone()[0]
        texts: dict[str, dict[str, None]] = {}
        for _, table, text in marks:
            texts.setdefault(table, {})[text] = None
        rows: dict[str, Sequence[Key]] = {}
        gone: dict[str, Sequence[Key]] = {}
        for table, marked in texts.items():
            shape = self._shapes[table]
            keys = [key_of_text(shape, shape.key, text) for text in marked]
            found = self._rows_of(shape, keys)
            rows[table] = list(found.values())
            gone[table] = [key for key in keys if key not in found]
        return Batch([seq for seq, _, _ in marks], rows, gone, total - len(marks))

    async def acknowledge(self, move: Move, seqs: Sequence[int]) -> bool:
        """See Side.acknowledge."""

        def acknowledge() -> bool:
            with self._writing():
                if not self._is_mine(move, *_CARRIED):
                    return False
                self._connection.executemany(
                    "DELETE FROM tenfold_dirty WHERE seq = ?", [(seq,) for seq in seqs]
                )
            return True

        return await self._run(acknowledge)

    async def mark_dirty(self, move: Move, shape: Shape, keys: Collection[Key]) -> bool:
        """See Side.mark_dirty."""

        def mark() -> bool:
            with self._writing():
                if not self._is_mine(move, *_CARRIED):
                    return False
                self._connection.executemany(
                    "INSERT INTO tenfold_dirty (bucket, tbl, pk) VALUES (?, ?, ?)",
                    [(self._bucket, shape.name, text_of_key(key)) for key in keys],
                )
            return True

        return await self._run(mark)

    async def mark_count(self) -> int:
        """See Side.mark_count. From the first number to the last, each read from the index."""
        mine = (self._bucket, self._bucket)
        return int(
            await self._run(lambda: self._connection.execute(_MARK_SPAN, mine).fetchone()[0])
        )

    async def misses_standby(self) -> bool:
        """See Side.misses_standby."""
        return False

    async def unsent_count(self) -> int:
        """See Side.unsent_count."""
        sql = "SELECT count(*) FROM outbox WHERE sent = 0 AND bucket = ?"
        return int(
            await self._run(lambda: self._connection.execute(sql, (self._bucket,)).fetchone()[0])
        )

    # The destination -------------------------------------------------------------------

    async def apply(
        self, move: Move, batch: Batch, cursor: tuple[str, str, int] | None = None
    ) -> bool:
        """See Side.apply."""

        def apply() -> bool:
            with self._writing():
                if not self._is_mine(move, State.IMPORTING):
                    return False
                with self._without_triggers({*batch.rows, *batch.gone}):
                    self._apply(batch)
                if cursor is not None:
                    self._connection.execute(
                        "INSERT OR REPLACE INTO tenfold_cursor (move_id, tbl, last_pk, row_count) "
                        "VALUES (?, ?, ?, ?)",
                        (move.move_id.bytes, *cursor),
                    )
            return True

        return await self._run(apply)

    async def analyze(self, shape: Shape) -> None:
        """See Side.analyze. Plans do not rest on statistics here."""

    async def read_cursors(self, move: Move) -> Mapping[str, tuple[str, int]]:
        """See Side.read_cursors."""
        sql = "SELECT tbl, last_pk, row_count FROM tenfold_cursor WHERE move_id = ?"
        mine = (move.move_id.bytes,)
        rows = await self._run(lambda: self._connection.execute(sql, mine).fetchall())
        return {table: (last, count) for table, last, count in rows}

    async def is_on_standby(self) -> bool:
        """See Side.is_on_standby."""
        return True

    async def delete_page(self, move: Move, state: State, rows_max: int) -> int | None:
        """See Side.delete_page."""

        def delete() -> int | None:
            with self._writing():
                if not self._is_mine(move, state):
                    return None
                for table in self._shapes:
                    if deleted := self._delete_rows(table, rows_max):
                        return deleted
            return 0

        return await self._run(delete)

    def _delete_rows(self, table: str, rows_max: int) -> int:
        with self._without_triggers({table}):
            return self._connection.execute(
                f"DELETE FROM {table} WHERE rowid IN "  # noqa: S608
                f"(SELECT rowid FROM {table} WHERE bucket = ? LIMIT ?)",
                (self._bucket, rows_max),
            ).rowcount

    def _apply(self, batch: Batch) -> None:
        for table, keys in batch.gone.items():
            shape = self._shapes[table]
            sql = f"DELETE FROM {table} WHERE bucket = ? AND {_equals(shape)}"  # noqa: S608
            self._connection.executemany(sql, [(self._bucket, *key) for key in keys])
        for table, rows in batch.rows.items():
            try:
                self._connection.executemany(_insert_sql(self._shapes[table]), rows)
            except sqlite3.IntegrityError as error:
                raise MoveFailed(
                    f"a row of {table} does not fit into {self._name}: {error}"
                ) from error

    @contextmanager
    def _without_triggers(self, tables: Collection[str]) -> Iterator[None]:
        """Inside a transaction: to everybody else the triggers have never been away."""
        triggers = [
            trigger
            for table in sorted(tables)
            for trigger in self._connection.execute(_TRIGGERS, (table,)).fetchall()
        ]
        for name, _ in triggers:
            self._connection.execute(f'DROP TRIGGER "main"."{name}"')
        yield
        for _, sql in triggers:
            self._connection.execute(sql)

    # Helpers ---------------------------------------------------------------------------

    def _is_mine(self, move: Move, *states: State) -> bool:
        held = self._held()
        return held.token == move.token and held.state in states

    def _rows_of(self, shape: Shape, keys: Collection[Key]) -> dict[Key, Key]:
        sql = (
            f"SELECT {', '.join(shape.columns)} FROM {shape.name} "  # noqa: S608
            f"WHERE bucket = ? AND {_equals(shape)}"
        )
        found: dict[Key, Key] = {}
        for key in keys:
            row = self._connection.execute(sql, (self._bucket, *key)).fetchone()
            if row is not None:
                found[key] = row
        return found

    def _beyond(
        self, shape: Shape, columns: Sequence[str], after: str, last: str = ""
    ) -> tuple[str, tuple[object, ...]]:
        listed = ", ".join(columns)
        marks = ", ".join("?" for _ in columns)
        sql = "bucket = ?"
        arguments: list[object] = [self._bucket]
        for text, sign in ((after, ">"), (last, "<=")):
            if text:
                sql += f" AND ({listed}) {sign} ({marks})"
                arguments += key_of_text(shape, columns, text)
        return sql, tuple(arguments)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        yield
        self._connection.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._connection.execute("BEGIN")
        yield
        self._connection.execute("COMMIT")

    async def _run(self, work: Callable[[], T]) -> T:
        def run() -> T:
            with self._lock:
                try:
                    return work()
                except sqlite3.OperationalError as error:
                    raise MoveFailed(f"{self._name} cannot be used now: {error}") from error
                finally:
                    # A step that returned early or failed leaves nothing behind.
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")

        return await asyncio.to_thread(run)


def _equals(shape: Shape) -> str:
    return " AND ".join(f"{column} = ?" for column in shape.key)


def _insert_sql(shape: Shape) -> str:
    columns = ", ".join(shape.columns)
    marks = ", ".join(f"?{number}" for number in range(1, len(shape.columns) + 1))
    if not shape.numbered:
        return f"INSERT OR REPLACE INTO {shape.name} ({columns}) VALUES ({marks})"  # noqa: S608
    # A row that is here already keeps its number, and so its place in the order.
    same = " AND ".join(f"{column} = ?{shape.columns.index(column) + 1}" for column in shape.key)
    number = f"(SELECT {shape.numbered} FROM {shape.name} WHERE {same})"  # noqa: S608
    return (
        f"INSERT OR REPLACE INTO {shape.name} ({shape.numbered}, {columns}) "  # noqa: S608
        f"VALUES ({number}, {marks})"
    )
