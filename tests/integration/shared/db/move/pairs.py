"""Shards whose primaries a test kills: each has a standby of its own that has every commit."""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from deploy.local.postgres import ADMIN, OWNER
from shared.db.postgres_promotion import Promoted, promote
from tests.integration.shared.db.move.grounds import SERVICE, Databases
from tests.pair import Pair, running_pair


@dataclass
class Pairs:
    """A ground on pairs of servers, one for each shard.

    Attributes:
        ground: see Ground; every shard's DSN names both hosts.
        pairs: by shard.
    """

    ground: Databases
    pairs: list[Pair]

    async def fail_over(self, shard: int) -> Promoted:
        """Kill a primary and promote its standby, as an operator does."""
        pair = self.pairs[shard]
        primary, _ = pair.nodes
        await pair.end(primary, signal.SIGKILL)
        pair.is_swapped = not pair.is_swapped
        return await promote(self.ground.servers, shard)

    async def mend(self, shard: int) -> None:
        """Make the dead node a standby; from then on every commit waits for it again."""
        await self.pairs[shard].remake()
        await self.pairs[shard].require_standby()


@asynccontextmanager
async def running_pairs(count: int) -> AsyncIterator[Pairs]:
    """So many shards; the first has Control."""
    async with AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(running_pair(SERVICE)) for _ in range(count)]
        for pair in pairs:
            await pair.require_standby()
        service = ",".join(pair.dsn(SERVICE) for pair in pairs)
        yield Pairs(Databases(service, [_operators(pair) for pair in pairs]), pairs)


def _operators(pair: Pair) -> str:
    """A service's role may neither promote nor import rows."""
    own, admin = pair.site.password, pair.site.admin_password
    return pair.dsn(SERVICE).replace(f"{OWNER}:{own}", f"{ADMIN}:{admin}")
