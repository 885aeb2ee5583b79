"""Named places where a test may kill the process: proof by dying, not by reasoning.

A point is declared once, at module level, and visited where the code passes it:

    BEFORE_COMMIT = CrashPoint("db.before_commit", "the effect is written, not committed")
    ...
    BEFORE_COMMIT.visit()

TENFOLD_CRASH_POINT="db.before_commit:3" sends SIGKILL to the process at its third visit;
several points are separated by commas. With TENFOLD_CRASH_JOURNAL naming a file, a point
writes its name there before it kills and never kills again, so that a restarted process gets
past it. Without the setting a visit costs one comparison.
"""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

CRASH_POINT_VARIABLE = "TENFOLD_CRASH_POINT"
CRASH_JOURNAL_VARIABLE = "TENFOLD_CRASH_JOURNAL"


def _armed() -> dict[str, int]:
    """Name -> visit that kills, of every armed point that has not killed yet."""
    journal = os.environ.get(CRASH_JOURNAL_VARIABLE, "")
    spent = Path(journal).read_text().split() if journal and Path(journal).exists() else []
    armed = {}
    for point in filter(None, os.environ.get(CRASH_POINT_VARIABLE, "").split(",")):
        name, _, nth = point.partition(":")
        if name not in spent:
            armed[name] = int(nth or 1)
    return armed


@dataclass
class CrashPoint:
    """One named place; every declared point is in `registry`.

    Args:
        name: "<area>.<place>", unique in the tree.
        meaning: what has and has not happened here.
    """

    name: str
    meaning: str
    visits: int = field(default=0, init=False)

    registry: ClassVar[dict[str, "CrashPoint"]] = {}
    armed: ClassVar[dict[str, int]] = _armed()

    def __post_init__(self) -> None:
        """Refuse a second point of this name."""
        if self.name in self.registry:
            raise ValueError(f"crash point {self.name} is declared twice")
        self.registry[self.name] = self

    def visit(self) -> None:
        """Die here if this point is armed and this is the visit; otherwise go on."""
        if not self.armed or self.name not in self.armed:
            return
        self.visits += 1
        if self.visits == self.armed[self.name]:
            self._die()

    def _die(self) -> None:
        if journal := os.environ.get(CRASH_JOURNAL_VARIABLE, ""):
            with Path(journal).open("a") as file:
                file.write(f"{self.name}\n")
                file.flush()
                os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGKILL)
