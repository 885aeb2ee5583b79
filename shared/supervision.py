"""A helper process ends when its parent does: by the kernel's word, checked once by hand."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent_pid: int, death_signal: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for a signal when our parent ends, however it ends.

    Changing user clears the request, so drop privileges first; exec keeps it. A parent that
    ended before the request shows by its pid: we have another parent by then, and exit.

    Args:
        parent_pid: what the parent's os.getpid() said before it started us.
        death_signal: what we get.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent_pid:
        os._exit(1)
