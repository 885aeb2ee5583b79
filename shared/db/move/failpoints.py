"""Named places where a test may kill or stop a mover: after each step has had its effect.

TENFOLD_FAILPOINT=commit:kill sends SIGKILL to the process after the step `commit`, and
commit:stop sends SIGSTOP, once, so that the mover wakes up later as one that was taken over.
Without the setting a visit is a call of a function that does nothing.
"""

import os
import signal
from collections.abc import Callable

FAILPOINT_VARIABLE = "TENFOLD_FAILPOINT"
FAILPOINTS = (
    *("plan", "prepare", "capture", "capture2", "copy.read", "copy.apply", "copied"),
    *("catch.read", "catch.apply", "catch.ack", "verify", "precheck", "fence", "fence2"),
    *("drain.read", "drain.apply", "drain.ack", "verify2", "commit", "src_moved", "dst_active"),
    *("done", "gc", "abort", "abort.dst", "abort.src", "aborted", "takeover"),
)
ADDING_FAILPOINTS = ("add.recorded", "add.made", "add.active")
"""While a shard is added: Control has it, its tables are there, it is in use."""
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def armed(setting: str) -> Callable[[str], None]:
    """The function to call with a failpoint's name.

    Raises:
        ValueError: the setting names no failpoint, or neither kill nor stop.
    """
    if not setting:
        return _pass
    name, _, how = setting.partition(":")
    if name not in FAILPOINTS + ADDING_FAILPOINTS or how not in _SIGNALS:
        raise ValueError(
            f"{FAILPOINT_VARIABLE} is {setting!r}: it must be NAME:kill or NAME:stop, with NAME "
            f"one of {', '.join(FAILPOINTS + ADDING_FAILPOINTS)}"
        )
    waiting = [name]

    def visit(passed: str) -> None:
        if passed in waiting:
            waiting.remove(passed)
            os.kill(os.getpid(), _SIGNALS[how])

    return visit


def _pass(name: str) -> None:
    del name
