"""The commands that add a shard to a mesh and level its load, killed on the way or not."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

from shared.db.move.failpoints import FAILPOINT_VARIABLE
from tests.mesh import ROOT, Mesh

KILLED = -signal.SIGKILL


def shards(mesh: Mesh, *arguments: str, killed_after: str = "") -> subprocess.CompletedProcess[str]:
    """`tenfold shards …` on this mesh; with SIGKILL after a step, if one is named."""
    command = [sys.executable, "-P", "-m", "deploy.cli", "shards", *arguments]
    environ = dict(os.environ)
    if killed_after:
        environ[FAILPOINT_VARIABLE] = f"{killed_after}:kill"
    return subprocess.run(
        [*command, "--data", str(mesh.data)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def told(run: "subprocess.CompletedProcess[str]") -> Any:
    """What it printed with --json; AssertionError with its sentence if it failed."""
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])
