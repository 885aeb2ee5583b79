"""Claims unique values, and dies at each commit on the way: a process for each death.

Argument: the data folder or the databases. Prints one JSON object for each death: the value, who
claimed it, who had claimed it before, and the signal that ended the claimant.
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from uuid import UUID

from shared.crashpoints import CrashPoint
from shared.db import uniq
from shared.db.crash_points import AFTER_COMMIT, BEFORE_COMMIT
from shared.db.ids import new_id
from shared.db.port import Shards
from tests.integration.shared.db.conftest import FAR, NEAR
from tests.integration.shared.db.writer_process import place_of

NOW = 1_700_000_000_000_000
EXPIRED = NOW + uniq.RESERVED_US
# How many commits each takes: claim, create, confirm; a thief first finds the claim expired, and
# says in its id's slot that it will never exist; or finds that it does, and confirms it.
COMMITS = {"creator": 3, "thief": 5, "thief of one who was created": 3}


@dataclass(frozen=True)
class Death:
    """One claimant, and at which of its commits it dies."""

    kind: str
    point: CrashPoint
    visit: int
    claimant: UUID
    before: UUID

    @property
    def value(self) -> uniq.UniqueValue:
        """Its own."""
        text = f"{self.kind}-{self.point.name}-{self.visit}@example.org"
        return uniq.UniqueValue("default", "email", text.replace(" ", "-"))


def deaths() -> Iterator[Death]:
    for kind, commits in COMMITS.items():
        for point in (BEFORE_COMMIT, AFTER_COMMIT):
            for visit in range(1, commits + 1):
                yield Death(kind, point, visit, new_id(FAR), new_id(NEAR))


async def prepare(shards: Shards, death: Death) -> None:
    """What another left behind."""
    if death.kind == "creator":
        return
    await uniq.reserve_unique(shards, death.value, death.before, now_us=NOW)
    if death.kind != "thief":
        await create(shards, death.before)


async def create(shards: Shards, user_id: UUID) -> None:
    async with shards.holding(user_id).transaction() as tx:
        await uniq.fill_id_slot(tx, user_id)


async def claim(shards: Shards, death: Death) -> None:
    now_us = NOW if death.kind == "creator" else EXPIRED
    CrashPoint.armed[death.point.name] = death.visit
    await uniq.reserve_unique(shards, death.value, death.claimant, now_us=now_us)
    await create(shards, death.claimant)
    async with shards.bucket(death.value.bucket).transaction() as tx:
        await uniq.confirm_unique(tx, death.value, death.claimant)


async def die(name: str, death: Death) -> None:
    async with place_of(name).open() as shards:
        await prepare(shards, death)
        await claim(shards, death)


def in_a_process(work: Awaitable[None]) -> int:
    """The signal that ended it; 0 if it lived on."""
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(work)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1] & 0x7F


def main(name: str) -> None:
    for death in deaths():
        ended_by = in_a_process(die(name, death))
        told = [death.value.value, str(death.claimant), str(death.before), ended_by]
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
