"""The shards of a running cluster as an operator sees them, and their servers' ends."""

import os
import signal
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deploy.local.data_folder import DataFolder
from deploy.local.processes import ProcessMark
from deploy.local.replication import PRIMARY, STANDBY, Node, ask_nodes
from tests.backups import Traffic, transfers_of
from tests.kills import unbalanced_ledger
from tests.mesh import Mesh, poll_until

REDUNDANT_S = 90.0


def nodes(mesh: Mesh) -> list[Node]:
    """Every server: its shard, its name, its role, its lag."""
    databases = DataFolder(mesh.data).read_databases()
    sites = [Path(site) for site in mesh.state["databases"]]
    with ThreadPoolExecutor(1) as elsewhere:  # it runs a loop of its own
        return list(elsewhere.submit(ask_nodes, databases, sites).result())


def primaries(mesh: Mesh) -> list[str]:
    """By shard, the server that takes its writes, as soon as each has one."""

    def found() -> list[str]:
        shown = nodes(mesh)
        leaders = {row.shard: row.name for row in shown if row.role == PRIMARY}
        every = sorted({row.shard for row in shown})
        return [leaders[shard] for shard in every] if sorted(leaders) == every else []

    return poll_until(found, timeout_s=REDUNDANT_S, what="a primary for each shard")


def until_redundant(mesh: Mesh) -> None:
    """Return when each shard has a primary and all of its standbys may be promoted."""

    def is_redundant() -> bool:
        shown = nodes(mesh)
        followers = [row for row in shown if row.role == STANDBY and row.is_promotable]
        shards = {row.shard for row in shown}
        leaders = [row for row in shown if row.role == PRIMARY]
        return len(leaders) == len(shards) and len(leaders) + len(followers) == len(shown)

    mesh.wait_until_ready()
    poll_until(is_redundant, timeout_s=REDUNDANT_S, what="a standby for each primary")


def hit(mesh: Mesh, name: str, how: signal.Signals) -> ProcessMark:
    """Signal a server's first process."""
    child = mesh.child(name)
    os.kill(child.pid, how)
    return child


def wrongs(traffic: Traffic) -> list[str]:
    """What is lost, doubled or out of balance; [] when all is well."""
    rows = transfers_of(traffic.told)
    lost = sorted(set(traffic.acknowledged) - set(rows))
    doubled = [name for name, count in Counter(rows).items() if count > 1]
    found: Sequence[str] = (
        f"lost: {lost}" if lost else "",
        f"doubled: {doubled}" if doubled else "",
        unbalanced_ledger(traffic.told),
    )
    return [one for one in found if one]
