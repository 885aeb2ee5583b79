"""Which standbys of a shard may be promoted, and what follows from that: no I/O but one file.

The promise: whatever the primary has acknowledged is on the disk of one of the standbys that are
promotable, if there is any. The primary's setting synchronous_standby_names keeps it, and the file
standing.json tells it to whoever comes after us. So the file says less before the setting asks for
less, and more after the setting is known to be obeyed and the standbys have caught up.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from deploy.local.data_folder import write_private
from deploy.local.errors import LaunchError
from shared.db.postgres_promotion import Host

# A standby that has been away for so long is not waited for any more.
AWAY_S_MAX = 3.0


@dataclass(frozen=True)
class Standing:
    """What is known to hold for one primary.

    Attributes:
        primary: the node; of another one it says nothing.
        promotable: one of them has whatever the primary has acknowledged; () where it writes alone.
    """

    primary: str
    promotable: frozenset[str] = frozenset()


class Role(Enum):
    """What a node's data folder says that it is."""

    ABSENT = "absent"
    STANDBY = "standby"
    PRIMARY = "primary"
    FENCED = "fenced"


def read_standing(path: Path) -> Standing:
    """What the file says; nobody is promotable if it cannot be read."""
    try:
        told = json.loads(path.read_text())
        return Standing(told["primary"], frozenset(told["promotable"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Standing("")


def write_standing(path: Path, standing: Standing) -> None:
    """Remember it, durably."""
    told = {"primary": standing.primary, "promotable": sorted(standing.promotable)}
    write_private(path, json.dumps(told).encode())


def primary_of(roles: Mapping[str, Role], last: str) -> str:
    """The node that has the newest data.

    Args:
        roles: of every node, the first of a new shard first.
        last: who was the primary when the file was written; "" if that is not known.

    Returns:
        A primary; or one that was fenced, if nobody was promoted; or a new shard's first node.

    Raises:
        LaunchError: only an operator can know; the sentence says what there is.
    """
    primaries = [node for node, role in roles.items() if role is Role.PRIMARY]
    fenced = [node for node, role in roles.items() if role is Role.FENCED]
    if len(primaries) == 1:
        return primaries[0]
    if not primaries and last in fenced:
        return last
    if not primaries and len(fenced) == 1:
        return fenced[0]
    if set(roles.values()) == {Role.ABSENT}:
        return next(iter(roles))
    found = ", ".join(f"{node} ({role.value})" for node, role in roles.items())
    raise LaunchError(
        f"which has the newest data cannot be told from {found}: leave one that is no standby, "
        "and move the folders of the other primaries away"
    )


def heir_of(promotable: frozenset[str], told: Mapping[str, Host]) -> str | None:
    """The standby that surely has whatever a dead primary had acknowledged; None if none has.

    Each commit was on one of the promotable ones, so all of them must be asked, and the one that
    has most has all. One that has just been restarted may have more than it says, which matters
    only where there is another.

    Args:
        promotable: see Standing.
        told: by node, what those say that answer.
    """
    if not promotable or not promotable <= told.keys():
        return None
    if len(promotable) > 1 and not all(told[node].has_received for node in promotable):
        return None
    return max(sorted(promotable), key=lambda node: told[node].lsn)


def to_wait_for(promotable: frozenset[str], away_s: Mapping[str, float]) -> frozenset[str]:
    """The standbys of which one must have each commit: those that follow, or are not long away.

    Args:
        promotable: who is waited for now.
        away_s: of every standby, since when it does not follow; 0 for one that does.
    """
    return frozenset(
        node
        for node, seconds in away_s.items()
        if seconds == 0 or (node in promotable and seconds < AWAY_S_MAX)
    )


def names_of(nodes: Sequence[str]) -> str:
    """Nodes in a sentence."""
    return " and ".join(sorted(nodes))
