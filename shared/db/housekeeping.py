"""Keeps shards small.

Request ids are forgotten when their time is over, a page at a time; moves whose movers have died
are ended.
"""

import asyncio

import structlog

from shared.clock import Clock, to_us
from shared.db.port import Shard, Shards
from shared.errors import TenfoldError

# The promise to callers is 72 hours (spec/common.md 0.2); a retry later is a new request.
REQUEST_IDS_KEPT_S = 72 * 3600.0
SWEEP_S = 600.0
# Small enough that a page holds up other writers for a few milliseconds only.
PAGE_ROWS = 500

_DELETE_OLD = f"""
DELETE FROM idempotency WHERE (bucket, scope, key) IN (
    SELECT bucket, scope, key FROM idempotency
    WHERE created_at_us < $1 AND tenfold_writable(bucket)
    ORDER BY created_at_us LIMIT {PAGE_ROWS})
"""  # noqa: S608 - a constant of ours

_log = structlog.get_logger(__name__)


async def run_housekeeping(shards: Shards, *, clock: Clock) -> None:
    """Sweep every ten minutes until cancelled; what cannot be done now is done later."""
    while True:
        await shards.settle_moves()
        for shard in shards.all():
            try:
                await forget_request_ids(shard, clock=clock)
            except TenfoldError as error:
                _log.warning("housekeeping.failed", shard=shard.index, error=str(error))
        await asyncio.sleep(SWEEP_S)


async def forget_request_ids(shard: Shard, *, clock: Clock) -> int:
    """Delete what is older than 72 hours; returns how many rows there were."""
    before_us = to_us(clock.now()) - int(REQUEST_IDS_KEPT_S * 1e6)
    deleted_count = 0
    while True:
        async with shard.transaction() as tx:
            page_count = await tx.execute(_DELETE_OLD, before_us)
        deleted_count += page_count
        if page_count < PAGE_ROWS:
            return deleted_count
