"""Named places where a test may kill the process: proof by dying, not by reasoning.

A point is declared once, at module level, and visited where the code passes it:

    BEFORE_COMMIT = CrashPoint("db.before_commit", "the effect is written, not committed")
    ...
    BEFORE_COMMIT.visit()

TENFOLD_CRASH_POINT="db.before_commit:3" sends SIGKILL to the process at its third visit.
Without the setting a visit costs one comparison.
"""

import os
import signal
from dataclasses import dataclass, field
from typing import ClassVar

CRASH_POINT_VARIABLE = "TENFOLD_CRASH_POINT"


def _armed() -> tuple[str, int]:
    name, _, nth = os.environ.get(CRASH_POINT_VARIABLE, "").partition(":")
    return name, int(nth or 1)


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
    armed: ClassVar[tuple[str, int]] = _armed()

    def __post_init__(self) -> None:
        if self.name in self.registry:
            raise ValueError(f"crash point {self.name} is declared twice")
        self.registry[self.name] = self

    def visit(self) -> None:
        """Die here if this is the armed point and visit; otherwise go on."""
        if self.armed[0] != self.name:
            return
        self.visits += 1
        if self.visits == self.armed[1]:
            os.kill(os.getpid(), signal.SIGKILL)
