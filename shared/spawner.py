"""Runs programs for a process that has loaded gRPC: forking such a process can hang (spec d.1).

A small helper, started before gRPC is loaded, does the forking. Programs die with the helper,
and the helper with us.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import Unavailable

HELPER = Path(__file__).with_name("spawner_helper.py")
LINE_BYTES_MAX = 64 * 1024
KILL_TIMEOUT_S = 5.0
START_TIMEOUT_S = 10.0
DATAGRAM_BYTES_MAX = 128 * 1024


@dataclass(frozen=True)
class Limits:
    """What a program may use; None is no limit of ours.

    Attributes:
        cpu_s: seconds of processor time; beyond them it is killed.
        memory_bytes: of address space.
        file_bytes: of any one file that it writes.
        files: open at once.
        nice: how far it steps back for others, 0 to 19.
    """

    cpu_s: int | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    files: int | None = None
    nice: int | None = None


class SpawnError(OSError):
    """The program could not be started."""


class Program:
    """One running program.

    Attributes:
        pid: for people to read; to end it, call kill.
        stdout, stderr: its output; read both, or it stops when a pipe is full.
    """

    def __init__(self, spawner: "Spawner", program_id: int) -> None:
        self._spawner = spawner
        self._id = program_id
        self.pid = 0
        self.stdout = asyncio.StreamReader(limit=LINE_BYTES_MAX)
        self.stderr = asyncio.StreamReader(limit=LINE_BYTES_MAX)
        self._started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def has_ended(self) -> bool:
        """Whether wait would return at once."""
        return self._exit.done()

    async def wait(self) -> int:
        """The exit code; negative for the signal that killed it.

        Raises:
            Unavailable: the helper is gone, and the program with it.
        """
        return await asyncio.shield(self._exit)

    def kill(self) -> None:
        """End it and everything it started, at once."""
        if not self._exit.done():
            self._spawner.send({"kill": self._id})

    async def started(self) -> None:
        """Wait until it runs.

        Raises:
            SpawnError: it could not be started.
        """
        async with asyncio.timeout(START_TIMEOUT_S):
            self.pid = await self._started

    def tell(self, answer: Mapping[str, Any]) -> None:
        """What the helper says of this program."""
        if "pid" in answer:
            self._resolve(self._started, answer["pid"])
        elif "exit" in answer:
            self._resolve(self._exit, answer["exit"])
        else:
            self.fail(SpawnError(answer.get("error", "unknown")))

    def fail(self, error: Exception) -> None:
        """It runs no more, and its exit code is not known."""
        for future in (self._started, self._exit):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: nobody need wait for it

    @staticmethod
    def _resolve(future: "asyncio.Future[int]", value: int) -> None:
        if not future.done():
            future.set_result(value)


class Spawner:
    """Starts programs through the helper. Make it with Spawner.start before gRPC is loaded."""

    def __init__(self, link: socket.socket, helper: "subprocess.Popen[bytes]") -> None:
        self._link = link
        self._helper = helper
        self._programs: dict[int, Program] = {}
        self._ids = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def start(cls) -> "Spawner":
        """Start the helper; call this early, from the main thread."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        helper = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", str(HELPER), str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        ours.setblocking(False)
        return cls(ours, helper)

    @asynccontextmanager
    async def run(
        self,
        argv: Sequence[str],
        *,
        limits: Limits | None = None,
        cwd: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Program]:
        """Run a program; leaving the block kills it if it has not ended.

        Args:
            argv: the program, by its path or a name in PATH, and its arguments.
            limits: what it may use.
            cwd: its folder; ours by default.
            environment: all of its variables; ours by default.

        Raises:
            SpawnError: it could not be started.
            Unavailable: the helper is gone.
        """
        self._listen()
        program_id = next(self._ids)
        program = self._programs[program_id] = Program(self, program_id)
        pipes = await self._pipes(program)
        try:
            used = {k: v for k, v in asdict(limits or Limits()).items() if v is not None}
            request = {
                "run": program_id,
                "argv": list(argv),
                "cwd": str(cwd) if cwd else None,
                "env": dict(os.environ if environment is None else environment),
                "limits": used,
            }
            self._send_start(request, [pipe.theirs for pipe in pipes])
            await program.started()
            yield program
        finally:
            await self._end(program)
            for pipe in pipes:
                pipe.transport.close()
            del self._programs[program_id]

    def send(self, request: Mapping[str, object]) -> None:
        """Tell the helper something."""
        with contextlib.suppress(OSError):
            self._link.send(json.dumps(request).encode())

    def close(self) -> None:
        """End the helper, and with it every program."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._link.fileno())
        self._link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._helper.wait(KILL_TIMEOUT_S)
        if self._helper.poll() is None:
            self._helper.kill()
            self._helper.wait(KILL_TIMEOUT_S)

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            loop.add_reader(self._link.fileno(), self._on_readable)
            self._loop = loop

    def _on_readable(self) -> None:
        try:
            data = self._link.recv(DATAGRAM_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._on_closed()
            return
        answer = json.loads(data)
        program = self._programs.get(answer["id"])
        if program is not None:
            program.tell(answer)

    def _on_closed(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._link.fileno())
        for program in self._programs.values():
            program.fail(Unavailable("the process that runs programs is gone"))

    async def _pipes(self, program: Program) -> list["_Pipe"]:
        return [await _Pipe.open(reader) for reader in (program.stdout, program.stderr)]

    def _send_start(self, request: Mapping[str, object], outputs: Sequence[int]) -> None:
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            socket.send_fds(self._link, [json.dumps(request).encode()], [null, *outputs])
        except OSError as error:
            raise Unavailable("the process that runs programs is gone or busy") from error
        finally:
            for descriptor in (null, *outputs):
                os.close(descriptor)

    async def _end(self, program: Program) -> None:
        if program.has_ended or not program.pid:
            return
        program.kill()
        with contextlib.suppress(TimeoutError, Unavailable):
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await program.wait()


@dataclass(frozen=True)
class _Pipe:
    transport: asyncio.BaseTransport
    theirs: int

    @classmethod
    async def open(cls, reader: asyncio.StreamReader) -> "_Pipe":
        ours, theirs = os.pipe()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
        )
        return cls(transport, theirs)
