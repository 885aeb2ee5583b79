"""Where the timestamps of `edge.quota` live; here: in this process alone.

A mesh counts in Valkey for all its edges (`edge.quota_valkey`). An edge in front of a server
that is not a mesh counts here, by itself.
"""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from edge.quota import Quota, give_back, spend
from shared.clock import Clock

# Buckets kept in this process; at 200 bytes each, 20 MB.
LOCAL_KEYS_MAX = 100_000

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Verdict:
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
        self._full_at: OrderedDict[str, datetime] = OrderedDict()

    async def spend(self, key: str, quota: Quota, cost_points: int, *, is_strict: bool) -> Verdict:
        """See QuotaStore.spend; nothing else counts, so a strict bucket is like any other."""
        del is_strict
        return self.spend_now(key, quota, cost_points)

    async def give_back(self, key: str, quota: Quota, points: int) -> None:
        """See QuotaStore.give_back."""
        self.give_back_now(key, quota, points)

    def spend_now(self, key: str, quota: Quota, cost_points: int) -> Verdict:
        """See QuotaStore.spend; needs no waiting."""
        now = self._clock.now()
        full_at = self._full_at.get(key, _LONG_AGO)
        cost_points = min(cost_points, quota.burst_points)
        decision = spend(quota, full_at, now=now, cost_points=cost_points)
        self._remember(key, decision.full_at)
        return Verdict(
            decision.is_allowed,
            decision.remaining_points,
            max(0.0, (decision.full_at - now).total_seconds()),
            decision.retry_after_s,
        )

    def give_back_now(self, key: str, quota: Quota, points: int) -> None:
        """See QuotaStore.give_back; needs no waiting."""
        if key in self._full_at:
            self._full_at[key] = give_back(quota, self._full_at[key], points=points)

    def _remember(self, key: str, full_at: datetime) -> None:
        self._full_at[key] = full_at
        self._full_at.move_to_end(key)
        if len(self._full_at) > self._keys_max:
            self._full_at.popitem(last=False)
