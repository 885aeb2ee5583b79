"""Who is primary and who is standby in each shard of the cluster, as the servers themselves say."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploy.local.shard import STANDING_FILE, name_of
from deploy.local.standing import Standing, read_standing
from shared.db.postgres_connection import ERRORS, Server, connect
from shared.db.postgres_shards import parse_servers

ASK_S_MAX = 2.0
PRIMARY, STANDBY, ASTRAY, SILENT = "primary", "standby", "not following", "unreachable"
_ASK = """
SELECT in_recovery AS is_replica,
    (CASE WHEN in_recovery THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END
        - '0/0'::pg_lsn)::bigint AS lsn,
    (SELECT count(*) FROM pg_stat_wal_receiver) AS sources
FROM pg_is_in_recovery() AS in_recovery
"""


@dataclass(frozen=True)
class Node:
    """One server of a shard.

    Attributes:
        shard: its index.
        name: what the supervisor calls its process.
        address: where it listens.
        role: PRIMARY; STANDBY; ASTRAY, a standby that follows nobody now; SILENT.
        lag_bytes: of the log that a standby has not replayed; None where that is not known.
        is_promotable: it, or another one like it, has whatever is acknowledged.
    """

    shard: int
    name: str
    address: str
    role: str
    lag_bytes: int | None = None
    is_promotable: bool = False

    @property
    def row(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def ask_nodes(databases: Mapping[str, str], sites: Sequence[Path]) -> Sequence[Node]:
    """Ask every server of the cluster; those that do not answer in time are SILENT.

    Args:
        databases: the services' settings; all of them name the same servers.
        sites: each shard's place.
    """
    dsns = next(iter(databases.values()), "")
    servers = parse_servers(dsns, service="cluster") if dsns else []
    nodes = asyncio.run(_ask_all(servers))
    standings = [read_standing(site / STANDING_FILE) for site in sites]
    return [replace(node, is_promotable=_is_promotable(node, nodes, standings)) for node in nodes]


def _is_promotable(node: Node, nodes: Sequence[Node], standings: Sequence[Standing]) -> bool:
    standing = standings[node.shard]
    primary = name_of(node.shard, standing.primary)
    return any(one.name == primary and one.role == PRIMARY for one in nodes) and node.name in {
        name_of(node.shard, promotable) for promotable in standing.promotable
    }


async def _ask_all(servers: Sequence[Server]) -> Sequence[Node]:
    found = await asyncio.gather(*(_ask_shard(index, one) for index, one in enumerate(servers)))
    return [node for nodes in found for node in nodes]


async def _ask_shard(index: int, shard: Server) -> Sequence[Node]:
    hosts = [shard.at(dsn) for dsn in shard.hosts]
    answers = await asyncio.gather(*(_ask(host) for host in hosts))
    primary = next((one for one in answers if one and not one["is_replica"]), None)
    return [
        _node(index, f"node_{number}", host.address.partition("/")[0], answer, primary)
        for number, (host, answer) in enumerate(zip(hosts, answers, strict=True), 1)
    ]


def _node(
    shard: int,
    node: str,
    address: str,
    answer: Mapping[str, Any] | None,
    primary: Mapping[str, Any] | None,
) -> Node:
    name = name_of(shard, node)
    if answer is None:
        return Node(shard, name, address, SILENT)
    if not answer["is_replica"]:
        return Node(shard, name, address, PRIMARY, 0)
    role = STANDBY if answer["sources"] else ASTRAY
    if primary is None or answer["lsn"] is None:
        return Node(shard, name, address, role)
    return Node(shard, name, address, role, max(0, primary["lsn"] - answer["lsn"]))


async def _ask(server: Server) -> Mapping[str, Any] | None:
    with suppress(*ERRORS):
        async with asyncio.timeout(ASK_S_MAX):
            raw = await connect(server)
            try:
                return dict(await raw.fetchrow(_ASK))
            finally:
                raw.terminate()
    return None
