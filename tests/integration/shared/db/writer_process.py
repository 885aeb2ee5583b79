"""A process that writes under one request id and dies where TENFOLD_CRASH_POINT says.

Arguments: the data folder or the databases, the user's id, the effect's bucket. Prints the
answer that it gives.
"""

import asyncio
import sys
from pathlib import Path

from shared.db.port import OutboxRow
from shared.identity import Principal, PrincipalKind
from tests.databases import Contents, Place, PostgresPlace, SqlitePlace
from tests.integration.shared.db.conftest import MIGRATIONS, add_thing, once


def place_of(name: str) -> Place:
    contents = Contents(MIGRATIONS, "things")
    if "://" in name:
        return PostgresPlace(name, contents)
    return SqlitePlace(Path(name), contents)


async def main(name: str, subject: str, bucket: int) -> None:
    asked = once(Principal(PrincipalKind.USER, subject))
    async with place_of(name).open() as shards:
        async with shards.bucket(bucket).transaction(asked) as tx:
            if tx.answered:
                answer = tx.answer.decode()
            else:
                await add_thing(tx, "a")
                await tx.append_outbox(OutboxRow("t.Made", "things/1", b"", "default"))
                await tx.answer_with(b"repeated")
                answer = "first"
        print(answer, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
