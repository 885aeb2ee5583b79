"""The command that adds a shard, and the one that levels the load, killed after their steps."""

import tempfile
from pathlib import Path

from shared.db.move.failpoints import ADDING_FAILPOINTS
from tests.growing import KILLED, shards
from tests.mesh import Mesh, running_mesh

SERVICE = "notification"
# Of a move: before its copy is whole, under the fence, after the decision, and in between shards.
MOVE_STEPS = ("prepare", "copied", "fence", "commit", "src_moved")


def run() -> dict[str, object]:
    """Kill each command after each of its steps, repeat it, and see that all is as it must be."""
    wrong: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_mesh(Path(folder) / "data") as mesh,
    ):
        for step in ADDING_FAILPOINTS:
            wrong += _repeated(mesh, step, "add", SERVICE)
        for step in MOVE_STEPS:
            wrong += _repeated(mesh, step, "rebalance", SERVICE, "--max-moves", "2")
    faults = len(ADDING_FAILPOINTS) + len(MOVE_STEPS)
    return {
        "what": "the commands that add a shard and rebalance, killed on the way and repeated",
        "faults": faults,
        "operations": 2 * faults,
        "violations": len(wrong),
    }


def _repeated(mesh: Mesh, step: str, *command: str) -> list[str]:
    wrong = []
    killed = shards(mesh, *command, killed_after=step)
    if killed.returncode != KILLED:
        wrong.append(f"not killed: {killed.stderr}")
    for checked in (command, ("verify", SERVICE)):
        run = shards(mesh, *checked)
        if run.returncode:
            wrong.append(f"{checked[0]}: {run.stdout}{run.stderr}")
    print(f"{command[0]} killed after {step}: {wrong or 'nothing wrong'}")
    return wrong
