"""Runs a target of `tests.fuzz.edge_input` in a process of its own, for so long."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("target", "json", "http1", "headers", "http2")
START_S = 60.0
_DONE = re.compile(r"Done (\d+) runs")


@dataclass(frozen=True)
class Outcome:
    """What a fuzzer found.

    Attributes:
        inputs: how many it tried.
        crash: the end of its output, if one of them crashed; else "".
    """

    inputs: int
    crash: str


def is_installed() -> bool:
    """Whether there is a fuzzer for this platform and this Python."""
    return importlib.util.find_spec("atheris") is not None


def fuzz(target: str, *, seconds: int, folder: Path) -> Outcome:
    """Fuzz one target.

    Args:
        target: one of TARGETS.
        seconds: how long.
        folder: where an input that crashes is written.
    """
    done = subprocess.run(
        (
            *(sys.executable, "-m", "tests.fuzz.edge_input", target),
            *(f"-max_total_time={seconds}", f"-artifact_prefix={folder}/", "-timeout=5"),
        ),
        capture_output=True,
        text=True,
        timeout=seconds + START_S,
        check=False,
    )
    found = _DONE.search(done.stderr)
    if done.returncode == 0 and found is not None:
        return Outcome(int(found.group(1)), "")
    return Outcome(0, (done.stdout + done.stderr)[-4000:])
