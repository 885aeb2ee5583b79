"""Which processes are ours and still alive: a pid alone may be somebody else's by now."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# proc(5), counted after the command's name.
STAT_STATE, STAT_PARENT, STAT_THREADS, STAT_STARTED = 0, 1, 17, 19


@dataclass(frozen=True)
class ProcessMark:
    """One process for ever: pids are reused, a pid with its start time is not.

    Attributes:
        pid: the process id.
        started: clock ticks after boot; 0 where there is no /proc, and then the pid decides.
    """

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs; a zombie does not."""
        if not PROC.is_dir():
            return _answers_signals(self.pid)
        stat = _stat(self.pid)
        if not stat or int(stat[STAT_STARTED]) != self.started:
            return False
        # A zombie's other threads may still be ending, and hold its files and ports until then.
        return stat[STAT_STATE] != "Z" or int(stat[STAT_THREADS]) > 1


def mark(pid: int) -> ProcessMark:
    """The mark of a process that runs now; one that is gone is never alive."""
    stat = _stat(pid)
    return ProcessMark(pid, int(stat[STAT_STARTED]) if stat else 0)


def family(pid: int) -> list[ProcessMark]:
    """The process and all that descend from it, parents first; empty without /proc."""
    children: dict[int, list[int]] = {}
    for other in _pids():
        if stat := _stat(other):
            children.setdefault(int(stat[STAT_PARENT]), []).append(other)
    found = [pid] if _stat(pid) else []
    for parent in found:  # It grows while we walk it.
        found += children.get(parent, [])
    return [mark(member) for member in found]


def processes_in(folder: Path) -> list[ProcessMark]:
    """Those that work in this folder, such as every process of a database server in its data.

    They are found though their parent has died. Empty without /proc.
    """
    place = os.path.realpath(folder)
    return [mark(pid) for pid in _pids() if _folder_of(pid) == place]


def memory_bytes(pid: int) -> int:
    """Resident memory, shared pages counted by their share (PSS); 0 for a process that is gone."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _pids() -> Iterator[int]:
    if PROC.is_dir():
        yield from (int(entry) for entry in os.listdir(PROC) if entry.isdigit())


def _folder_of(pid: int) -> str:
    try:
        return os.readlink(PROC / str(pid) / "cwd")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # The name before it may hold anything.


def _answers_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
