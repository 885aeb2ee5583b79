"""Quotas counted in Valkey for all edges, and by this edge's share while it is away.

Bounds on overshoot, per bucket. With Valkey reachable: none, one script decides. When
Valkey is lost or flushed: one burst more, once, since its timestamps are gone. While it is
away each edge spends from its own share (rate and burst divided by the number of edges; a
strict bucket's share is a quarter of that), so all edges together stay within one rate.
"""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge.quota import Quota
from edge.quota_store import LocalQuotaStore, Verdict
from edge.valkey import ValkeyConnection, ValkeyError, encode
from shared import log
from shared.clock import Clock, to_us

# One answer of a healthy Valkey takes about a millisecond; a caller must not wait longer
# for its quota than for its work.
VALKEY_TIMEOUT_S = 0.1
# After a failure Valkey is left alone for this long, then asked by one call.
VALKEY_PAUSE_S = 1.0
# Log-in and its like get less than their share while nobody counts for all edges.
STRICT_LOCAL_PART = 0.25

# The same arithmetic as edge.quota.spend, decided where the timestamp is. A negative cost
# gives points back. ARGV: refill_us, burst_us, cost_points, now_us ("" for the server's clock).
_SPEND_LUA = """
local refill_us, burst_us, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local now_us = tonumber(ARGV[4])
if not now_us then
  local time = redis.call('TIME')
  now_us = time[1] * 1000000 + time[2]
end
local full_at_us = tonumber(redis.call('GET', KEYS[1]) or '0')
local debt_us = math.max(0, full_at_us - now_us)
local spent_us = math.max(0, debt_us + cost * refill_us)
if cost > 0 and spent_us > burst_us then
  return {0, debt_us, spent_us - burst_us}
end
if spent_us == 0 then
  redis.call('DEL', KEYS[1])
elseif cost ~= 0 then
  local until_us = string.format('%.0f', now_us + spent_us)
  redis.call('SET', KEYS[1], until_us, 'PX', math.ceil(spent_us / 1000) + 1000)
end
return {1, spent_us, 0}
"""

_SPEND_SHA = hashlib.sha1(_SPEND_LUA.encode(), usedforsecurity=False).hexdigest()

_log = log.get_logger("edge.quota")


class ValkeyQuotaStore:
    """See QuotaStore. One atomic script in Valkey, by Valkey's clock.

    Never repeats a command: a charge that was applied and whose answer was lost would be
    charged again.

    Args:
        client: made by `open_valkey`.
        clock: only for tests that compare with edge.quota; None is the server's TIME.
    """

    def __init__(self, client: ValkeyConnection, *, clock: Clock | None = None) -> None:
        self._client = client
        self._clock = clock

    async def spend(self, key: str, quota: Quota, cost_points: int, *, is_strict: bool) -> Verdict:
        """See QuotaStore.spend.

        Raises:
            ValkeyError: Valkey answered with an error, or not at all.
            TimeoutError: it took longer than timeout_s.
        """
        cost_points = min(cost_points, quota.burst_points)
        allowed, debt_us, wait_us = await self._run(key, quota, cost_points)
        left_us = max(0, quota.burst_points * quota.refill_us - debt_us)
        return Verdict(bool(allowed), left_us // quota.refill_us, debt_us / 1e6, wait_us / 1e6)

    async def give_back(self, key: str, quota: Quota, points: int) -> None:
        """See QuotaStore.give_back.

        Raises:
            ValkeyError: Valkey answered with an error, or not at all.
            TimeoutError: it took longer than timeout_s.
        """
        await self._run(key, quota, -points)

    async def _run(self, key: str, quota: Quota, cost_points: int) -> list[int]:
        now_us = "" if self._clock is None else str(to_us(self._clock.now()))
        command = encode(
            "EVALSHA", _SPEND_SHA, "1", key,
            str(quota.refill_us), str(quota.burst_us), str(cost_points), now_us,
        )  # fmt: skip
        try:
            answer: list[int] = await self._client.send(command)
        except ValkeyError as error:
            if not error.is_script_missing:
                raise
            # Valkey was restarted, or its scripts were flushed; nothing was charged.
            await self._client.execute("SCRIPT", "LOAD", _SPEND_LUA)
            answer = await self._client.send(command)
        return answer


class FallbackQuotaStore:
    """See QuotaStore. Valkey while it answers, this edge's share while it does not.

    Args:
        valkey: the store that counts for all edges.
        local: takes over when the first fails.
        edge_count: how many edges share each bucket.
        clock: measures the pauses between two tries.
    """

    def __init__(
        self,
        valkey: ValkeyQuotaStore,
        local: LocalQuotaStore,
        *,
        edge_count: int,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._valkey = valkey
        self._local = local
        self._part = 1 / edge_count
        self._paused_until_s = 0.0
        self.local_decisions = 0

    @property
    def is_local(self) -> bool:
        """Whether Valkey is left alone at this moment."""
        return self._clock.monotonic_s() < self._paused_until_s

    async def spend(self, key: str, quota: Quota, cost_points: int, *, is_strict: bool) -> Verdict:
        """See QuotaStore.spend."""
        if not self.is_local:
            was_away = self._pause_others_if_probing()
            try:
                verdict = await self._valkey.spend(key, quota, cost_points, is_strict=is_strict)
            except (ValkeyError, TimeoutError, OSError) as error:
                self._lose(error)
            else:
                self._recover(was_away)
                return verdict
        return self._spend_locally(key, quota, cost_points, is_strict=is_strict)

    async def give_back(self, key: str, quota: Quota, points: int) -> None:
        """See QuotaStore.give_back."""
        if self.is_local:
            self._local.give_back_now(key, quota.share(self._part), points)
            return
        try:
            await self._valkey.give_back(key, quota, points)
        except (ValkeyError, TimeoutError, OSError) as error:
            self._lose(error)

    def _spend_locally(
        self, key: str, quota: Quota, cost_points: int, *, is_strict: bool
    ) -> Verdict:
        self.local_decisions += 1
        share = quota.share(self._part * STRICT_LOCAL_PART if is_strict else self._part)
        return self._local.spend_now(key, share, cost_points)._replace(is_local=True)

    def _pause_others_if_probing(self) -> bool:
        was_away = self._paused_until_s > 0
        if was_away:
            self._paused_until_s = self._clock.monotonic_s() + VALKEY_PAUSE_S
        return was_away

    def _lose(self, error: Exception) -> None:
        if self._paused_until_s == 0:
            _log.warning("quota store is away, deciding locally", error=type(error).__name__)
        self._paused_until_s = self._clock.monotonic_s() + VALKEY_PAUSE_S

    def _recover(self, was_away: bool) -> None:
        if was_away:
            _log.info("quota store is back")
            self._paused_until_s = 0.0


@asynccontextmanager
async def open_valkey(
    url: str, *, timeout_s: float = VALKEY_TIMEOUT_S
) -> AsyncIterator[ValkeyConnection]:
    """Connect to Valkey when first asked; never repeats a command, never waits long.

    Args:
        url: redis://host:port/0.
        timeout_s: for connecting, and for each answer.
    """
    connection = ValkeyConnection(url, timeout_s=timeout_s)
    try:
        yield connection
    finally:
        connection.close()
