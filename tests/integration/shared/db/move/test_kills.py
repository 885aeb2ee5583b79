"""Movers that are killed, or sleep until they were replaced, after every step; writers go on.

All of it happens to one bucket, in one folder, in a row: what one case leaves is what the next
finds. The writers' journals tell at the end whether anything was lost or doubled.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from shared.db.move.failpoints import FAILPOINTS
from shared.db.move.mover import Tools
from shared.db.move.place import settle_move
from shared.db.move.port import MoveRefused
from tests.integration.shared.db.move.conftest import BUCKET, Place, add_counters
from tests.integration.shared.db.move.mover_host import PACE

ROOT = Path(__file__).parents[5]
PACKAGE = "tests.integration.shared.db.move"
WRITER_COUNT, COUNTER_COUNT = 2, 8
ABORTING = ("abort", "abort.dst", "abort.src", "aborted")
SETTLED_S_MAX = 30.0


@contextmanager
def process(module: str, *arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", f"{PACKAGE}.{module}", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
            running.stdin.close()
            assert running.wait(30) == 0
        finally:
            running.kill()


class Arena:
    """A folder, its writers, and a host of movers."""

    def __init__(self, folder: Path, host: subprocess.Popen) -> None:
        self.place = Place(folder / "data")
        self.folder = folder
        self._host = host

    def ask(self, **command: object) -> dict:
        self._host.stdin.write(json.dumps(command) + "\n")
        self._host.stdin.flush()
        return json.loads(self._host.stdout.readline())

    def mover(self, how: str, failpoint: str) -> dict:
        dst = 1 - self.place.states().index("ACTIVE") if how != "settle" else 0
        path = str(self.place.path)
        return self.ask(path=path, bucket=BUCKET, dst=dst, how=how, failpoint=failpoint)

    async def settle(self, preference: str) -> None:
        """What whoever comes next does: wait for the lease, take over, end it."""
        deadline_s = time.monotonic() + SETTLED_S_MAX
        control = self.place.folder.control
        while moves := await control.list_moves(is_open=True):
            assert time.monotonic() < deadline_s, moves
            try:
                await settle_move(
                    self.place.folder, moves[0], Tools(pace=PACE), preference=preference
                )
            except MoveRefused:
                await asyncio.sleep(0.05)

    def acknowledged(self) -> list[UUID]:
        lines = [
            line
            for journal in self.folder.glob("journal-*")
            for line in journal.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        assert not [line for line in lines if line.startswith("!")]
        return [UUID(line.strip()) for line in lines]

    def check(self) -> None:
        """One owner, and every acknowledged write is with it."""
        acknowledged = self.acknowledged()
        states = self.place.states()
        assert states.count("ACTIVE") == 1, states
        assert set(states) <= {"ACTIVE", "ABSENT", "MOVED", "ABORTED"}
        owner = states.index("ACTIVE")
        notes = self.place.rows(owner, "SELECT id FROM note WHERE bucket = ?", BUCKET)
        assert {id_.bytes for id_ in acknowledged} <= {note for (note,) in notes}
        sums = "SELECT sum(value), (SELECT count(*) FROM note WHERE bucket = ?1) FROM counter"
        [(value, count)] = self.place.rows(owner, f"{sums} WHERE bucket = ?1", BUCKET)
        assert value == count


@pytest.fixture(scope="module")
def arena(tmp_path_factory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("arena")
    with ExitStack() as stack:
        arena = Arena(folder, stack.enter_context(process("mover_host")))

        async def prepare() -> list[UUID]:
            async with arena.place.open() as shards:
                return await add_counters(shards, COUNTER_COUNT)

        ids = [str(id_) for id_ in asyncio.run(prepare())]
        writers = [
            stack.enter_context(
                process("writer_process", str(arena.place.path), f"{folder}/journal-{number}", *ids)
            )
            for number in range(WRITER_COUNT)
        ]
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        yield arena
    # The writers have ended: what they were told is exactly what is there.
    acknowledged = arena.acknowledged()
    owner = arena.place.states().index("ACTIVE")
    notes = arena.place.rows(owner, "SELECT id FROM note WHERE bucket = ?", BUCKET)
    assert sorted(id_.bytes for id_ in acknowledged) == sorted(note for (note,) in notes)
    arena.check()


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("failpoint", FAILPOINTS)
async def test_a_mover_that_ends_or_sleeps_after_any_step_leaves_nothing_that_stays(
    arena, failpoint, how
):
    task = "fail" if failpoint in ABORTING else "move"
    if failpoint == "takeover":
        assert arena.mover("move", "copied:kill")["end"] == "killed"
        task = "settle"
    mover = arena.mover(task, f"{failpoint}:{how}")
    assert mover["end"] == {"kill": "killed", "stop": "stopped"}[how]
    await arena.settle("go on" if FAILPOINTS.index(failpoint) % 2 else "abort")
    arena.check()
    if how == "stop":
        # It wakes up, finds itself replaced, and changes nothing: or it had ended before.
        ended = {"done": "DONE", "gc": "DONE", "aborted": "MoveFailed"}
        assert arena.ask(**{"continue": mover["pid"]})["end"] == ended.get(failpoint, "MoveLost")
        arena.check()
