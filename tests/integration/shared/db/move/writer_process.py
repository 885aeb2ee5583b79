"""A process that counts up and writes down what was acknowledged, until its standard input ends.

Arguments: the data folder, the journal, counter ids. Each write adds one to a counter and a note
whose id goes into the journal once the commit has been answered. A line that begins with "!" is
what must not happen.
"""

import asyncio
import sys
from pathlib import Path
from uuid import UUID

from shared.db.port import Shards
from shared.errors import TenfoldError
from tests.integration.shared.db.move.conftest import ADD_ONE, BUCKET, Place, add_note

PAUSE_S = 0.03


async def main(path: str, journal: str, *ids: str) -> None:
    counters = [UUID(text) for text in ids]
    stopped = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    with Path(journal).open("a", buffering=1) as file:  # noqa: ASYNC230 - a line, a write
        async with Place(Path(path)).open() as shards:
            print("ready", flush=True)
            number = 0
            while not stopped.done():
                number += 1
                file.write(await write(shards, counters[number % len(counters)]))
                await asyncio.sleep(PAUSE_S)


async def write(shards: Shards, counter_id: UUID) -> str:
    try:
        async with shards.bucket(BUCKET).transaction() as tx:
            changed = await tx.execute(ADD_ONE, BUCKET, counter_id)
            note_id = await add_note(tx, counter_id)
    except TenfoldError:
        return ""  # refused: it has not happened, and the next one may pass
    except Exception as error:
        return f"! {error!r}\n"
    return f"{note_id}\n" if changed == 1 else f"! counter {counter_id} is not there\n"


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
