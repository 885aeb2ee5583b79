"""Processes of a bench: started, pinned, looked at from outside, and ended with the block."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deploy.local.processes import family, memory_bytes

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.02
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h

ROOT = Path(__file__).resolve().parents[3]
# Where `make` installs the peers, apart from our own environment.
PEERS = ROOT / ".venv-peers"
CORES = sorted(os.sched_getaffinity(0))
# What is measured has a core to itself; what drives it, and what it calls, have the others.
MEASURED = frozenset(CORES[:1])
BESIDE = frozenset(CORES[1:] or CORES)


@dataclass(frozen=True)
class Child:
    """A running server and all that it started."""

    process: subprocess.Popen[str]
    port: int

    def cpu_s(self) -> float:
        """CPU of the whole tree so far, user and system, every thread."""
        return sum(cpu_s(mark.pid) for mark in family(self.process.pid))

    def memory_mib(self) -> float:
        """Resident memory of the tree, shared pages counted by their share."""
        return sum(memory_bytes(mark.pid) for mark in family(self.process.pid)) / 2**20


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    *,
    port: int = 0,
    environ: Mapping[str, str] | None = None,
    cores: frozenset[int] = MEASURED,
) -> Iterator[Child]:
    """A server that accepts connections.

    Args:
        command: its program and arguments.
        log: takes what it prints.
        port: where it will listen; 0 if it prints that as its first line.
        environ: added to this process's environment.
        cores: where it may run.
    """
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if port == 0 else output,
            stderr=output,
            text=True,
        )
    try:
        os.sched_setaffinity(process.pid, cores)
        if port:
            _wait_until_listening(process, port, log)
        yield Child(process, port or _printed_port(process, log))
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def module(name: str, *arguments: str) -> list[str]:
    """The command of a Python module of this tree."""
    return [sys.executable, "-P", "-m", name, *arguments]


def _printed_port(process: subprocess.Popen[str], log: Path) -> int:
    lines: IO[str] | None = process.stdout
    assert lines is not None
    line = lines.readline().strip()
    assert line.isdigit(), f"{process.args} did not start: {log.read_text()[-2000:]}"
    return int(line)


def _wait_until_listening(process: subprocess.Popen[str], port: int, log: Path) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(POLL_S)
    raise AssertionError(f"{process.args} did not start: {log.read_text()[-2000:]}")


def cpu_s(pid: int) -> float:
    """User and system time of all threads, as /proc/PID/stat tells it, but in nanoseconds.

    The clock is that of clock_getcpuclockid(3), whose number Linux makes of the pid.
    """
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:  # it has ended
        return 0.0
