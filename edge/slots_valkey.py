"""Slots of all edges, in Valkey: see edge.slots.

A slot is a member of a sorted set, whose score is when it ends; its edge renews it as long as it
is open. So the slots of an edge that was killed are free after SLOT_US, and a set that Valkey has
lost is whole again at the next renewal. While Valkey does not answer, each edge grants its share
of the limit.
"""

from edge.slots import LocalSlots
from edge.valkey import ValkeyConnection, ValkeyError, encode
from shared import log
from shared.clock import Clock

SLOT_US = 15_000_000
RENEW_US = 5_000_000
# What is renewed with one command.
BATCH_MAX = 500

# ARGV: member, limit, slot_us. 1 if there was room.
_TAKE_LUA = """
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now_us))
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], string.format('%.0f', now_us + ARGV[3]), ARGV[1])
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[3] / 1000) + 1000)
return 1
"""
# ARGV: slot_us, members. A set that was lost gets them back.
_RENEW_LUA = """
local time = redis.call('TIME')
local end_us = string.format('%.0f', time[1] * 1000000 + time[2] + ARGV[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], end_us, ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[1] / 1000) + 1000)
return 1
"""
_AWAY = (ValkeyError, TimeoutError, OSError)

_log = log.get_logger("edge.quota")


class ValkeySlots:
    """See SlotStore. Those of all edges, in Valkey; this edge's share while it is away.

    Args:
        client: to Valkey.
        clock: this process's.
        edge: a name that no other edge has.
        slot_us: after this long without a renewal a slot is free.
    """

    def __init__(
        self, client: ValkeyConnection, clock: Clock, *, edge: str, slot_us: int = SLOT_US
    ) -> None:
        self._client = client
        self._clock = clock
        self._edge = edge
        self._slot_us = slot_us
        self._own = LocalSlots()
        self._renewed_at_s = clock.monotonic_s()
        self.edge_count = 1

    async def take(self, key: str, member: str, count_max: int) -> bool:
        """See SlotStore.take."""
        words = (f"{self._edge}:{member}", str(count_max), str(self._slot_us))
        try:
            has_room = await self._client.execute("EVAL", _TAKE_LUA, "1", key, *words)
        except _AWAY as error:
            _log.info("slots are shared locally", error=type(error).__name__)
            share = max(1, count_max // self.edge_count)
            return self._own.take_now(key, member, share)
        if has_room:
            self._own.taken.setdefault(key, set()).add(member)
        return bool(has_room)

    def release(self, key: str, member: str) -> None:
        """See SlotStore.release."""
        self._own.release(key, member)
        self._client.post(encode("ZREM", key, f"{self._edge}:{member}"))

    async def renew_if_due(self) -> None:
        """Keep what is open; harmless while Valkey is away."""
        now_s = self._clock.monotonic_s()
        if now_s - self._renewed_at_s >= min(RENEW_US, self._slot_us / 3) / 1e6:
            self._renewed_at_s = now_s
            await self.renew()

    async def renew(self) -> None:
        """Keep what is open; harmless while Valkey is away."""
        try:
            for key, members in list(self._own.taken.items()):
                named = [f"{self._edge}:{member}" for member in members]
                for start in range(0, len(named), BATCH_MAX):
                    some = named[start : start + BATCH_MAX]
                    words = (str(self._slot_us), *some)
                    await self._client.execute("EVAL", _RENEW_LUA, "1", key, *words)
        except _AWAY as error:
            _log.info("slots not renewed", error=type(error).__name__)
