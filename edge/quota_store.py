"""Decides over all buckets of an account at once: here, in this process alone.

An edge of a mesh asks Valkey (`edge.quota_valkey`), most of the time only for leases. An edge
in front of a server that is not a mesh decides here, by itself.
"""

from collections import OrderedDict
from typing import NamedTuple, Protocol

from edge.accounts import Account, Bucket
from shared.clock import Clock
from shared.quota.gcra import Quota, spend

# Buckets kept in this process; at 200 bytes each, 20 MB.
LOCAL_KEYS_MAX = 100_000


class Verdict(NamedTuple):
    """What a store says about one call.

    Attributes:
        is_allowed: whether the call may pass.
        retry_after_s: 0 if allowed; else the wait after which this cost would pass.
        refused_by: the buckets that cannot pay.
        is_local: decided in this process, because Valkey is away.
        part: of the quota that could be spent; less than 1 is a share.
        path: how it was decided, for the counters: "leased", "asked", "local" or "known".
    """

    is_allowed: bool
    retry_after_s: float = 0.0
    refused_by: tuple[Bucket, ...] = ()
    is_local: bool = False
    part: float = 1.0
    path: str = "local"


class QuotaStore(Protocol):
    """Charges accounts; all of their buckets, or none."""

    def decide_now(self, account: Account, cost_points: int, *, is_strict: bool) -> Verdict | None:
        """Charge without waiting.

        Args:
            account: whose buckets.
            cost_points: 0 or more; above a bucket's burst it is charged as the burst.
            is_strict: no lease pays for this bucket, and its share is smaller.

        Returns:
            None if it takes a question to the store: then `decide` tells.
        """
        ...

    async def decide(self, account: Account, cost_points: int, *, is_strict: bool) -> Verdict:
        """Charge; never raises because the store is away. See decide_now."""
        ...

    def give_back(self, account: Account, points: int) -> None:
        """Return points that a call did not use to each of its buckets; does not wait."""
        ...

    def now_us(self) -> int:
        """This process's steady clock, microseconds."""
        ...


class LocalQuotas:
    """See QuotaStore. What accounts themselves remember is all there is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now_us(self) -> int:
        """See QuotaStore.now_us."""
        return int(self._clock.monotonic_s() * 1_000_000)

    def decide_now(self, account: Account, cost_points: int, *, is_strict: bool) -> Verdict:
        """See QuotaStore.decide_now; nothing else counts, so a strict bucket is like any other."""
        del is_strict
        return spend_here(account, cost_points, self.now_us())

    async def decide(self, account: Account, cost_points: int, *, is_strict: bool) -> Verdict:
        """See QuotaStore.decide."""
        return self.decide_now(account, cost_points, is_strict=is_strict)

    def give_back(self, account: Account, points: int) -> None:
        """See QuotaStore.give_back."""
        for bucket in account.buckets:
            bucket.full_at_us -= points * bucket.quota.refill_us


def spend_here(account: Account, cost_points: int, now_us: int, *, part: float = 1.0) -> Verdict:
    """Charge what the account's buckets remember, or nothing.

    Args:
        account: whose buckets.
        cost_points: of the call.
        now_us: by the clock of the buckets' moments.
        part: of each bucket's rate and burst that may be spent here.
    """
    spent, refused_by, wait_s = [], [], 0.0
    for bucket in account.buckets:
        share = bucket.quota if part == 1.0 else bucket.quota.share(part)
        cost = min(cost_points, share.burst_points)
        decision = spend(share, bucket.full_at_us, now_us=now_us, cost_points=cost)
        spent.append(decision.full_at_us)
        if not decision.is_allowed:
            refused_by.append(bucket)
            wait_s = max(wait_s, decision.retry_after_s)
    if refused_by:
        return Verdict(False, wait_s, tuple(refused_by), part=part)
    for bucket, full_at_us in zip(account.buckets, spent, strict=True):
        bucket.full_at_us = full_at_us
    return Verdict(True, part=part)


class LocalQuotaStore:
    """One timestamp per key in this process, at most LOCAL_KEYS_MAX of them.

    When there are more keys than that, the one longest unused is forgotten, which fills
    its bucket: an attacker needs as many addresses as there are keys to gain one burst.
    """

    def __init__(self, clock: Clock, *, keys_max: int = LOCAL_KEYS_MAX) -> None:
        self._clock = clock
        self._keys_max = keys_max
        self._full_at_us: OrderedDict[str, int] = OrderedDict()

    def wait_s(self, key: str, quota: Quota) -> float:
        """Take one point; 0, or the seconds until there is one."""
        now_us = int(self._clock.monotonic_s() * 1_000_000)
        decision = spend(quota, self._full_at_us.get(key, 0), now_us=now_us)
        self._full_at_us[key] = decision.full_at_us
        self._full_at_us.move_to_end(key)
        if len(self._full_at_us) > self._keys_max:
            self._full_at_us.popitem(last=False)
        return decision.retry_after_s
