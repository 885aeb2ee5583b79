"""Becomes a child that cannot outlive its parent, then turns into the real program.

    python -I -S child.py PARENT_PID USER PROGRAM [ARGUMENT...]

USER is "-" to stay who we are, or "UID:GID". It runs alone, on the standard library:
importing the project would double the start-up time of every child (which is also why it
does not use shared.supervision).
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
EXIT_CANNOT_START = 127  # what a shell answers when there is no such program


def change_user(user: str) -> None:
    """Drop to UID:GID for good; "-" stays."""
    if user == "-":
        return
    uid, gid = (int(part) for part in user.split(":"))
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def die_with(parent_pid: int, death_signal: signal.Signals) -> None:
    """Ask the kernel to send us a signal when our parent ends, however it ends.

    Changing user clears the request, so it comes after that; exec keeps it. A parent that
    ended before the request is found by its pid: we have another parent by then.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent_pid:
        sys.exit(EXIT_CANNOT_START)


def main() -> None:
    """Cut every tie that would let Ctrl-C or an orphan through, then exec."""
    parent_pid, user, program = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    os.setsid()  # The terminal's Ctrl-C reaches the launcher alone; it stops us in order.
    change_user(user)
    die_with(parent_pid, signal.SIGKILL)
    try:
        os.execv(program[0], program)  # noqa: S606 - that is the point
    except OSError as error:
        print(f"{program[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CANNOT_START)


if __name__ == "__main__":
    main()
