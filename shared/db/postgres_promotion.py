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
    END::bigint AS lsn
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
class _Host:
    server: Server
    is_replica: bool
    lsn: int

    @property
    def place(self) -> str:
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
    asked = await asyncio.gather(*(_ask(host) for host in hosts))
    answers = [answer for answer in asked if answer is not None]
    silent = [host.address for host, answer in zip(hosts, asked, strict=True) if answer is None]
    chosen = _chosen(servers[index].name, answers, to)
    await _promote(chosen.server)
    return Promoted(chosen.server.address, silent, await pass_gate(servers, index))


def _chosen(name: str, answers: Sequence[_Host], to: str) -> _Host:
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


async def _ask(server: Server) -> _Host | None:
    with suppress(*ERRORS):
        async with asyncio.timeout(ASK_S_MAX):
            raw = await connect(server)
            try:
                row = await raw.fetchrow(_ASK)
                return _Host(server, row["is_replica"], row["lsn"] or 0)
            finally:
                raw.terminate()
    return None


async def _promote(server: Server) -> None:
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
