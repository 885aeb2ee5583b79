"""The process that starts programs for a process that has loaded gRPC, and so must not fork.

    python -I -S spawner_helper.py SOCKET_FD PARENT_PID

Standard library only. Each datagram on the socket is one JSON object: {"run": id, "argv": …}
with the descriptors of stdin, stdout and stderr, or {"kill": id}. Answers: {"id", "pid"} or
{"id", "error"}, then {"id", "exit"}. When the socket closes, every program dies, then this one.
"""

import array
import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
DATAGRAM_BYTES_MAX = 128 * 1024
_LIMITS = {
    "cpu_s": resource.RLIMIT_CPU,
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "files": resource.RLIMIT_NOFILE,
}


def _die_with(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def _confined(limits: Mapping[str, int], helper_pid: int) -> Callable[[], None]:
    def confine() -> None:
        _die_with(helper_pid)
        for name, value in limits.items():
            if name == "nice":
                os.nice(value)
            else:
                resource.setrlimit(_LIMITS[name], (value, value))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return confine


class Helper:
    """Starts, watches and kills programs until its socket closes."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._programs: dict[int, subprocess.Popen[bytes]] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(self._wake_read, False)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._link, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the other side is gone."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._link:
                    if not self._serve_one():
                        self._kill_all()
                        return
                else:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
            self._reap()

    def _serve_one(self) -> bool:
        descriptors = array.array("i")
        data, ancillary, _, _ = self._link.recvmsg(
            DATAGRAM_BYTES_MAX, socket.CMSG_SPACE(3 * descriptors.itemsize)
        )
        if not data:
            return False
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(content) - len(content) % descriptors.itemsize
                descriptors.frombytes(content[:whole])
        request = json.loads(data)
        if "kill" in request:
            self._kill(request["kill"])
        else:
            self._start(request, descriptors.tolist())
        return True

    def _start(self, request: Mapping[str, Any], descriptors: list[int]) -> None:
        program_id, answer = request["run"], {}
        try:
            program = subprocess.Popen(  # noqa: S603  argv comes from our own parent
                request["argv"],
                stdin=descriptors[0],
                stdout=descriptors[1],
                stderr=descriptors[2],
                cwd=request["cwd"],
                env=request["env"],
                start_new_session=True,
                preexec_fn=_confined(request["limits"], os.getpid()),  # noqa: PLW1509  one thread
            )
            self._programs[program_id] = program
            answer = {"id": program_id, "pid": program.pid}
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            answer = {"id": program_id, "error": str(error)}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._tell(answer)

    def _kill(self, program_id: int) -> None:
        program = self._programs.get(program_id)
        if program is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(program.pid, signal.SIGKILL)

    def _reap(self) -> None:
        for program_id, program in list(self._programs.items()):
            code = program.poll()
            if code is not None:
                self._kill(program_id)  # what it left behind in its group
                del self._programs[program_id]
                self._tell({"id": program_id, "exit": code})

    def _tell(self, answer: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):
            self._link.send(json.dumps(answer).encode())

    def _kill_all(self) -> None:
        for program_id in list(self._programs):
            self._kill(program_id)


def main() -> None:
    """Become the helper."""
    descriptor, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent_pid)
    os.setsid()  # Ctrl-C in the terminal is for the process that we serve.
    Helper(socket.socket(fileno=descriptor)).run()


if __name__ == "__main__":
    main()
