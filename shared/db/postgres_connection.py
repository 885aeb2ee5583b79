"""One asyncpg connection with bounds on everything, and Postgres's errors in our words.

The traps (spec d.2; each has a test): asyncpg has no limits of its own; a socket half open
after a failover waits for minutes; a statement prepared before a migration fails once in a
transaction; a connection that met a protocol error is closed, never used again.
"""

import asyncio
import math
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import structlog

from shared.db import limits
from shared.db.errors import (
    BucketElsewhere,
    BucketNotAdmitted,
    ConstraintViolation,
    UniqueViolation,
)
from shared.db.limits import RETRY_AFTER_S, no_room
from shared.db.sql import to_postgres
from shared.db.tenancy import TenantCheck
from shared.errors import (
    Aborted,
    DeadlineExceeded,
    InvalidRequest,
    RaceLost,
    TenfoldError,
    Unavailable,
)

CONNECT_S_MAX = 3.0
# How long a statement waits for a row or for a bucket's granule.
LOCK_S_MAX = 3.0
# What the client waits longer than the server, so that the server's own answer comes first.
GRACE_S = 1.0
STATEMENTS_PREPARED_MAX = 512
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 10, 5, 3
UNACKNOWLEDGED_MS_MAX = 20_000


_log = structlog.get_logger(__name__)


class ShardUnreachable(Unavailable):
    """Nobody takes connections at the shard's primary; nothing has been asked."""


class BehindGate(ShardUnreachable):
    """The shard's primary was promoted, and has not been compared with Control since."""


@dataclass(frozen=True)
class Server:
    """Where a shard is.

    Attributes:
        dsn: of one host and one database, with the password.
        name: "shard 2 of payment", for messages.
        application: how connections show in pg_stat_activity.
        hosts: the DSNs of all its hosts, this one among them; any may be the primary.
    """

    dsn: str
    name: str
    application: str
    hosts: tuple[str, ...] = ()

    def at(self, dsn: str) -> "Server":
        """The same shard at another of its hosts."""
        return replace(self, dsn=dsn)

    @property
    def address(self) -> str:
        """For the operator: no user, no password."""
        parts = urlsplit(self.dsn)
        return f"{parts.hostname or '?'}:{parts.port or 5432}{parts.path}"

    def __str__(self) -> str:  # noqa: D105 - for the operator
        return f"{self.name} at {self.address}"


@dataclass(frozen=True)
class Backend:
    """The server's process behind a connection: a pid alone may be another's by now."""

    pid: int
    started: Any


class Connection:
    """One open connection; it belongs to one task at a time.

    Attributes:
        raw: asyncpg's.
        name: the shard's.
        backend: the server's side of it.
        opened_s: on time.monotonic(): no later than this the server behind it has started.
        dies_at_s: on time.monotonic(): not lent any more from then on.
    """

    def __init__(
        self,
        raw: Any,  # noqa: ANN401
        tenants: TenantCheck,
        backend: Backend,
        name: str,
    ) -> None:
        self.raw = raw
        self.name = name
        self.backend = backend
        self.opened_s = time.monotonic()
        self.dies_at_s = math.inf
        self._tenants = tenants
        self._is_in_doubt = False
        self._was_warned = False
        raw.add_log_listener(self._on_message)

    @property
    def is_usable(self) -> bool:
        """Whether it is open and surely outside any transaction."""
        return not (self._is_in_doubt or self.raw.is_closed() or self.raw.is_in_transaction())

    async def run(self, sql: str) -> None:
        """Run statements of our own without arguments, in one round trip."""
        with self._watched():
            await self.raw.execute(sql)
        self._is_in_doubt = False

    async def commit(self) -> None:
        """COMMIT; raises one of ERRORS, or CommitDoubtful if it is not what was asked for."""
        self._was_warned = False
        await self.raw.execute("COMMIT")  # bounded by the command timeout
        if self._was_warned:
            # Somebody has ended the wait for the synchronous standby: committed here alone.
            raise CommitDoubtful

    def _on_message(self, raw: object, message: Any) -> None:  # noqa: ANN401
        self._was_warned |= message.severity_en == "WARNING"

    async def fetch(
        self, sql: str, arguments: Sequence[object], *, timeout_s: float | None = None
    ) -> list[dict[str, Any]]:
        """Every row of a statement, within this time if it is less than any statement has."""
        self._tenants.require(sql)
        with self._watched():
            records = await self.raw.fetch(to_postgres(sql), *arguments, timeout=timeout_s)
        return [dict(record) for record in records]

    async def execute(self, sql: str, arguments: Sequence[object]) -> int:
        """The number of rows that the statement changed."""
        self._tenants.require(sql)
        with self._watched():
            tag: str = await self.raw.execute(to_postgres(sql), *arguments)
        count = tag.rpartition(" ")[2]  # "INSERT 0 3", "UPDATE 3", "CREATE TABLE"
        return int(count) if count.isdigit() else 0

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except asyncpg.PostgresError as error:
            raise self.told(error) from error  # the server has answered
        except BaseException as error:
            # Given up while the server was at it: what it does next is not known here.
            self._is_in_doubt = True
            if isinstance(error, ERRORS):
                raise self.told(error) from error
            raise

    def told(self, error: BaseException) -> Exception:
        """What a caller is told; what it is not told of a server's trouble is said here."""
        translated = translate(error, name=self.name)
        if isinstance(error, asyncpg.PostgresError) and isinstance(translated, Unavailable):
            _log.warning(
                "shard.refuses", shard=self.name, sqlstate=error.sqlstate, reason=str(error)
            )
        return translated

    def terminate(self) -> None:
        """Close the socket now; the server rolls back what was open."""
        self.raw.terminate()

    async def close(self) -> None:
        """Close politely, but not for long; safe to repeat."""
        with suppress(Exception):
            await self.raw.close(timeout=limits.CLOSE_S_MAX)
        self.raw.terminate()


# The first eight characters of a WAL file's name (spec/data.md §4).
TIMELINE = "('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint"
# What no client says any more may not go on: a statement is bounded, and so is their sum.
_TRANSACTION_TIMEOUT_SINCE = (17,)
_WHO = f"""
SELECT pid, backend_start AS started,
       CASE WHEN pg_is_in_recovery() THEN 0 ELSE {TIMELINE} END AS timeline,
       (SELECT timeline FROM tenfold_shard) AS admitted
FROM pg_stat_activity WHERE pid = pg_backend_pid()
"""  # noqa: S608 - an expression of ours


async def open_connection(
    server: Server, tenants: TenantCheck, *, timeline_min: int | None = 0
) -> Connection:
    """Connect with our settings.

    Args:
        server: where.
        tenants: checks each statement.
        timeline_min: a primary on an older one is of the past, and a replica is none; None to
            take any host.

    Raises:
        ShardUnreachable: nobody answers there, or it refuses us; the sentence names the shard.
        BehindGate: it is a primary that may not be used yet.
    """
    try:
        raw = await connect(server)
        with _closing_on_failure(raw):
            row = await raw.fetchrow(_WHO)
            if timeline_min is not None and row["timeline"] < max(timeline_min, 1):
                raise Unavailable(
                    f"{server.name} has no primary there", retry_after_s=RETRY_AFTER_S
                )
            if timeline_min is not None and row["admitted"] != row["timeline"]:
                raise behind_gate(server)
            if raw.get_server_version() >= _TRANSACTION_TIMEOUT_SINCE:
                timeout_ms = _milliseconds(limits.TURN_S_MAX + GRACE_S)
                await raw.execute(f"SET transaction_timeout = {timeout_ms}")
    except ERRORS as error:
        raise ShardUnreachable(
            f"{server.name} cannot be reached", retry_after_s=RETRY_AFTER_S
        ) from error
    return Connection(raw, tenants, Backend(row["pid"], row["started"]), server.name)


def behind_gate(server: Server) -> BehindGate:
    """What a caller is told until the shard has been compared with Control."""
    return BehindGate(
        f"{server.name} has a new primary, which is not in use yet", retry_after_s=RETRY_AFTER_S
    )


@contextmanager
def _closing_on_failure(raw: Any) -> Iterator[None]:  # noqa: ANN401 - asyncpg is untyped
    try:
        yield
    except BaseException:
        raw.terminate()
        raise


async def connect(server: Server) -> Any:  # noqa: ANN401 - asyncpg is untyped
    """A raw connection. Raises what asyncpg raises: one of ERRORS."""
    raw = await asyncpg.connect(
        server.dsn,
        timeout=CONNECT_S_MAX,
        command_timeout=limits.STATEMENT_S_MAX + GRACE_S,
        statement_cache_size=STATEMENTS_PREPARED_MAX,
        max_cached_statement_lifetime=0,
        server_settings={
            "application_name": server.application,
            "statement_timeout": _milliseconds(limits.STATEMENT_S_MAX),
            "lock_timeout": _milliseconds(LOCK_S_MAX),
            "idle_in_transaction_session_timeout": _milliseconds(limits.TURN_S_MAX + GRACE_S),
        },
    )
    with _closing_on_failure(raw):
        _keep_alive(raw)
        await raw.set_type_codec(
            "uuid",
            schema="pg_catalog",
            encoder=lambda value: value.bytes,
            decoder=lambda content: UUID(bytes=content),
            format="binary",
        )
        # A sum of bigints is a numeric; the shared subset knows no fractions.
        await raw.set_type_codec(
            "numeric", schema="pg_catalog", encoder=str, decoder=int, format="text"
        )
    return raw


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


def _keep_alive(raw: Any) -> None:  # noqa: ANN401
    """Find out within seconds that the other end is gone."""
    end: socket.socket | None = raw._transport.get_extra_info("socket")
    if end is None or end.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS_MAX),
    ):
        if hasattr(socket, option):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# Errors ----------------------------------------------------------------------------------


class CommitDoubtful(ConnectionError):
    """The server has committed, and warned that it is not on the standby that must have it."""


ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
    asyncio.IncompleteReadError,
)
_UNIQUE, _CHECK, _NOT_NULL, _FOREIGN_KEY = "23505", "23514", "23502", "23503"
_RACES_LOST = frozenset({"40001", "40P01"})
_LOCK_NOT_GIVEN = "55P03"
_TOO_SLOW_SENTENCE = "a statement took longer than it may, or than the call had left"
_TOO_SLOW = frozenset({"57014", "25P03", "25P04"})
# Connections, resources, operators, a standby where a primary was expected, a broken disk.
_UNAVAILABLE_CLASSES = frozenset({"08", "53", "57", "58", "XX"})
_READ_ONLY = "25006"
_DISK_FULL = "53100"


def translate(error: BaseException, *, name: str = "the database") -> Exception:
    """Postgres's error as the port names it; errors that mean a bug stay as they are."""
    if isinstance(error, asyncpg.PostgresError):
        return _of_server(error, name)
    if isinstance(error, asyncpg.OutdatedSchemaCacheError):
        return RaceLost("the schema has changed meanwhile; try again")
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(_TOO_SLOW_SENTENCE)
    return unavailable()


def _of_server(error: Any, name: str) -> Exception:  # noqa: ANN401 - asyncpg is untyped
    # A table: who the server's code is, and what it means to a caller.
    state = str(error.sqlstate or "")
    found: Exception = error
    if state.startswith("23"):
        found = _violation(error, state)
    elif state == "MB001":
        found = BucketElsewhere.of_detail(str(error.detail))
    elif state == "MB002":
        found = BucketNotAdmitted(str(error))
    elif state in _RACES_LOST or isinstance(error, asyncpg.InvalidCachedStatementError):
        found = RaceLost("another was faster; try again", retry_after_s=RETRY_AFTER_S)
    elif state == _LOCK_NOT_GIVEN:
        found = Aborted("another holds this for too long; try again", retry_after_s=RETRY_AFTER_S)
    elif state in _TOO_SLOW:
        found = DeadlineExceeded(_TOO_SLOW_SENTENCE)
    elif state == "22003":
        found = ConstraintViolation("integer_overflow")
    elif state == "22021":
        found = InvalidRequest("a text holds a character that cannot be stored (NUL)")
    elif state == _DISK_FULL:
        found = no_room(name)
    elif state[:2] in _UNAVAILABLE_CLASSES or state == _READ_ONLY:
        found = unavailable()
    return found


def _violation(error: Any, state: str) -> ConstraintViolation:  # noqa: ANN401
    if state == _UNIQUE:
        return UniqueViolation(str(error.constraint_name))
    if state == _NOT_NULL:
        return ConstraintViolation(f"not_null:{error.table_name}.{error.column_name}")
    if state == _FOREIGN_KEY:
        return ConstraintViolation("foreign_key")
    return ConstraintViolation(str(error.constraint_name or error))


def unavailable() -> TenfoldError:
    """The database cannot take this now."""
    return Unavailable("the database cannot be reached now", retry_after_s=RETRY_AFTER_S)
