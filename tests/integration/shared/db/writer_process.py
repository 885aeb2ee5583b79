"""A process that writes under one request id and dies where TENFOLD_CRASH_POINT says.

Arguments: the data folder or the databases, the user's id, the effect's bucket. Prints the
answer that it gives.
"""

import asyncio
import sys
from pathlib import Path

from shared.db.port import OutboxRow
from shared.identity import Principal, PrincipalKind
from tests.integration.shared.db.conftest import PostgresEngine, SqliteEngine, add_thing, once


def engine_of(place: str) -> SqliteEngine | PostgresEngine:
    return PostgresEngine(place) if "://" in place else SqliteEngine(Path(place))


async def main(place: str, subject: str, bucket: int) -> None:
    asked = once(Principal(PrincipalKind.USER, subject))
    async with engine_of(place).open() as shards:
        async with shards.bucket(bucket).transaction(asked) as tx:
            if tx.answered:
                answer = tx.answer.decode()
            else:
                await add_thing(tx, "a")
                await tx.append_outbox(OutboxRow("t.Made", "things/1", b"", "default"))
                await tx.answer_with(b"repeated")
                answer = "first"
        print(answer, flush=True)


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
