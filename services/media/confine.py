"""Starts a program that reads hostile bytes, cut off from network and files.

    python -I -S confine.py '{"readable": […], "writable": […]}' program arguments…

Standard library only. CPU seconds, address space, file size, open files and priority are
limited by who starts it (shared.spawner.Limits); not the number of processes, which would
count everything of the same user. What is added here, for the program and all it starts:

- no new privileges;
- no network: an own empty network namespace where the kernel lets us make one;
- files: Landlock, where the kernel has it (5.13): only what is listed can be read, only
  the output folder written; no TCP either (6.7), and no signals to others (6.12).

The last two are best effort: a container may forbid them. They come on top of what always
holds: allow-lists of demuxers and protocols, and arguments that hold no user text.
"""

import ctypes
import json
import os
import sys
from collections.abc import Iterable

# Linux's own numbers (uapi/linux/landlock.h, prctl.h, sched.h); the calls have the same
# number on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_ALL_BY_ABI = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 4: 1 << 15}
_ALL_LATER = 1 << 16
_REFER = 1 << 13
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def drop_network() -> bool:
    """Leave for an empty network namespace; whether the kernel allowed it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return any(
        libc.unshare(flags) == 0 for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET)
    )


def confine_files(readable: Iterable[str], writable: Iterable[str]) -> bool:
    """Let only these files and folders be opened from now on; whether the kernel can.

    Args:
        readable: to read and execute; those that do not exist are left out.
        writable: folders in which to do anything.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    abi = libc.syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    if abi < 1:
        return False
    everything = _ALL_BY_ABI.get(abi, _ALL_LATER) - 1
    attributes = _RulesetAttributes(everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = ctypes.sizeof(attributes) if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), size, 0)
    if ruleset < 0:
        return False
    for path in readable:
        _allow(libc, ruleset, path, (_EXECUTE | _READ_FILE | _READ_DIR) & everything)
    for path in writable:
        _allow(libc, ruleset, path, everything & ~_EXECUTE)
    is_confined = bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    os.close(ruleset)
    return is_confined


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            access &= _FILE_ONLY
        rule = _PathBeneath(access, fd)
        libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(fd)


def main() -> None:
    """Tie the hands, then become the program."""
    ties, program = json.loads(sys.argv[1]), sys.argv[2:]
    drop_network()
    confine_files(ties["readable"], ties["writable"])
    os.execve(program[0], program, {"LANG": "C", "PATH": "", "HOME": "/nonexistent"})  # noqa: S606


if __name__ == "__main__":
    main()
