"""Clients that write and then read again and again what they wrote, from whatever host answers."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from shared import causal
from shared.causal import Seen
from shared.db.ids import new_id
from shared.db.port import Bucket, Shards

INSERT = "INSERT INTO thing (bucket, id, tenant, owner, label) VALUES ($1, $2, 't', $2, $3)"
UPDATE = "UPDATE thing SET label = $3 WHERE bucket = $1 AND id = $2 AND tenant = 't'"
SELECT = "SELECT version FROM thing WHERE bucket = $1 AND id = $2 AND tenant = 't'"


@dataclass
class Told:
    """What clients were told.

    Attributes:
        reads: answers.
        stale: answers with less than the client had written itself.
        writes: commits.
    """

    reads: int = 0
    stale: int = 0
    writes: int = 0


async def tell(
    shards: Shards,
    *,
    reads: int,
    clients: int,
    reads_per_write: Sequence[int],
    with_tokens: bool = True,
) -> Told:
    """Let clients read, each in calls of its own as a service would make them.

    Args:
        shards: any.
        reads: of all clients together.
        clients: at once; each has a bucket and a row of its own.
        reads_per_write: after how many reads a client writes again; clients take turns with these.
        with_tokens: whether clients send along what they have seen.
    """
    told = Told()

    async def client(number: int) -> None:
        bucket = shards.bucket(number * 61 % 4096)
        row = new_id(bucket.number)
        version, token = 0, ""
        while told.reads < reads:
            version, token = version + 1, await _write(bucket, row, version, token)
            told.writes += 1
            for _ in range(reads_per_write[number % len(reads_per_write)]):
                causal.begin(Seen.of_token(token if with_tokens else "", may_lag=True))
                found = await bucket.causal.fetch_one(SELECT, bucket.number, row)
                told.reads += 1
                told.stale += found is None or found["version"] < version

    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(client(number))
    return told


async def _write(bucket: Bucket, row: object, version: int, token: str) -> str:
    seen = Seen.of_token(token)
    causal.begin(seen)
    async with bucket.transaction() as tx:
        await tx.execute(UPDATE if version else INSERT, tx.bucket, row, f"{row} {version}")
    return seen.token()
