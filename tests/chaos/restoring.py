"""Backups of a mesh that is used and whose processes are killed meanwhile; each is restored.

The mesh of a round is the one that was restored from the backup of the round before, so what one
restore spoils is in all that follow.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deploy.local.address import free_addresses
from tests.backups import Backup, back_up_in_use, begin_story, same_story, tenfold, violations
from tests.kills import Told
from tests.mesh import ROOT, Mesh, running_mesh

VICTIMS = ("services", "nats", "edge", "mail")
TRANSFERS = 50
TRIES_MAX = 10


def run(*, rounds: int, seed: int) -> dict[str, object]:
    """So many backups, each with a kill during it and a kill of everything after it."""
    chance = random.Random(seed)
    faults, operations, found, longest_s = 0, 0, [], 0.0
    before: tuple[Told, Backup] | None = None
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for number in range(rounds):
            edge = str(free_addresses(1)[0])
            with running_mesh(folder / f"data-{number}", edge=edge) as mesh:
                if before:
                    found += violations(same_story(before[0], mesh), before[1])
                killing = _Killing(mesh, chance)
                told = begin_story(mesh)
                to = folder / f"backup-{number}"
                backup = back_up_in_use(told, to, transfers=TRANSFERS, by=killing.back_up)
                mesh.kill_all()
            tenfold("restore", str(to), "--data", str(folder / f"data-{number + 1}"))
            before = told, backup
            faults += killing.faults + 1
            operations += backup.begun_after
            longest_s = max(longest_s, backup.printed["writers_waited_ms"] / 1000)
            print(f"backup {number + 1}, {killing.faults} kills: {found or 'nothing wrong'}")
        with running_mesh(folder / f"data-{rounds}") as mesh:
            if before:
                found += violations(same_story(before[0], mesh), before[1])
    what = (
        f"restores of backups taken in use, under kills; writers waited {longest_s:.3f} s at most"
    )
    return {"what": what, "faults": faults, "operations": operations, "violations": len(found)}


class _Killing:
    def __init__(self, mesh: Mesh, chance: random.Random) -> None:
        self._mesh = mesh
        self._chance = chance
        self.faults = 0

    def back_up(self, data: Path, to: Path) -> dict[str, Any]:
        """Until one succeeds though a process was killed while it was made."""
        for _ in range(TRIES_MAX):
            command = [sys.executable, "-P", "-m", "deploy.cli", "backup"]
            command += ["--data", str(data), "--to", str(to), "--json"]
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = subprocess.Popen(command, cwd=ROOT, **pipes)
            time.sleep(self._chance.uniform(0.3, 1.5))
            self._mesh.kill(self._chance.choice(VICTIMS))
            self.faults += 1
            printed, said = process.communicate()
            self._mesh.wait_until_ready()
            if process.returncode == 0:
                return dict(json.loads(printed))
            assert said.splitlines()[-1].startswith("tenfold: "), said
            assert not to.exists()
        raise AssertionError(f"no backup in {TRIES_MAX} tries")
