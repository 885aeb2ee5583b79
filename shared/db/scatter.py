"""Reads over every shard, with proof that each bucket was asked exactly once.

Each shard answers with its rows and the buckets it owned in that snapshot. A bucket that
moves meanwhile is seen twice or never; then the whole is asked again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.db.ids import BUCKET_COUNT
from shared.db.port import Covered, Row, Shard, Shards
from shared.errors import TenfoldError, Unavailable

ATTEMPTS_MAX = 4
RETRY_WAIT_S = 0.05
SHARD_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Gathered:
    """What the shards answered together.

    Attributes:
        rows: of every shard; sorted if a sort key was given.
        unreachable: indexes of shards that did not answer; empty unless partial_ok.
    """

    rows: Sequence[Row]
    unreachable: Sequence[int]


async def scatter(
    shards: Shards,
    sql: str,
    *arguments: object,
    sort_key: Callable[[Row], Any] | None = None,
    descending: bool = False,
    limit: int | None = None,
    timeout_s: float = SHARD_TIMEOUT_S,
    partial_ok: bool = False,
    is_causal: bool = False,
) -> Gathered:
    """Ask every shard at once.

    Args:
        shards: one service's.
        sql: filters its rows by tenfold_owned(<table>.bucket); sorts and limits per shard.
        arguments: of the statement.
        sort_key: how to merge; it must end in something unique, such as the id.
        descending: whether the largest key comes first.
        limit: rows to keep after the merge.
        timeout_s: for each shard.
        partial_ok: answer without shards that are down, and name them.
        is_causal: whether replicas may answer; see Bucket.causal. What they say of a bucket that
            has just moved may not fit together, so they are asked once.

    Raises:
        Unavailable: a shard did not answer, or buckets kept moving.
    """
    for attempt in range(ATTEMPTS_MAX):
        asked = partial(
            _ask_shard, sql=sql, arguments=arguments, is_causal=is_causal and not attempt
        )
        answers, unreachable = await _ask(shards.all(), asked, timeout_s)
        if unreachable and not partial_ok:
            raise Unavailable(f"shards {unreachable} do not answer", retry_after_s=1.0)
        if _covers_once(answers, is_partial=bool(unreachable)):
            rows = [row for answer in answers for row in answer.rows]
            if sort_key is not None:
                rows.sort(key=sort_key, reverse=descending)
            return Gathered(rows[:limit], unreachable)
        if not await shards.learn():
            await asyncio.sleep(RETRY_WAIT_S)
    raise Unavailable("parts of the data are moving; try again", retry_after_s=1.0)


async def _ask_shard(
    shard: Shard, *, sql: str, arguments: tuple[object, ...], is_causal: bool
) -> Covered:
    return await shard.fetch_covered(sql, *arguments, is_causal=is_causal)


async def _ask(
    shards: Sequence[Shard], asked: Callable[[Shard], Awaitable[Covered]], timeout_s: float
) -> tuple[list[Covered], list[int]]:
    async def ask(shard: Shard) -> Covered | int:
        try:
            async with asyncio.timeout(timeout_s):
                return await asked(shard)
        except (TenfoldError, TimeoutError):
            return shard.index

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(shard)) for shard in shards]
    results = [task.result() for task in tasks]
    covered = [result for result in results if isinstance(result, Covered)]
    return covered, [result for result in results if isinstance(result, int)]


def _covers_once(answers: Sequence[Covered], *, is_partial: bool) -> bool:
    seen: set[int] = set()
    for answer in answers:
        if not seen.isdisjoint(answer.epochs):
            return False
        seen.update(answer.epochs)
    return is_partial or len(seen) == BUCKET_COUNT
