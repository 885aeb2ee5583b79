"""Where the timestamps of `edge.quota` live; here: in this process alone.

A mesh counts in Valkey for all its edges (`edge.quota_valkey`). An edge in front of a server
that is not a mesh counts here, by itself.
"""

from collections import OrderedDict
from typing import NamedTuple, Protocol

from edge.quota import Quota, give_back, spend
from shared.clock import Clock

# Buckets kept in this process; at 200 bytes each, 20 MB.
LOCAL_KEYS_MAX = 100_000


class Verdict(NamedTuple):
    """What a store says about one call.

    Attributes:
        is_allowed: whether the call may pass.
        remaining_points: what is left now, 0 or more.
        full_in_s: seconds until the bucket is full again.
        retry_after_s: 0 if allowed; else the wait after which this cost would pass.
        is_local: decided in this process, because Valkey is away.
    """

    is_allowed: bool
    remaining_points: int
    full_in_s: float
    retry_after_s: float = 0.0
    is_local: bool = False


class QuotaStore(Protocol):
    """Keeps one timestamp per key."""

    async def spend(self, key: str, quota: Quota, cost_points: int, *, is_strict: bool) -> Verdict:
        """Charge a bucket, all or nothing.

        Args:
            key: names the bucket; no secrets, it is stored as it is.
            quota: the bucket's rate and burst.
            cost_points: 0 or more; a cost above the burst is charged as the burst.
            is_strict: the bucket gets less than its share while Valkey is away.
        """
        ...

    async def give_back(self, key: str, quota: Quota, points: int) -> None:
        """Return points that a call did not use; without effect while the store is away."""
        ...


class LocalQuotaStore:
    """See QuotaStore. Buckets of this process alone, at most LOCAL_KEYS_MAX of them.

    When there are more keys than that, the one longest unused is forgotten, which fills
    its bucket: an attacker needs as many addresses as there are keys to gain one burst.
    """

    def __init__(self, clock: Clock, *, keys_max: int = LOCAL_KEYS_MAX) -> None:
        self._clock = clock
        self._keys_max = keys_max
        self._full_at_us: OrderedDict[str, int] = OrderedDict()

    async def spend(self, key: str, quota: Quota, cost_points: int, *, is_strict: bool) -> Verdict:
        """See QuotaStore.spend; nothing else counts, so a strict bucket is like any other."""
        del is_strict
        return self.spend_now(key, quota, cost_points)

    async def give_back(self, key: str, quota: Quota, points: int) -> None:
        """See QuotaStore.give_back."""
        self.give_back_now(key, quota, points)

    def spend_now(self, key: str, quota: Quota, cost_points: int) -> Verdict:
        """See QuotaStore.spend; needs no waiting."""
        now_us = int(self._clock.monotonic_s() * 1_000_000)
        cost_points = min(cost_points, quota.burst_points)
        full_at_us = self._full_at_us.get(key, 0)
        decision = spend(quota, full_at_us, now_us=now_us, cost_points=cost_points)
        self._remember(key, decision.full_at_us)
        return Verdict(
            decision.is_allowed,
            decision.remaining_points,
            max(0, decision.full_at_us - now_us) / 1_000_000,
            decision.retry_after_s,
        )

    def give_back_now(self, key: str, quota: Quota, points: int) -> None:
        """See QuotaStore.give_back; needs no waiting."""
        if key in self._full_at_us:
            self._full_at_us[key] = give_back(quota, self._full_at_us[key], points=points)

    def _remember(self, key: str, full_at_us: int) -> None:
        self._full_at_us[key] = full_at_us
        self._full_at_us.move_to_end(key)
        if len(self._full_at_us) > self._keys_max:
            self._full_at_us.popitem(last=False)
