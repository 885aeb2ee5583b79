"""Starts programs, restarts those that die, stops them in order; it never loads gRPC.

Every child is started by this process's main thread, since the parent-death signal that
`child.py` asks for fires when the thread that forked it ends.
"""

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from deploy.local.errors import LaunchError
from deploy.local.processes import ProcessMark, mark
from deploy.local.program import Program, Successor
from shared.crashpoints import CRASH_JOURNAL_VARIABLE, CRASH_POINT_VARIABLE
from shared.signals import send_signal

WRAPPER = Path(__file__).with_name("child.py")
READY_POLL_S = 0.05
LOG_BYTES_MAX = 16 * 1024 * 1024  # A larger log is set aside when its program starts.
LOG_TAIL_LINES = 12
LOG_TAIL_BYTES = 8192

Say = Callable[[str], None]


@dataclass(frozen=True)
class Patience:
    """How long to wait, and how often to try again.

    Attributes:
        ready_timeout_s: from start to the first "ready".
        restart_first_s, restart_max_s: pause before a restart; it doubles with every death
            that came before the program was ready again.
        failed_starts_max: as many such deaths in a row end the mesh.
        deaths_max: as many deaths of one program within deaths_within_s end it, too.
    """

    ready_timeout_s: float = 60.0
    restart_first_s: float = 0.1
    restart_max_s: float = 5.0
    failed_starts_max: int = 8
    deaths_max: int = 40
    deaths_within_s: float = 60.0


@dataclass
class Child:
    """A program's run: its process now, and how often it died."""

    program: Program
    process: asyncio.subprocess.Process | None = None
    mark: ProcessMark | None = None
    is_ready: bool = False
    was_ready: bool = False
    restarts: int = 0
    failed_starts: int = 0
    log_offset: int = 0
    deaths: deque[float] = field(default_factory=deque)


class Supervisor:
    """Runs programs until it is stopped; open it with open_supervisor.

    Args:
        tasks: where the tasks that watch children live.
        logs: the folder of <name>.log files.
        say: tells the operator one line.
        changed: called after a child started, became ready or died.
        patience: the waits.
    """

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        *,
        logs: Path,
        say: Say,
        changed: Callable[[Mapping[str, Child]], None],
        patience: Patience,
    ) -> None:
        self._tasks = tasks
        self._logs = logs
        self._say = say
        self._changed = changed
        self._patience = patience
        self._children: dict[str, Child] = {}
        self._stopping = asyncio.Event()

    @property
    def children(self) -> Mapping[str, Child]:
        """Every child that was ever started, by name."""
        return self._children

    async def start(self, *programs: Program) -> None:
        """Start programs side by side; return when all are ready.

        Raises:
            LaunchError: one of them ends by itself, or is not ready in time.
        """
        children = [Child(program) for program in programs]
        for child in children:
            self._children[child.program.name] = child
            await self._spawn(child)
            self._tasks.create_task(self._keep_running(child))
        for child in children:
            await self._until_ready(child)

    def run_beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run this as long as the children are kept running; its failure ends them."""
        self._tasks.create_task(self._until_stopping(work))

    async def stop(self) -> None:
        """End every child: in order of rank, politely first, each within its time."""
        self._stopping.set()
        for rank in sorted({child.program.stop_rank for child in self._children.values()}):
            ranked = [c for c in self._children.values() if c.program.stop_rank == rank]
            await asyncio.gather(*(self._stop(child) for child in ranked))

    def kill(self) -> None:
        """End every child now."""
        self._stopping.set()
        for child in self._children.values():
            if child.process:
                send_signal(child.process, signal.SIGKILL)

    async def _spawn(self, child: Child) -> None:
        program = child.program
        command = [sys.executable, "-I", "-S", str(WRAPPER), str(os.getpid()), program.user]
        with _open_log(self._logs / f"{program.name}.log") as log:
            child.log_offset = log.tell()
            child.process = await asyncio.create_subprocess_exec(
                *command,
                *program.argv,
                env=self._environment_of(child),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        child.mark, child.is_ready = mark(child.process.pid), False
        self._changed(self._children)
        if self._stopping.is_set():  # It was told while this child was being born.
            await self._stop(child)

    def _environment_of(self, child: Child) -> dict[str, str]:
        environment = dict(child.program.environment)
        if child.restarts and CRASH_JOURNAL_VARIABLE not in environment:
            # A crash point kills once: the process that takes over must be able to finish.
            environment.pop(CRASH_POINT_VARIABLE, None)
        return environment

    async def _keep_running(self, child: Child) -> None:
        name = child.program.name
        while child.process:
            code = await child.process.wait()
            end_group(child)
            if self._stopping.is_set():
                return
            pause_s = self._pause_after_death(child, code)
            self._say(f"{name} ended ({describe_exit(code)}); starting it again in {pause_s:.1f} s")
            child.is_ready = False
            self._changed(self._children)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
                return
            if child.program.successor:
                await self._until_stopping(self._succeed(child, child.program.successor))
                if self._stopping.is_set():
                    return
            child.restarts += 1
            await self._spawn(child)
            self._tasks.create_task(self._announce(child))

    async def _succeed(self, child: Child, successor: Successor) -> None:
        child.program = await successor()

    async def _until_stopping(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it; it is cancelled when the children are to be stopped."""
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        if not working.cancelled():
            working.result()

    def _pause_after_death(self, child: Child, code: int) -> float:
        now_s, patience = time.monotonic(), self._patience
        child.failed_starts = 0 if child.is_ready else child.failed_starts + 1
        child.deaths.append(now_s)
        while child.deaths[0] < now_s - patience.deaths_within_s:
            child.deaths.popleft()
        # Before it was ever ready, leaving by itself means that it refuses to start.
        refuses_to_start = not child.was_ready and code > 0
        is_too_often = (
            child.failed_starts >= patience.failed_starts_max
            or len(child.deaths) >= patience.deaths_max
        )
        if refuses_to_start or is_too_often:
            raise LaunchError(self._obituary(child, code))
        doubled_s = patience.restart_first_s * float(2**child.failed_starts)
        return min(doubled_s, patience.restart_max_s)

    def _obituary(self, child: Child, code: int) -> str:
        log = self._logs / f"{child.program.name}.log"
        lines = tail_of(log, since=child.log_offset)
        if not child.was_ready and is_one_sentence(lines):
            return lines[-1]  # It refused a setting, or the machine refused it something.
        times = f", {len(child.deaths)} times in a minute" if child.was_ready else ""
        tail = "\n".join(f"  | {line}" for line in lines)
        return (
            f"{child.program.name} ended ({describe_exit(code)}){times}; the end of {log}:\n{tail}"
        )

    async def _announce(self, child: Child) -> None:
        process = child.process
        while child.process is process and not self._stopping.is_set():
            if await child.program.is_ready():
                child.is_ready = True
                self._say(f"{child.program.name} is back")
                self._changed(self._children)
                return
            await asyncio.sleep(READY_POLL_S)

    async def _until_ready(self, child: Child) -> None:
        deadline_s = time.monotonic() + self._patience.ready_timeout_s
        while not await child.program.is_ready():
            if time.monotonic() > deadline_s:
                name, waited_s = child.program.name, self._patience.ready_timeout_s
                log = self._logs / f"{name}.log"
                raise LaunchError(f"{name} is not ready after {waited_s:.0f} s; its log is {log}.")
            await asyncio.sleep(READY_POLL_S)
        child.is_ready = child.was_ready = True
        self._changed(self._children)

    async def _stop(self, child: Child) -> None:
        process = child.process
        if process is None:
            return
        send_signal(process, child.program.stop_signal)
        try:
            await asyncio.wait_for(process.wait(), child.program.stop_timeout_s)
        except TimeoutError:
            self._say(f"{child.program.name} did not stop in time and was killed")
            send_signal(process, signal.SIGKILL)
            await process.wait()
        end_group(child)


@asynccontextmanager
async def open_supervisor(
    *,
    logs: Path,
    say: Say,
    changed: Callable[[Mapping[str, Child]], None] = lambda children: None,
    patience: Patience | None = None,
) -> AsyncIterator[Supervisor]:
    """A supervisor whose children are all gone when the block is left, however it is left.

    Raises:
        LaunchError: a child gave up; the block is cancelled first.
    """
    failures: list[LaunchError] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            supervisor = Supervisor(
                tasks, logs=logs, say=say, changed=changed, patience=patience or Patience()
            )
            try:
                yield supervisor
            finally:
                await supervisor.stop()
    except* LaunchError as group:
        failures += [error for error in group.exceptions if isinstance(error, LaunchError)]
    if failures:
        raise failures[0]


def describe_exit(code: int) -> str:
    """Say a return code in words: "exit code 1" or "SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def tail_of(log: Path, *, since: int = 0) -> list[str]:
    """The last lines of a log, few enough to read.

    Args:
        log: the file; none is an empty one.
        since: the offset before which the lines are an earlier run's.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(since, log.stat().st_size - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[-LOG_TAIL_LINES:]


def is_one_sentence(lines: list[str]) -> bool:
    """Whether a program's last words are meant for the operator: no traceback, no log record."""
    told = [line for line in lines if not line.startswith("{")]
    return len(told) == 1 and told[0] == lines[-1]


def end_group(child: Child) -> None:
    """Kill what an ended child had started itself: it led its own group (child.py)."""
    if child.process is None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process = None  # Its pid, and its group's, may be somebody else's from now on.


def _open_log(path: Path) -> BinaryIO:
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_name(f"{path.name}.1"))
    return path.open("ab")
