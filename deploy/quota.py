"""What operators do to quotas that are in force: show, set, reset. Plain commands to Valkey.

The edges look for changes once a second (`edge/mesh.py`).
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.config import ConfigError
from shared.quota.gcra import Quota
from shared.quota.keys import (
    EDGES_KEY,
    EFFECTIVE_KEY,
    FULL_AT_FIELD,
    LOST_AT_FIELD,
    OVERRIDES_KEY,
    REVISION_KEY,
    Level,
    bucket_key,
)
from shared.quota.plans import DEFAULT_PLAN, Limits, Plans, limit_field, limit_text, tenant_field

if TYPE_CHECKING:  # no other command needs it loaded
    from redis import Redis

# A reset bucket stays known as full for this long, so that no edge brings its old debt back.
RESET_KEPT_MS = 5_000
SCAN_COUNT = 500


class NoEdges(Exception):
    """No edge has told what it obeys: none runs, or not with this Valkey."""


@dataclass(frozen=True)
class Use:
    """One bucket at this moment.

    Attributes:
        key: its name.
        level: who shares it.
        quota: its limit.
        remaining_points: what is left, points on lease not included.
        leased_points: on lease to edges.
    """

    key: str
    level: Level
    quota: Quota
    remaining_points: int
    leased_points: int


class Operator:
    """Shows and changes what the edges obey.

    Args:
        valkey: a synchronous client; it must answer with bytes.
    """

    def __init__(self, valkey: "Redis") -> None:
        self._valkey = valkey

    def plans(self) -> Plans:
        """What the edges obey now.

        Raises:
            NoEdges: no edge has told.
        """
        told = self._valkey.get(EFFECTIVE_KEY)
        if told is None:
            raise NoEdges("No edge has told what it obeys: is one running, with this Valkey?")
        document: dict[str, Any] = json.loads(told)
        limits: dict[str, Limits] = {DEFAULT_PLAN: {}}
        plans = Plans(limits, document["tenants"])
        fields = {
            limit_field(row["plan"], row["bucket"], Level(row["level"])): row["limit"]
            for row in document["limits"]
        }
        return plans.with_overrides(fields)

    def overrides(self) -> dict[str, str]:
        """What operators have set over settings and file."""
        pairs = sorted(self._valkey.hgetall(OVERRIDES_KEY).items())
        return {_text(name): _text(value) for name, value in pairs}

    def edge_count(self) -> int:
        """How many edges have said lately that they are alive."""
        return self._valkey.zcard(EDGES_KEY)

    def set_limit(self, plan: str, bucket: str, level: Level, quota: Quota | None) -> None:
        """Set one limit over settings and file; None is no limit.

        Raises:
            ConfigError: there is no such bucket, or the limit is no limit of a plan.
            NoEdges: see plans.
        """
        plans, field = self.plans(), limit_field(plan, bucket, level)
        if bucket not in plans.buckets:
            known = ", ".join(sorted(plans.buckets))
            raise ConfigError(f"There is no bucket {bucket!r}: {known}.")
        text = limit_text(quota)
        plans.with_overrides({field: text})
        self._change({field: text})

    def set_plan(self, tenant: str, plan: str) -> None:
        """Give a tenant a plan, over what the file says.

        Raises:
            ConfigError: there is no such plan.
            NoEdges: see plans.
        """
        plans = self.plans()
        if plan not in plans.limits:
            known = ", ".join(sorted(plans.limits))
            raise ConfigError(f"There is no plan {plan!r}: {known}.")
        self._change({tenant_field(tenant): plan})

    def unset(self, field: str) -> bool:
        """Take back what was set; False if nothing was.

        Args:
            field: one of `overrides`.
        """
        removed = self._valkey.hdel(OVERRIDES_KEY, field)
        self._valkey.incr(REVISION_KEY)
        return bool(removed)

    def use(self, tenant: str, *, credential: str = "", address: str = "") -> list[Use]:
        """The buckets that pay for a caller's calls, as they are.

        Raises:
            NoEdges: see plans.
        """
        plans, found = self.plans(), []
        subjects = {
            Level.ADDRESS: (tenant, address) if address else None,
            Level.CREDENTIAL: (tenant, credential) if credential else None,
            Level.TENANT: (tenant,),
            Level.GLOBAL: (),
        }
        for bucket in sorted(plans.buckets):
            for level, subject in subjects.items():
                quota = plans.quota(tenant, bucket, level)
                if quota is not None and subject is not None:
                    found.append(self._use(bucket_key(bucket, level, *subject), level, quota))
        return found

    def reset(self, tenant: str, *, credential: str = "", address: str = "") -> int:
        """Fill the buckets of a tenant, or of one caller in it; how many were not full.

        Args:
            tenant: whose.
            credential: only this one's; with neither this nor an address, the tenant's own and
                those of all its callers.
            address: only this block's.
        """
        names = []
        if not credential and not address:
            names.append(bucket_key("*", Level.TENANT, tenant))
        for level, who in ((Level.CREDENTIAL, credential), (Level.ADDRESS, address)):
            if who or names:  # a subject is percent-encoded: it holds no sign of a pattern
                name = bucket_key("*", level, tenant, who)
                names.append(name if who else f"{name}*")
        count = 0
        for name in names:
            for key in self._valkey.scan_iter(match=name, count=SCAN_COUNT):
                self._fill(key)
                count += 1
        self._valkey.incr(REVISION_KEY)  # edges forget what they knew of it
        return count

    def _fill(self, key: bytes) -> None:
        """Full now, and known to be: were the key gone, an edge would bring its debt back."""
        seconds, microseconds = self._valkey.time()
        now_us = seconds * 1_000_000 + microseconds
        self._valkey.hset(key, FULL_AT_FIELD, str(now_us))
        self._valkey.hdel(key, LOST_AT_FIELD)
        self._valkey.pexpire(key, RESET_KEPT_MS, gt=True)

    def _use(self, key: str, level: Level, quota: Quota) -> Use:
        seconds, microseconds = self._valkey.time()
        now_us = seconds * 1_000_000 + microseconds
        fields = self._valkey.hgetall(key)
        full_at_us = int(fields.pop(FULL_AT_FIELD.encode(), b"0"))
        fields.pop(LOST_AT_FIELD.encode(), None)
        leases = (value.split() for value in fields.values())
        leased = sum(int(points) for points, ends_us in leases if int(ends_us) > now_us)
        left_us = quota.burst_us - max(0, full_at_us - now_us)
        return Use(key, level, quota, max(0, left_us) // quota.refill_us, leased)

    def _change(self, fields: dict[str, str]) -> None:
        for field, value in fields.items():
            self._valkey.hset(OVERRIDES_KEY, field, value)
        self._valkey.incr(REVISION_KEY)


def _text(raw: bytes | str) -> str:
    return raw.decode(errors="replace") if isinstance(raw, bytes) else raw
