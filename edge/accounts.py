"""Whose buckets pay for a call, and what this edge knows of each.

An account is found by a few texts of the request and holds its buckets: one per level that
the tenant's plan limits. Buckets of wider levels are shared by many accounts.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from shared.quota.gcra import Quota, whole_seconds
from shared.quota.keys import Level, bucket_key

# Accounts that this process remembers; at some 800 bytes each, 80 MB.
ACCOUNTS_MAX = 100_000
# Limits of all plans and levels that are in use at once.
NAMED_KEPT_MAX = 4096
# Over all edges, what may be on lease of one bucket: this part of its burst.
LEASED_PART_MAX = 0.05

# (bucket, tenant, level) -> its limit, or None.
LimitOf = Callable[[str, str, Level], Quota | None]


class Bucket:
    """One bucket as this edge knows it.

    Attributes:
        key: its name in the store.
        quota: its rate and burst; its name is what clients see.
        level: who shares it.
        leased_points_max: what may be on lease over all edges.
        full_at_us: by what was heard last, when it is full; by this process's steady clock.
        held_points: leased and not spent.
        granted_points: what the store believes to be on lease here; never less than is held.
        lease_ends_us: from then on nothing held may be spent.
        surplus_points: to be given back with the next question.
        asked_at_us: when the store was last asked.
        is_asking: a question that may bring a lease is under way.
        was_local: spent without the store, which does not know of it yet.
    """

    __slots__ = (
        "asked_at_us",
        "full_at_us",
        "granted_points",
        "held_points",
        "is_asking",
        "key",
        "lease_ends_us",
        "leased_points_max",
        "level",
        "quota",
        "surplus_points",
        "was_local",
    )

    def __init__(self, key: str, quota: Quota, level: Level) -> None:
        self.key, self.quota, self.level = key, quota, level
        self.leased_points_max = math.floor(quota.burst_points * LEASED_PART_MAX)
        self.full_at_us = self.lease_ends_us = self.asked_at_us = 0
        self.held_points = self.granted_points = self.surplus_points = 0
        self.is_asking = self.was_local = False

    def remaining_points(self, now_us: int) -> int:
        """What is left, by what was heard last, and what is held; 0 or more."""
        quota = self.quota
        debt_us = self.full_at_us - now_us
        left_us = quota.burst_us - debt_us if debt_us > 0 else quota.burst_us
        return (left_us // quota.refill_us if left_us > 0 else 0) + self.held_points

    def take_back(self, points: int, now_us: int) -> None:
        """Points that a call did not use: into the lease as far as it was granted."""
        room = self.granted_points - self.held_points if now_us < self.lease_ends_us else 0
        kept = min(points, room)
        self.held_points += kept
        self.surplus_points += points - kept
        self.full_at_us -= (points - kept) * self.quota.refill_us


class Account:
    """The buckets that pay for one caller's calls.

    Attributes:
        buckets: the caller's own first.
        own: that of the caller alone.
        policy: the RateLimit-Policy field.
        told: those whose remaining points a caller may know: what all tenants together do is
            nobody's business.
        refusal: the store's last, or None; for `refused_cost` or more it holds from
            `refused_at_us` to `refused_until_us`.
    """

    __slots__ = (
        "buckets",
        "own",
        "policy",
        "refusal",
        "refused_at_us",
        "refused_cost",
        "refused_until_us",
        "told",
    )

    def __init__(self, buckets: tuple[Bucket, ...]) -> None:
        self.buckets, self.own = buckets, buckets[0]
        self.told = tuple(bucket for bucket in buckets if bucket.level is not Level.GLOBAL)
        self.policy = ", ".join(
            f'"{b.quota.name}";q={b.quota.burst_points};w={b.quota.window_s}' for b in self.told
        ).encode()
        self.refused_at_us = self.refused_until_us = self.refused_cost = 0
        self.refusal: Any = None

    def limit(self, now_us: int, refund_points: int, part: float = 1.0) -> bytes:
        """The RateLimit field: of the bucket that has least left.

        Args:
            now_us: by the clock of the buckets' moments.
            refund_points: what the call will give back.
            part: of the buckets that may be spent here.

        Its time is what the remaining points last for at the bucket's rate, so that no client
        that divides one by the other asks for more than that (draft, section 7.5).
        """
        tightest = self.own
        left = tightest.remaining_points(now_us)
        for bucket in self.told[1:]:
            others = bucket.remaining_points(now_us)
            if others < left:
                tightest, left = bucket, others
        quota = tightest.quota
        left = min(int(left * part) + refund_points, quota.burst_points)
        lasts_s = whole_seconds((left or 1) * quota.refill_us)
        return b'"%b";r=%d;t=%d' % (quota.name.encode(), left, lasts_s)


class Accounts:
    """Finds accounts; forgets those longest unused, and what it knew of their buckets.

    Two generations bound the memory: what is found in the old one moves to the young one, and
    when that is full, it becomes the old one. An account takes its buckets along, so that
    there is never more than one object for a bucket: its lease is counted once.

    Args:
        limit_of: the plans' limits.
        accounts_max: how many are remembered.
    """

    def __init__(self, limit_of: LimitOf, *, accounts_max: int = ACCOUNTS_MAX) -> None:
        self._limit_of = limit_of
        self._young_max = max(1, accounts_max // 2)
        self.forget()

    def forget(self) -> None:
        """Forget everything: limits have changed, or buckets were reset."""
        self._young: dict[tuple[str, ...], Account] = {}
        self._old: dict[tuple[str, ...], Account] = {}
        self._buckets: dict[str, Bucket] = {}
        self._old_buckets: dict[str, Bucket] = {}

    def of(self, bucket: str, tenant: str, who: str, block: str) -> Account:
        """The account of a caller.

        Args:
            bucket: named by the contract.
            tenant: of the caller.
            who: its credential; "" counts by address block.
            block: see edge.exchange.address_block.
        """
        key = (bucket, tenant, who, block)
        return self._young.get(key) or self._found(key)

    def _found(self, key: tuple[str, str, str, str]) -> Account:
        account = self._old.get(key)
        if account is None:
            account = Account(tuple(self._buckets_of(*key)))
        for bucket in account.buckets:
            self._buckets.setdefault(bucket.key, bucket)
        self._young[key] = account
        if len(self._young) > self._young_max or len(self._buckets) > 2 * self._young_max:
            self._old, self._young = self._young, {}
            self._old_buckets, self._buckets = self._buckets, {}
        return account

    def _buckets_of(self, name: str, tenant: str, who: str, block: str) -> list[Bucket]:
        limits = {level: self._limit_of(name, tenant, level) for level in Level}
        subjects = {
            Level.CREDENTIAL: (tenant, who),
            Level.ADDRESS: (tenant, block),
            Level.TENANT: (tenant,),
            Level.GLOBAL: (),
        }
        if not who:  # the address stands for the caller, who is of no tenant
            limits[Level.TENANT] = None
            limits[Level.ADDRESS] = limits[Level.ADDRESS] or limits[Level.CREDENTIAL]
            limits[Level.CREDENTIAL] = None
        own = Level.CREDENTIAL if who else Level.ADDRESS
        # A caller without any limit has a bucket, too, which is as good as bottomless.
        limits[own] = limits[own] or _UNLIMITED
        buckets = []
        for level, subject in sorted(subjects.items(), key=lambda item: item[0] is not own):
            if (quota := limits[level]) is not None:
                shown = name if level is own else f"{name}-{level}"
                buckets.append(self._bucket(bucket_key(name, level, *subject), quota, level, shown))
        return buckets

    def _bucket(self, key: str, quota: Quota, level: Level, shown: str) -> Bucket:
        known = self._buckets.get(key) or self._old_buckets.get(key)
        return known or Bucket(key, _named(quota, shown), level)


@lru_cache(maxsize=NAMED_KEPT_MAX)
def _named(quota: Quota, name: str) -> Quota:
    """One object for all buckets alike: plans are few, callers are many."""
    return replace(quota, name=name)


# Not more than the arithmetic holds.
_UNLIMITED = Quota("unlimited", 1_000_000_000, 0.000001)
