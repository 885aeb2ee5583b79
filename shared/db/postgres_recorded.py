"""Shards that were added while their service ran: Control says where they are.

It holds no user and no password: those are the first shard's.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from shared.db.limits import CLOSE_S_MAX
from shared.db.postgres_connection import ERRORS, Server
from shared.db.postgres_primary import connect_to_primary

# ADDING is one that has not got its tables yet: nobody may use it.
SELECT_RECORDED = """
SELECT shard_id, dsn FROM tenfold_control.shard
WHERE shard_id >= $1 AND dsn <> '' AND state = 'ACTIVE' ORDER BY shard_id
"""


async def all_servers(named: Sequence[Server]) -> list[Server]:
    """The shards that a setting names, and those that were added since.

    Raises:
        DatabaseRefused: the first cannot be reached.
    """
    connection = await connect_to_primary(named[0])
    try:
        rows = await connection.fetch(SELECT_RECORDED, len(named))
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
        rows = []  # it has never been served, or by an earlier release alone
    finally:
        with suppress(*ERRORS):
            await connection.close(timeout=CLOSE_S_MAX)
    return [*named, *further_servers(rows, named)]


def further_servers(rows: Sequence[Mapping[str, Any]], known: Sequence[Server]) -> list[Server]:
    """The shards of SELECT_RECORDED, as far as they follow the known ones without a gap."""
    further: list[Server] = []
    for row in rows:
        if row["shard_id"] != len(known) + len(further):
            break
        further.append(server_at(row["dsn"], known[0], row["shard_id"]))
    return further


def server_at(place: str, first: Server, index: int) -> Server:
    """A shard as it is reached with the first one's user, password and parameters.

    Args:
        place: its DSN without them; several hosts may be in it.
        first: of the same service.
        index: the shard's.
    """
    of_first, parts = urlsplit(first.dsn), urlsplit(place)
    credentials, at, _ = of_first.netloc.rpartition("@")
    hosts = tuple(
        parts._replace(netloc=f"{credentials}{at}{host}", query=of_first.query).geturl()
        for host in parts.netloc.split(",")
    )
    service = first.name.partition(" of ")[2]
    return replace(first, dsn=hosts[0], hosts=hosts, name=f"shard {index} of {service}")
