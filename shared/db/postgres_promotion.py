"""A shard's primary has died: its most advanced replica takes over, and the gate is passed.

Nobody but an operator, or a program in an operator's place, may say that a primary is dead. What
is checked here is that no host of the shard takes writes now. One that comes back later is on an
older timeline: pools leave it alone, and Control has the new timeline, so that no start uses it.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import asyncpg

from shared.db.errors import DatabaseRefused
from shared.db.limits import CLOSE_S_MAX
from shared.db.postgres_connection import ERRORS, Server, connect
from shared.db.postgres_gate import Reconciled, pass_gate

ASK_S_MAX = 3.0
PROMOTE_S_MAX = 30
_ASK = """
SELECT pg_is_in_recovery() AS is_replica, CASE WHEN pg_is_in_recovery()
    THEN greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'::pg_lsn
    END::bigint AS lsn, pg_last_wal_receive_lsn() IS NOT NULL AS has_received
"""


class PromotionRefused(Exception):
    """Nothing has been promoted; the sentence says why."""


@dataclass(frozen=True)
class Promoted:
    """What became of a promotion.

    Attributes:
        address: the new primary, "host:port/database".
        silent: hosts that did not answer: the dead primary, and whoever else is down.
        reconciled: what the gate did.
    """

    address: str
    silent: Sequence[str]
    reconciled: Reconciled


@dataclass(frozen=True)
class Host:
    """What one host of a shard says of itself.

    Attributes:
        server: the shard at this host.
        is_replica: it takes no writes.
        lsn: of a replica, how far it has received or replayed the log, in bytes.
        has_received: it has received some since it was started. One that has not may have more
            log on its disk than it says, and replays that before it takes over.
    """

    server: Server
    is_replica: bool
    lsn: int
    has_received: bool

    @property
    def place(self) -> str:
        """Its "host:port"."""
        return self.server.address.partition("/")[0]


async def promote(servers: Sequence[Server], index: int, *, to: str = "") -> Promoted:
    """Promote the replica of a shard that has most of the log.

    Args:
        servers: all of the service's, in the order in which they were made.
        index: the shard's.
        to: "host:port" of the replica that is wanted; "" for the one that has most.

    Raises:
        PromotionRefused: a host takes writes, none can take over, or the wanted one lacks what
            another has.
        DatabaseRefused: it was promoted and is not in use yet; whoever uses it passes the gate.
    """
    hosts = [servers[index].at(dsn) for dsn in servers[index].hosts]
    answers = await ask_hosts(servers[index])
    heard = {answer.server.address for answer in answers}
    silent = [host.address for host in hosts if host.address not in heard]
    chosen = choose_host(servers[index].name, answers, to)
    await promote_host(chosen.server)
    return Promoted(chosen.server.address, silent, await pass_gate(servers, index))


async def ask_hosts(server: Server) -> Sequence[Host]:
    """What a shard's hosts say of themselves; without those that do not answer."""
    asked = await asyncio.gather(*(_ask(server.at(dsn)) for dsn in server.hosts))
    return [answer for answer in asked if answer is not None]


def choose_host(name: str, answers: Sequence[Host], to: str = "") -> Host:
    """The replica that shall take over: the one that has most of the log.

    Args:
        name: the shard's, for messages.
        answers: what its hosts say.
        to: "host:port" of the one that is wanted; "" for any.

    Raises:
        PromotionRefused: see promote.
    """
    for host in answers:
        if not host.is_replica:
            raise PromotionRefused(
                f"{name} has a primary that takes writes, at {host.server.address}: stop it for "
                "good first, or there would be two"
            )
    if not answers:
        raise PromotionRefused(f"{name} has no replica that answers: start one")
    best = max(answers, key=lambda host: host.lsn)
    if not to:
        return best
    wanted = [host for host in answers if host.place == to]
    if not wanted:
        places = ", ".join(host.place for host in answers)
        raise PromotionRefused(f"{name} has no replica that answers at {to}: there is {places}")
    if wanted[0].lsn < best.lsn:
        raise PromotionRefused(
            f"{to} lacks {best.lsn - wanted[0].lsn} bytes of log: promote {best.place}"
        )
    return wanted[0]


async def _ask(server: Server) -> Host | None:
    with suppress(*ERRORS):
        async with asyncio.timeout(ASK_S_MAX):
            raw = await connect(server)
            try:
                row = await raw.fetchrow(_ASK)
                return Host(server, row["is_replica"], row["lsn"] or 0, row["has_received"])
            finally:
                raw.terminate()
    return None


async def promote_host(server: Server) -> None:
    """Make one replica a primary, whatever the others are.

    Raises:
        PromotionRefused: the role may not.
        DatabaseRefused: it may or may not have been promoted.
    """
    try:
        raw = await connect(server)
        try:
            await raw.execute("SET statement_timeout = 0")
            is_done = await _run_promotion(raw)
        finally:
            with suppress(*ERRORS):
                await raw.close(timeout=CLOSE_S_MAX)
    except asyncpg.InsufficientPrivilegeError as error:
        raise PromotionRefused(
            f"the role may not promote {server}: name one that may in its setting, or GRANT "
            "EXECUTE ON FUNCTION pg_promote(boolean, integer) to it in that database"
        ) from error
    except ERRORS as error:
        raise DatabaseRefused(f"{server} may or may not have been promoted: {error}") from error
    if not is_done:
        raise DatabaseRefused(f"{server} was not promoted in {PROMOTE_S_MAX} s: see its log")


async def _run_promotion(raw: Any) -> bool:  # noqa: ANN401 - asyncpg is untyped
    statement = f"SELECT pg_promote(true, {PROMOTE_S_MAX})"
    return bool(await raw.fetchval(statement, timeout=PROMOTE_S_MAX + ASK_S_MAX))
