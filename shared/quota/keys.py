"""Where quotas live in Valkey: one key per bucket, level and subject, and a few for all.

A subject comes from a credential or an address: it is percent-encoded, so that no text can
name another's key.
"""

from enum import StrEnum
from urllib.parse import quote

PREFIX = "quota:"
# field -> override, see shared.quota.plans.
OVERRIDES_KEY = "quota!overrides"
# Counts changes of the overrides, and resets: edges compare it once a second.
REVISION_KEY = "quota!revision"
# A sorted set: edge -> when it was last alive, microseconds of Valkey's clock.
EDGES_KEY = "quota!edges"
# What the edges obey now, as JSON: for the operator's commands.
EFFECTIVE_KEY = "quota!effective"
# Fields of a bucket: when it will be full, and when it was found to be lost, microseconds; all
# others are leases, named by their edge.
FULL_AT_FIELD, LOST_AT_FIELD = "f", "l"


class Level(StrEnum):
    """Who shares a bucket, from the narrowest to the widest."""

    ADDRESS = "address"
    CREDENTIAL = "credential"
    TENANT = "tenant"
    GLOBAL = "global"


def bucket_key(bucket: str, level: Level, *subject: str) -> str:
    """The key of one bucket.

    Args:
        bucket: its name in the contract: "api".
        level: who shares it.
        subject: who: an address block, a tenant, a tenant and a credential; none for GLOBAL.
    """
    return PREFIX + ":".join((bucket, level, *(quote(part, safe="") for part in subject)))
