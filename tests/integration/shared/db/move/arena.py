"""Movers that are killed, or sleep until they were replaced, while other processes write.

One story, told on either engine's ground. All of it happens in a row: what one step leaves is what
the next finds. The writers' journals tell whether anything was lost, doubled or made up.
"""

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from shared.db.errors import DatabaseRefused
from shared.db.ids import bucket_of
from shared.db.move.failpoints import FAILPOINTS
from shared.db.move.mover import Tools
from shared.db.move.place import settle_move
from shared.db.move.port import Move, MoveFailed, MoveLost, MoveRefused
from shared.db.move.protocol import Preference
from tests.databases import PostgresServer
from tests.integration.shared.db.move.grounds import (
    BUCKET,
    MIGRATIONS,
    SERVICE,
    Databases,
    Ground,
    add_counters,
    ids_of,
    meanwhile,
    states_of,
)
from tests.integration.shared.db.move.journal import Books, read_books
from tests.integration.shared.db.move.mover_host import PACE

ROOT = Path(__file__).parents[5]
# A step takes longer there: a lease that ran out is one that writers do not wait for.
ON_POSTGRES = {"lease_s": 0.5}
PACKAGE = "tests.integration.shared.db.move"
COUNTER_COUNT = 8
ABORTING = ("abort", "abort.dst", "abort.src", "aborted")
# What a mover that slept ends with; all others find themselves replaced.
WOKEN = {"done": "DONE", "gc": "DONE", "aborted": "MoveFailed"}
TRIES_MAX, TRY_PAUSE_S = 20, 0.1
SETTLED_S_MAX, BY_OTHERS_S_MAX = 60.0, 10.0
SETTLE_PAUSE_S = 0.05
AT_REST = {"ACTIVE", "ABSENT", "MOVED", "ABORTED"}
NOTES = "SELECT id FROM note WHERE bucket = {}"
# In one statement, for writers go on.
MISCOUNTED = """
SELECT id FROM counter AS one WHERE bucket = {0} AND value <> (
    SELECT count(*) FROM note WHERE note.bucket = {0} AND note.counter_id = one.id)
"""


@contextmanager
def process(module: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """One of this folder's programs; it ends by itself once its input has."""
    command = [sys.executable, "-m", f"{PACKAGE}.{module}", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
            assert running.stdin
            running.stdin.close()
            assert running.wait(SETTLED_S_MAX) == 0
        finally:
            running.kill()


@dataclass
class Arena:
    """A ground, its writers, and a host of movers.

    Attributes:
        ground: where buckets move.
        folder: of the journals.
        buckets: that are written.
        pace: what movers do otherwise than PACE says.
        left: what is wrong once the writers have ended.
    """

    ground: Ground
    folder: Path
    host: "subprocess.Popen[str]"
    buckets: Sequence[int] = (BUCKET,)
    pace: dict[str, float] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def tell(self, failpoint: str, how: str) -> list[str]:
        """A mover ends, or sleeps, after this step; another settles its move; what is wrong then.

        Args:
            failpoint: the step.
            how: "kill"; "stop", and it wakes up once it was replaced; or "sleep", and it wakes up
                in the midst of the bucket's next move.
        """
        mover = self.end_at(failpoint, how)
        self.settle("go on" if FAILPOINTS.index(failpoint) % 2 else "abort")
        if how == "kill":
            return self.violations()
        if how == "sleep":
            # Nothing is compared any more after this step: what is written now would stay.
            self.end_at("verify2", "kill")
        woken, expected = self.wake(mover), WOKEN.get(failpoint, "MoveLost")
        self.settle("go on")
        wrong = self.violations()
        return wrong if woken == expected else [*wrong, f"after {failpoint}: {woken}"]

    def end_at(self, failpoint: str, how: str) -> int:
        """Have a mover end right after a step; its pid.

        A writer that waits for longer than the lease is faster now and then, and another bucket may
        be on its way from the same shard: then once more.
        """
        signal = "kill" if how == "kill" else "stop"
        wanted, ends = {"kill": "killed", "stop": "stopped"}[signal], []
        for _ in range(TRIES_MAX):
            pid, end = self.move_until(failpoint, signal)
            if end == wanted:
                return pid
            ends.append(end)
            self.settle("abort", bucket=BUCKET)
            time.sleep(TRY_PAUSE_S)
        raise AssertionError(f"no mover ended after {failpoint}: {ends}")

    def move_until(self, failpoint: str, how: str, bucket: int = BUCKET) -> tuple[int, str]:
        """A mover that should end right after a step; its pid, and its end."""
        task = "fail" if failpoint in ABORTING else "move"
        if failpoint == "takeover":
            self._mover("move", "copied:kill", bucket)
            task = "settle"
        return self._mover(task, f"{failpoint}:{how}", bucket)

    def wake(self, pid: int) -> str:
        """Let a mover that sleeps go on; its end."""
        return self._ask({"continue": pid})[1]

    def settle(self, preference: Preference, *, bucket: int | None = None) -> None:
        """What whoever comes next does: wait for the lease, take over, end it.

        Args:
            preference: where the move may be aborted or go on.
            bucket: settle its move alone; every bucket's by default.
        """
        deadline_s = time.monotonic() + SETTLED_S_MAX
        while not meanwhile(self._is_settled, preference, bucket):
            assert time.monotonic() < deadline_s, "an unfinished move cannot be settled"
            time.sleep(SETTLE_PAUSE_S)

    async def _is_settled(self, preference: Preference, bucket: int | None) -> bool:
        tools, place = Tools(pace=replace(PACE, **self.pace)), self.ground.moves
        try:
            for move in await self._open_moves(bucket):
                await settle_move(place, move, tools, preference=preference)
            return not await self._open_moves(bucket)
        except (MoveRefused, MoveLost, MoveFailed, DatabaseRefused):
            return False  # too early, a writer was faster, or a shard is away

    def is_settled_by_others(self) -> bool:
        """Whether somebody else ends the bucket's move within a while: a writer, or a gate."""
        deadline_s = time.monotonic() + BY_OTHERS_S_MAX
        while time.monotonic() < deadline_s:
            with suppress(MoveFailed, DatabaseRefused):  # Control is away
                if not meanwhile(self._open_moves, BUCKET):
                    return True
            time.sleep(SETTLE_PAUSE_S)
        return False

    async def _open_moves(self, bucket: int | None) -> list[Move]:
        moves = await self.ground.moves.control.list_moves(is_open=True)
        return [move for move in moves if bucket in {None, move.bucket}]

    def violations(self, *, is_over: bool = False) -> list[str]:
        """What is not as it must be while no move is under way; [] when all is well.

        Args:
            is_over: the writers have ended: what is there was told, or its outcome is unknown.
        """
        before = read_books(self.folder)
        held = {bucket: self._held(bucket) for bucket in self.buckets}
        after = read_books(self.folder)
        wrong = [f"a writer met {line}" for line in after.wrong]
        for bucket, found in held.items():
            wrong += found.wrong
            wrong += _differences(bucket, found.notes, before, after, is_over=is_over)
        return wrong

    def _held(self, bucket: int) -> "Held":
        states = states_of(self.ground, bucket)
        if states.count("ACTIVE") != 1 or not set(states) <= AT_REST:
            return Held([f"bucket {bucket} is {states}"])
        owner = states.index("ACTIVE")
        others = set()
        for index in range(self.ground.shard_count):
            if index != owner:
                others |= ids_of(self.ground, index, NOTES.format(bucket))
        miscounted = self.ground.read(owner, MISCOUNTED.format(bucket))
        held = Held([], ids_of(self.ground, owner, NOTES.format(bucket)))
        if miscounted:
            held.wrong.append(f"bucket {bucket}: {len(miscounted)} counters are not their notes")
        if strays := others - held.notes:
            held.wrong.append(f"{len(strays)} writes went to where bucket {bucket} is not")
        return held

    def _mover(self, how: str, failpoint: str, bucket: int) -> tuple[int, str]:
        states = states_of(self.ground, bucket)
        owner = states.index("ACTIVE") if "ACTIVE" in states else 0
        dst = (owner + 1) % self.ground.shard_count
        asked = {"ground": self.ground.name, "bucket": bucket, "dst": dst, "pace": self.pace}
        return self._ask({**asked, "how": how, "failpoint": failpoint})

    def _ask(self, command: dict[str, Any]) -> tuple[int, str]:
        assert self.host.stdin
        assert self.host.stdout
        self.host.stdin.write(json.dumps(command) + "\n")
        self.host.stdin.flush()
        answer = json.loads(self.host.stdout.readline())
        return answer["pid"], answer["end"]


@dataclass
class Held:
    """What the shards hold of a bucket: what is wrong there, and its owner's notes."""

    wrong: list[str]
    notes: set[UUID] = field(default_factory=set)


def _differences(
    bucket: int, notes: set[UUID], before: Books, after: Books, *, is_over: bool
) -> Iterator[str]:
    """What the books of before and after a look say against it."""

    def of_bucket(ids: set[UUID]) -> set[UUID]:
        return {write_id for write_id in ids if bucket_of(write_id) == bucket}

    if lost := of_bucket(before.done) - notes:
        yield f"bucket {bucket} has lost {len(lost)} acknowledged writes"
    if undead := notes & after.refused:
        yield f"bucket {bucket} has {len(undead)} writes that were refused"
    known = after.done | after.unknown if is_over else after.sent
    if made_up := notes - known:
        yield f"bucket {bucket} has {len(made_up)} writes that nobody sent"


@contextmanager
def fought_over(
    ground: Ground,
    folder: Path,
    *,
    writer_count: int = 2,
    buckets: Sequence[int] = (BUCKET,),
    pace: dict[str, float] | None = None,
) -> Iterator[Arena]:
    """Writers at work on these buckets until the end of the block; then see Arena.left."""
    with ExitStack() as stack:
        host = stack.enter_context(process("mover_host"))
        arena = Arena(ground, folder, host, buckets, pace or {})
        ids = [str(id_) for id_ in meanwhile(_prepare, ground, buckets)]
        writers = [
            stack.enter_context(
                process("writer_process", ground.name, f"{folder}/journal-{number}", *ids)
            )
            for number in range(writer_count)
        ]
        for writer in writers:
            assert writer.stdout
            assert writer.stdout.readline() == "ready\n"
        yield arena
    arena.left = arena.violations(is_over=True)


async def _prepare(ground: Ground, buckets: Sequence[int]) -> list[UUID]:
    """Counters of every bucket; neighbours in the list are of different buckets."""
    async with ground.open() as shards:
        made = [await add_counters(shards, COUNTER_COUNT, bucket=bucket) for bucket in buckets]
    return [counter_id for counters in zip(*made, strict=True) for counter_id in counters]


@asynccontextmanager
async def made_databases(server: PostgresServer) -> AsyncIterator[Databases]:
    """Two shards on a running server."""
    async with server.shards(2, migrations=MIGRATIONS, service=SERVICE) as service:
        names = [dsn.rpartition("/")[2] for dsn in service.split(",")]
        operator = [server.site.admin_dsn(server.address, name) for name in names]
        yield Databases(service, operator)
