"""One run of a mesh: started, kept running until a signal, stopped in order, told in state.json."""

import asyncio
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from deploy.local.data_folder import DataFolder
from deploy.local.processes import mark
from deploy.local.report import Report
from deploy.local.supervisor import Child, Supervisor, open_supervisor


class Run(ABC):
    """What every shape of the mesh has in common.

    Args:
        folder: the open data folder.
        report: where progress goes.
    """

    def __init__(self, folder: DataFolder, report: Report) -> None:
        self._folder = folder
        self._report = report
        self._is_ready = False
        self._started_s = time.monotonic()

    @abstractmethod
    async def _start(self, supervisor: Supervisor) -> None:
        """Start every program; return when all are ready."""

    @abstractmethod
    def _state(self) -> Mapping[str, Any]:
        """What state.json says beside the processes: "edge" and "metrics" at least."""

    @abstractmethod
    def _summary(self) -> list[str]:
        """Lines for the operator of a mesh that is ready."""

    async def run(self) -> None:
        """Start everything, keep it running until SIGINT or SIGTERM, stop everything.

        Raises:
            LaunchError: a program refused to start, or died too often.
        """
        await self._until_signalled()
        self._report.done()
        self._report.say("Tenfold has stopped.")

    async def _serve(self, stop_at_once: "asyncio.Future[Supervisor]") -> None:
        opened = open_supervisor(
            logs=self._folder.logs, say=self._report.say, changed=self._write_state
        )
        async with opened as supervisor:
            stop_at_once.set_result(supervisor)
            await self._start(supervisor)
            self._is_ready = True
            self._write_state(supervisor.children)
            self._report.done()
            waited_s = time.monotonic() - self._started_s
            lines = [f"Tenfold is ready, after {waited_s:.1f} s.", *self._summary()]
            self._report.say("\n".join([*lines, "Ctrl-C stops everything."]))
            await asyncio.Event().wait()

    async def _until_signalled(self) -> None:
        # The first signal cancels the run, which stops the children in order; the second
        # kills them, and the same order then finds nothing left to wait for.
        loop = asyncio.get_running_loop()
        supervisor: asyncio.Future[Supervisor] = loop.create_future()
        running = asyncio.create_task(self._serve(supervisor))
        is_stopping = False

        def on_signal() -> None:
            nonlocal is_stopping
            if is_stopping and supervisor.done():
                supervisor.result().kill()
            elif not is_stopping:
                is_stopping = True
                self._report.step("stopping (Ctrl-C again to stop at once)")
                running.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, on_signal)
        try:
            await running
        except asyncio.CancelledError:
            if not is_stopping:
                raise

    def _write_state(self, children: Mapping[str, Child]) -> None:
        launcher = mark(os.getpid())
        self._folder.write_state(
            {
                "launcher": {"pid": launcher.pid, "started": launcher.started},
                "ready": self._is_ready,
                **self._state(),
                "children": {name: _state_of(child) for name, child in children.items()},
            }
        )


def _state_of(child: Child) -> dict[str, Any]:
    return {
        "pid": child.mark.pid if child.mark else 0,
        "started": child.mark.started if child.mark else 0,
        "address": str(child.program.address),
        "ready": child.is_ready,
        "restarts": child.restarts,
    }
