"""Signals to child processes."""

import asyncio
import contextlib
import os


def send_signal(child: asyncio.subprocess.Process, number: int) -> None:
    """Signal a child; one that has ended is left alone.

    Process.send_signal first polls the child (Python before 3.12.8). A poll that finds it ended
    takes its exit code, and the event loop, which then finds no such child, reports 255.

    Args:
        child: started by asyncio.
        number: SIGTERM, SIGKILL, ...
    """
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)
