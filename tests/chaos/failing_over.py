"""Primaries of a cluster on this machine are killed, or frozen, while money moves; also everything.

The writers are processes of their own, each with two people of its own. Most faults wait until
every shard has a standby that may be promoted; some do not, and hit a primary that has none.
"""

import multiprocessing
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deploy.local.address import free_addresses
from deploy.local.processes import processes_in
from tests.backups import begin_story, flowing
from tests.failover import hit, nodes, primaries, until_redundant, wrongs
from tests.kills import SETTLE_S
from tests.mesh import Mesh, poll_until, running_mesh

SHARDS = 2
WRITERS = 4
# A person has money for ten thousand transfers.
FAULTS_PER_ROUND = 10
BETWEEN_S = (0.5, 2.0)
WRITER_PAUSE_S = 0.02
SHARE_UNPREPARED = 0.25


@dataclass(frozen=True)
class Written:
    """What one writer tells.

    Attributes:
        calls: when each acknowledged one began and was answered, monotonic.
        wrongs: what was lost, doubled or out of balance.
    """

    calls: Sequence[tuple[float, float]]
    wrongs: Sequence[str]


def run(*, faults: int, seed: int) -> dict[str, object]:
    """Make so many faults; what the last line says of them."""
    chance, operations, found, pauses_s = random.Random(seed), 0, [], []
    places: list[str] = []
    edge = str(free_addresses(1)[0])
    size = ["--profile", "cluster", "--shards", str(SHARDS), "--replicas", "1"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            with running_mesh(Path(folder) / "data", edge=edge, options=size) as mesh:
                places += mesh.state["databases"]
                for first in range(0, faults, FAULTS_PER_ROUND):
                    count = min(FAULTS_PER_ROUND, faults - first)
                    made, written = _round(mesh, chance, count)
                    operations += sum(len(one.calls) for one in written)
                    found += [wrong for one in written for wrong in one.wrongs]
                    pauses_s += _pauses_s(made, written)
                    print(f"{first + count} faults: {found or 'nothing wrong'}", flush=True)
        finally:
            for place in places:
                shutil.rmtree(place, ignore_errors=True)
    what = (
        "primaries killed or frozen, or everything killed, under writes that were acknowledged; "
        f"they go on after {statistics.median(pauses_s):.1f} s (p50), {max(pauses_s):.1f} s (max)"
    )
    return {"what": what, "faults": faults, "operations": operations, "violations": len(found)}


def _round(
    mesh: Mesh, chance: random.Random, faults: int
) -> tuple[list[tuple[str, float]], list[Written]]:
    """The faults, each with its moment, and what the writers tell."""
    made: list[tuple[str, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(WRITERS, multiprocessing.get_context("spawn")) as writers,
    ):
        end = Path(folder) / "end"
        begun = [Path(folder) / str(number) for number in range(WRITERS)]
        writing = [writers.submit(write, mesh.data, one, end) for one in begun]
        try:
            poll_until(lambda: _have_begun(begun, writing), timeout_s=SETTLE_S, what="writers")
            for _ in range(faults):
                if chance.random() > SHARE_UNPREPARED:
                    until_redundant(mesh)
                time.sleep(chance.uniform(*BETWEEN_S))
                kind = chance.choice(list(FAULTS))
                made.append((kind, time.monotonic()))
                FAULTS[kind](mesh, chance)
                print(f"  {kind}", flush=True)
            until_redundant(mesh)
        finally:
            end.touch()
        return made, [one.result() for one in writing]


def _have_begun(begun: Sequence[Path], writing: Sequence["Future[Written]"]) -> bool:
    for one in writing:
        if one.done():
            one.result()
    return all(path.exists() for path in begun)


def write(data: Path, begun: Path, end: Path) -> Written:
    """Move money until told to end, in a process of its own."""
    calls: list[tuple[float, float]] = []
    with flowing(begin_story(Mesh(data)), pause_s=WRITER_PAUSE_S) as traffic:
        traffic.wait_for(1)
        begun.touch()
        while not end.exists():
            assert not traffic.failures, traffic.failures
            time.sleep(0.1)
    calls += zip(traffic.began_s, traffic.answered_s, strict=True)
    return Written(calls, wrongs(traffic) + [repr(one) for one in traffic.failures])


def _pauses_s(made: Sequence[tuple[str, float]], written: Sequence[Written]) -> list[float]:
    """For each fault, how long the slowest of all calls took that it may have hit."""
    ends = [at_s for _, at_s in made[1:]] + [float("inf")]
    calls = [call for one in written for call in one.calls]
    found = []
    for (kind, at_s), end_s in zip(made, ends, strict=True):
        hit_s = [answered - began for began, answered in calls if at_s < answered and began < end_s]
        found.append(max(hit_s, default=0.0))
        print(f"  {kind}: {found[-1]:.1f} s")
    return found


def _victim(mesh: Mesh, chance: random.Random) -> str:
    return chance.choice(primaries(mesh))


def _kill(mesh: Mesh, chance: random.Random) -> None:
    hit(mesh, _victim(mesh, chance), signal.SIGKILL)


def _kill_all_primaries(mesh: Mesh, chance: random.Random) -> None:
    for name in primaries(mesh):
        hit(mesh, name, signal.SIGKILL)


def _kill_a_whole_shard(mesh: Mesh, chance: random.Random) -> None:
    shard = chance.randrange(SHARDS)
    for node in nodes(mesh):
        if node.shard == shard:
            hit(mesh, node.name, signal.SIGKILL)


def _freeze(mesh: Mesh, chance: random.Random) -> None:
    """It takes no connections any more; those that are open go on."""
    _until_killed(mesh, _victim(mesh, chance), whole=False)


def _freeze_all_of_it(mesh: Mesh, chance: random.Random) -> None:
    _until_killed(mesh, _victim(mesh, chance), whole=True)


def _until_killed(mesh: Mesh, name: str, *, whole: bool) -> None:
    frozen = hit(mesh, name, signal.SIGSTOP)
    _, shard, node = name.split("-")
    if whole:
        for process in processes_in(Path(mesh.state["databases"][int(shard)]) / node):
            os.kill(process.pid, signal.SIGSTOP)
    poll_until(lambda: not frozen.is_alive, timeout_s=SETTLE_S, what=f"the end of {name}")


def _kill_everything(mesh: Mesh, chance: random.Random) -> None:
    mesh.kill_all()
    mesh.start()


FAULTS: dict[str, Callable[[Mesh, random.Random], None]] = {
    "a primary is killed": _kill,
    "all primaries are killed": _kill_all_primaries,
    "a primary and its standby are killed": _kill_a_whole_shard,
    "a primary takes no connections": _freeze,
    "a primary is frozen": _freeze_all_of_it,
    "the launcher is killed, and everything with it": _kill_everything,
}
