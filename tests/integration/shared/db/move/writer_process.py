"""A process that counts up and writes down what it was told, until its standard input ends.

Arguments: the ground, the journal, counter ids. Each write adds one to a counter, and a note with
the write's id. Every other write has a request id: it is repeated until it is done. Now and then
the process's map is made to say that the bucket is where it is not, or what it said at first.
"""

import asyncio
import os
import random
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from shared.db.ids import bucket_of, new_id
from shared.db.port import Once
from shared.db.shards import BucketMap
from shared.errors import TenfoldError
from shared.identity import Principal, PrincipalKind
from tests.integration.shared.db.move.grounds import ADD_ONE, add_note, ground_of
from tests.integration.shared.db.move.journal import Journal, Told

PAUSE_S = 0.03
MISLED_SHARE = 0.25
TRIES_MAX = 100
REPEAT_PAUSE_S = 0.1
# Of a write that was tried twice, what is known is the later of the two.
BY_KNOWLEDGE = [Told.REFUSED, Told.UNKNOWN, Told.DONE]


async def main(ground: str, journal: str, *ids: str) -> None:
    """Write on the ground until told to end."""
    counters = [UUID(text) for text in ids]
    stopped = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    with Journal(Path(journal)) as opened:
        async with ground_of(ground).open() as shards:
            print("ready", flush=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads what is logged from now on
            number, first_map = 0, shards.bucket_map
            while not stopped.done():
                number += 1
                writer = Writer(shards, opened, counters[number % len(counters)], first_map)
                await writer.write(has_key=number % 2 == 0)
                await asyncio.sleep(PAUSE_S)


class Writer:
    """One write to one counter."""

    def __init__(
        self, shards: Any, journal: Journal, counter_id: UUID, first_map: BucketMap
    ) -> None:
        self._shards = shards
        self._first_map = first_map
        self._journal = journal
        self._counter_id = counter_id
        self._bucket = bucket_of(counter_id)
        self._id = new_id(self._bucket)

    async def write(self, *, has_key: bool) -> None:
        """Write, and note what became of it."""
        begun_s, once = time.monotonic(), self._key() if has_key else None
        self._journal.note(Told.SENT, self._id)
        told = await self._try(once)
        for _ in range(TRIES_MAX if has_key else 0):
            if told is Told.DONE:
                break
            await asyncio.sleep(REPEAT_PAUSE_S)
            told = max(told, await self._try(once), key=BY_KNOWLEDGE.index)
        self._journal.note(told, self._id, f"{(time.monotonic() - begun_s) * 1000:.1f}")

    def _key(self) -> Once:
        principal = Principal(PrincipalKind.USER, str(self._counter_id), "default")
        return Once(principal, "/count", str(self._id), self._id.bytes * 2)

    async def _try(self, once: Once | None) -> Told:
        self._mislead()
        told = Told.REFUSED
        try:
            async with self._shards.bucket(self._bucket).transaction(once) as tx:
                if not tx.answered:
                    await self._add_one(tx)
                # From here on a failure may be one of a commit.
                told = Told.UNKNOWN
        except TenfoldError:
            return told
        except Exception as error:
            self._journal.note(Told.WRONG, self._id, repr(error))
            return told
        return Told.DONE

    async def _add_one(self, tx: Any) -> None:
        changed = await tx.execute(ADD_ONE, self._bucket, self._counter_id)
        if changed != 1:
            self._journal.note(Told.WRONG, self._id, f"counter {self._counter_id} is not there")
        await add_note(tx, self._counter_id, note_id=self._id)

    def _mislead(self) -> None:
        if random.random() < MISLED_SHARE:
            elsewhere = random.randrange(len(self._shards.all()))
            shuffled = self._shards.bucket_map.moved(self._bucket, elsewhere)
            self._shards.bucket_map = random.choice([shuffled, self._first_map])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
