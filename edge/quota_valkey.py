"""Quotas counted in Valkey for all edges, leased in small batches, and shared while it is away.

One script decides over all buckets of an account: all are charged or none, in one round trip, by
Valkey's clock. A bucket that is not strict also lends its edges points in advance, which are
charged when they are lent, so that most calls are decided without a question.

What passes in any time T is at most burst + rate * T, and beyond that, per bucket:

- points on lease: never more than 5 % of the burst over all edges together, for the script
  counts them; an edge that was killed keeps its part from others until its lease ends;
- Valkey away: each edge spends its share (rate and burst divided by the number of edges; of a
  strict bucket a quarter of that), beginning with the debt that it last heard of. All edges
  together stay within one rate; what they had not heard of is at most one burst, once;
- Valkey flushed, restarted empty or evicting: whoever asks next, and for 5 s everybody, brings
  along the debt that it knows. What no edge has heard of is at most one burst, once per loss.
"""

import hashlib
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from edge.accounts import Account, Bucket
from edge.quota_store import Verdict, spend_here
from edge.valkey import ValkeyConnection, ValkeyError, encode
from shared import log
from shared.clock import Clock, to_us
from shared.quota.keys import EDGES_KEY, REVISION_KEY

# Log-in and its like get less than their share while nobody counts for all edges.
STRICT_LOCAL_PART = 0.25
LEASE_US = 10_000_000
# One lease is never more than this, whatever the burst: it is lost if the edge is killed.
LEASE_POINTS_MAX = 1000
# A caller who asks once in this time, or more seldom, gets no lease: it would not use it.
BUSY_US = 2_000_000
# How long a refusal is repeated without a question. An operator's reset waits this long.
REFUSAL_KEPT_US = 1_000_000
# A refusal is looked at once more, if a lease has come while it was asked for.
QUESTIONS_MAX = 2
# An edge that has not been heard of for this long has no share.
EDGE_ALIVE_US = 5_000_000
# Returned with one command each; the rest waits for the next turn.
RETURNS_MAX = 1000

# ARGV: edge, lease_us, now_us ("" for the server's clock), cost, keeper; then per key: refill_us,
# burst_us, known_us, must (1: the debt is at least known_us; 0: only if the key is lost), back,
# held, want, leased_max. want is what the edge wants to hold; -1 leaves its lease as it is.
#
# keeper: 1 if the first key is the caller's own: a refused call pays one point there, if another
# bucket refused it, and nothing anywhere else.
#
# A hash per bucket: "f" is when it is full, an edge's name is its lease, "points end". "l" is when
# it was found to be lost: for a moment after that, what each edge knows of the debt counts, since
# the first that came may have known least.
_DECIDE_LUA = """
local edge, lease_us = ARGV[1], tonumber(ARGV[2])
local now_us, cost = tonumber(ARGV[3]), tonumber(ARGV[4])
if not now_us then
  local time = redis.call('TIME')
  now_us = time[1] * 1000000 + time[2]
end
local buckets, is_refused = {}, false
for i, key in ipairs(KEYS) do
  local at = 5 + (i - 1) * 8
  local b = {refill_us = tonumber(ARGV[at + 1]), burst_us = tonumber(ARGV[at + 2]),
    held = tonumber(ARGV[at + 6]), want = tonumber(ARGV[at + 7]), others = 0, last_us = 0}
  local full_at_us, lost_at_us
  local fields = redis.call('HGETALL', key)
  for j = 1, #fields, 2 do
    if fields[j] == 'f' then
      full_at_us = tonumber(fields[j + 1])
    elseif fields[j] == 'l' then
      lost_at_us = tonumber(fields[j + 1])
    else
      local points, end_us = string.match(fields[j + 1], '(%d+) (%d+)')
      points, end_us = tonumber(points), tonumber(end_us)
      if end_us <= now_us then
        redis.call('HDEL', key, fields[j])
      else
        b.last_us = math.max(b.last_us, end_us)
        if fields[j] ~= edge then b.others = b.others + points end
      end
    end
  end
  local debt_us = math.max(0, (full_at_us or 0) - now_us)
  local known_us = math.min(tonumber(ARGV[at + 3]), b.burst_us)
  if not full_at_us and known_us > 0 then lost_at_us, b.is_lost = now_us, true end
  if ARGV[at + 4] == '1' or (lost_at_us and now_us - lost_at_us < 5000000) then
    debt_us = math.max(debt_us, known_us)
  end
  b.debt_us = math.max(0, debt_us - tonumber(ARGV[at + 5]) * b.refill_us)
  b.cost_us = math.min(cost * b.refill_us, b.burst_us)
  b.wait_us = cost > 0 and math.max(0, b.debt_us + b.cost_us - b.burst_us) or 0
  is_refused = is_refused or b.wait_us > 0
  buckets[i] = b
end
local answer = {is_refused and 0 or 1}
for i, b in ipairs(buckets) do
  local key, grant = KEYS[i], 0
  if not is_refused then
    b.debt_us = b.debt_us + b.cost_us
  elseif i == 1 and ARGV[5] == '1' and b.wait_us == 0 then
    b.debt_us = b.debt_us + math.min(b.refill_us, b.cost_us)
  end
  if b.want >= 0 then
    local leased_max = tonumber(ARGV[5 + i * 8])
    -- Near its end a bucket lends nothing: what one edge holds, another would miss.
    local left = math.floor((b.burst_us - b.debt_us) / b.refill_us) - leased_max
    if not is_refused then
      grant = math.max(0, math.min(b.want - b.held, leased_max - b.others - b.held, left))
    end
    b.debt_us = b.debt_us + grant * b.refill_us
    if b.held + grant > 0 then
      local end_us = now_us + lease_us
      b.last_us = math.max(b.last_us, end_us)
      redis.call('HSET', key, edge, string.format('%d %.0f', b.held + grant, end_us))
    else
      redis.call('HDEL', key, edge)
    end
  end
  if b.debt_us == 0 and b.last_us == 0 then
    redis.call('DEL', key)
  else
    redis.call('HSET', key, 'f', string.format('%.0f', now_us + b.debt_us))
    if b.is_lost then redis.call('HSET', key, 'l', string.format('%.0f', now_us)) end
    local kept_us = math.max(b.debt_us, b.last_us - now_us)
    redis.call('PEXPIRE', key, math.ceil(kept_us / 1000) + 1000)
  end
  answer[i * 3 - 1], answer[i * 3], answer[i * 3 + 1] = b.debt_us, b.wait_us, grant
end
return answer
"""
_DECIDE_SHA = hashlib.sha1(_DECIDE_LUA.encode(), usedforsecurity=False).hexdigest()

# ARGV: edge, alive_us. How many edges there are, this one included, and the plans' revision.
_BEAT_LUA = """
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
redis.call('ZADD', KEYS[1], string.format('%.0f', now_us), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.0f', now_us - ARGV[2]))
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[2] / 1000) * 2)
return {redis.call('ZCARD', KEYS[1]), redis.call('GET', KEYS[2]) or ''}
"""
_AWAY = (ValkeyError, TimeoutError, OSError)

_log = log.get_logger("edge.quota")


@dataclass
class QuotaCounts:
    """How decisions were made, for metrics and tests."""

    leased: int = 0
    asked: int = 0
    local: int = 0
    known: int = 0


class ValkeyQuotas:
    """See QuotaStore. One atomic script in Valkey; leases and the share of this edge here.

    Never repeats a command: a charge that was applied and whose answer was lost would be
    charged again.

    Args:
        client: made by `open_valkey`.
        clock: this process's.
        edge: a name that no other edge has.
        edges_min: how many edges there are at least.
        server_clock: only for tests that compare with shared.quota.gcra; None is Valkey's.
    """

    def __init__(
        self,
        client: ValkeyConnection,
        clock: Clock,
        *,
        edge: str,
        edges_min: int = 1,
        server_clock: Clock | None = None,
    ) -> None:
        self._client = client
        self._clock = clock
        self._server_clock = server_clock
        self._edge = edge
        self._edges_min = edges_min
        self._leased: deque[tuple[int, Bucket]] = deque()
        self.edge_count = edges_min
        self.is_away = False
        self.counts = QuotaCounts()

    def now_us(self) -> int:
        """See QuotaStore.now_us."""
        return int(self._clock.monotonic_s() * 1_000_000)

    def decide_now(self, account: Account, cost_points: int, *, is_strict: bool) -> Verdict | None:
        """See QuotaStore.decide_now. A lease pays, a refusal still holds, or Valkey is away."""
        now_us = self.now_us()
        if not is_strict:
            for bucket in account.buckets:
                if bucket.held_points < cost_points or now_us >= bucket.lease_ends_us:
                    break
            else:
                for bucket in account.buckets:
                    bucket.held_points -= cost_points
                self.counts.leased += 1
                return _LEASED
        if cost_points >= account.refused_cost and now_us < account.refused_until_us:
            self.counts.known += 1
            refusal = account.refusal
            assert isinstance(refusal, Verdict)
            left_s = refusal.retry_after_s - (now_us - account.refused_at_us) / 1e6
            return refusal._replace(retry_after_s=max(left_s, 0.001), path="known")
        if self.is_away:
            return self._spend_share(account, cost_points, now_us, is_strict=is_strict)
        return None

    async def decide(self, account: Account, cost_points: int, *, is_strict: bool) -> Verdict:
        """See QuotaStore.decide. Asks for the buckets whose leases cannot pay."""
        verdict = _LEASED
        for _ in range(QUESTIONS_MAX):
            now_us = self.now_us()
            paid, asked = _parted(account, cost_points, now_us, is_strict=is_strict)
            if not asked:
                self.counts.leased += 1
                return _LEASED
            try:
                verdict = await self._ask(account, asked, cost_points, may_lease=not is_strict)
            except _AWAY as error:
                _unpay(paid, cost_points, self.now_us())
                self._lose(error)
                return self._spend_share(account, cost_points, self.now_us(), is_strict=is_strict)
            except BaseException:
                _unpay(paid, cost_points, self.now_us())
                raise
            if verdict.is_allowed:
                break
            _unpay(paid, cost_points, self.now_us(), keeper=account.own)
            # Meanwhile another call may have brought a lease of what is refused to this one.
            now_us = self.now_us()
            if is_strict or not all(_pays(b, cost_points, now_us) for b in verdict.refused_by):
                break
        self.counts.asked += 1
        return verdict

    def give_back(self, account: Account, points: int) -> None:
        """See QuotaStore.give_back."""
        now_us = self.now_us()
        account.refused_until_us = 0
        for bucket in account.buckets:
            bucket.take_back(points, now_us)

    async def beat(self) -> str | None:
        """Say that this edge is alive, learn how many are, and return leases that have ended.

        Returns:
            The revision of plans and resets; None if Valkey is away.
        """
        try:
            count, revision = await self._client.execute(
                "EVAL", _BEAT_LUA, "2", EDGES_KEY, REVISION_KEY, self._edge, str(EDGE_ALIVE_US)
            )
            await self._return_leases(ended_by_us=self.now_us())
        except _AWAY as error:
            self._lose(error)
            return None
        self.edge_count = max(int(count), self._edges_min)
        if self.is_away:
            _log.info("quota store is back")
            self.is_away = False
        return str(revision, "utf-8")

    async def close(self) -> None:
        """Give back all that is on lease here; nothing may be decided afterwards."""
        try:
            await self._return_leases(ended_by_us=None)
            await self._client.execute("ZREM", EDGES_KEY, self._edge)
        except _AWAY as error:
            _log.info("leases not returned; they end by themselves", error=type(error).__name__)

    def share_of(self, bucket: Bucket) -> int:
        """What this edge wants to hold of a bucket: the same as each other edge."""
        return min(bucket.leased_points_max // self.edge_count, LEASE_POINTS_MAX)

    async def _ask(
        self, account: Account, buckets: Sequence[Bucket], cost_points: int, *, may_lease: bool
    ) -> Verdict:
        now_us = self.now_us()
        question = _Question(self, buckets, cost_points, now_us, may_lease=may_lease)
        keeper = int(buckets[0] is account.own)
        try:
            answer = await self._run(question.command(self._edge, self._server_now(), keeper))
        finally:
            question.end()
        self._hear(question, answer)
        if answer[0]:
            return _ASKED
        waits = answer[2::3]
        refused_by = tuple(b for b, wait in zip(buckets, waits, strict=True) if wait > 0)
        verdict = Verdict(False, max(waits) / 1e6, refused_by, path="asked")
        account.refusal, account.refused_cost = verdict, cost_points
        account.refused_at_us = now_us
        account.refused_until_us = now_us + min(max(waits), REFUSAL_KEPT_US)
        return verdict

    def _hear(self, question: "_Question", answer: list[int]) -> None:
        now_us = question.asked_at_us
        for place, bucket in enumerate(question.buckets):
            debt_us, _, grant = answer[1 + 3 * place : 4 + 3 * place]
            bucket.full_at_us = now_us + debt_us
            bucket.was_local = False
            held = question.held[place]
            if held is not None:
                self._take_lease(bucket, held, grant, now_us)

    def _take_lease(self, bucket: Bucket, held: int, grant: int, asked_at_us: int) -> None:
        """What was granted is spent here, by this clock, before Valkey thinks that it ends."""
        bucket.granted_points = held + grant
        over = bucket.held_points + grant - bucket.granted_points
        bucket.held_points += grant - max(0, over)
        bucket.surplus_points += max(0, over)
        if grant > 0:
            bucket.lease_ends_us = asked_at_us + LEASE_US
            self._leased.append((bucket.lease_ends_us, bucket))

    async def _return_leases(self, *, ended_by_us: int | None) -> None:
        """Give back what ended leases still hold; in Valkey they end by themselves."""
        for _ in range(RETURNS_MAX):
            if not self._leased or (ended_by_us is not None and self._leased[0][0] > ended_by_us):
                return
            ends_us, bucket = self._leased.popleft()
            if bucket.lease_ends_us != ends_us:  # there is a newer one
                continue
            bucket.surplus_points += bucket.held_points
            bucket.held_points = bucket.granted_points = bucket.lease_ends_us = 0
            if bucket.surplus_points:
                await self._ask(Account((bucket,)), (bucket,), 0, may_lease=False)

    def _spend_share(
        self, account: Account, cost_points: int, now_us: int, *, is_strict: bool
    ) -> Verdict:
        self.counts.local += 1
        part = 1 / self.edge_count
        if is_strict:
            part *= STRICT_LOCAL_PART
        verdict = spend_here(account, cost_points, now_us, part=part)
        for bucket in account.buckets:
            bucket.was_local = True
        return verdict._replace(is_local=True)

    async def _run(self, command: bytes) -> list[int]:
        try:
            answer: list[int] = await self._client.send(command)
        except ValkeyError as error:
            if not error.is_script_missing:
                raise
            # Valkey was restarted, or its scripts were flushed; nothing was charged.
            await self._client.execute("SCRIPT", "LOAD", _DECIDE_LUA)
            answer = await self._client.send(command)
        return answer

    def _server_now(self) -> str:
        return "" if self._server_clock is None else str(to_us(self._server_clock.now()))

    def _lose(self, error: Exception) -> None:
        if not self.is_away:
            _log.warning("quota store is away, deciding locally", error=type(error).__name__)
        self.is_away = True


def _pays(bucket: Bucket, cost_points: int, now_us: int) -> bool:
    """Whether what is on lease here can pay."""
    return bucket.held_points >= cost_points and now_us < bucket.lease_ends_us


def _parted(
    account: Account, cost_points: int, now_us: int, *, is_strict: bool
) -> tuple[list[Bucket], list[Bucket]]:
    """The buckets whose leases have paid now, and those that must be asked for."""
    if is_strict:
        return [], list(account.buckets)
    paid = [bucket for bucket in account.buckets if _pays(bucket, cost_points, now_us)]
    for bucket in paid:
        bucket.held_points -= cost_points
    return paid, [bucket for bucket in account.buckets if bucket not in paid]


def _unpay(
    paid: Iterable[Bucket], cost_points: int, now_us: int, *, keeper: Bucket | None = None
) -> None:
    """What leases paid for a call that did not pass; one point is kept of its caller's own."""
    for bucket in paid:
        bucket.take_back(cost_points - (1 if bucket is keeper else 0), now_us)


class _Question:
    """One question to Valkey: what is charged, returned and wanted of each bucket.

    Attributes:
        held: per bucket, what was reported to be held; None where the lease stays as it is.
    """

    def __init__(
        self,
        quotas: ValkeyQuotas,
        buckets: Sequence[Bucket],
        cost_points: int,
        now_us: int,
        *,
        may_lease: bool,
    ) -> None:
        self.buckets, self.cost_points, self.asked_at_us = buckets, cost_points, now_us
        self.held: list[int | None] = []
        self._words: list[str] = []
        for bucket in buckets:
            # Only one question at a time speaks of a lease: a second would report what the
            # first is about to change, and be granted too much.
            speaks = may_lease and not bucket.is_asking and bucket.leased_points_max > 0
            self.held.append(self._add(bucket, quotas, speaks=speaks))

    def _add(self, bucket: Bucket, quotas: ValkeyQuotas, *, speaks: bool) -> int | None:
        now_us, back, want = self.asked_at_us, bucket.surplus_points, -1
        bucket.surplus_points = 0
        if speaks:
            bucket.is_asking = True
            if now_us >= bucket.lease_ends_us:
                back += bucket.held_points
                bucket.held_points = bucket.granted_points = 0
            share, is_busy = quotas.share_of(bucket), now_us - bucket.asked_at_us < BUSY_US
            want = share if is_busy and 0 < self.cost_points <= share else bucket.held_points
            # What comes back meanwhile is no part of what Valkey is told.
            bucket.granted_points = bucket.held_points
        bucket.asked_at_us = now_us
        known_us = max(0, bucket.full_at_us - now_us)
        numbers = (
            bucket.quota.refill_us,
            bucket.quota.burst_us,
            known_us,
            int(bucket.was_local),
            back,
            bucket.held_points,
            want,
            bucket.leased_points_max,
        )
        self._words += map(str, numbers)
        return bucket.held_points if speaks else None

    def command(self, edge: str, server_now_us: str, keeper: int) -> bytes:
        """The command that asks it."""
        keys = [bucket.key for bucket in self.buckets]
        fixed = (edge, str(LEASE_US), server_now_us, str(self.cost_points), str(keeper))
        return encode("EVALSHA", _DECIDE_SHA, str(len(keys)), *keys, *fixed, *self._words)

    def end(self) -> None:
        """Others may speak of the leases again."""
        for bucket, held in zip(self.buckets, self.held, strict=True):
            if held is not None:
                bucket.is_asking = False


@asynccontextmanager
async def open_valkey(url: str, *, timeout_s: float) -> AsyncIterator[ValkeyConnection]:
    """Connect to Valkey when first asked; never repeats a command, never waits long.

    Args:
        url: redis://host:port/0.
        timeout_s: for connecting, and for each answer. A healthy Valkey answers within a
            millisecond; a caller must not wait longer for its quota than for its work.
    """
    connection = ValkeyConnection(url, timeout_s=timeout_s)
    try:
        yield connection
    finally:
        connection.close()


_LEASED = Verdict(True, path="leased")
_ASKED = Verdict(True, path="asked")
