"""python -m edge.workers: several processes that serve one address, and their parent.

The parent binds the address, starts `python -m edge` once per worker, starts again whoever ends,
and serves their metrics as one text. It takes no connection, loads no contract and never gRPC. A
worker that ends leaves the connections that nobody has accepted yet to the others.

SIGTERM, SIGINT: all drain; a second one ends them at once. SIGUSR2: they are replaced one after
another, for new code. SIGHUP: each looks for new contracts at once, as an edge alone does.
"""

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing, suppress
from dataclasses import dataclass, field
from typing import Any

from edge.board import ABSENT, Board
from edge.config import EdgeConfig
from edge.handover import METRICS, SERVING, TELL_METRICS, arguments_of, read_frame
from shared import log
from shared.config import ConfigError, ProcessConfig, load
from shared.listening import ListenError, bind
from shared.telemetry.metrics import Metrics
from shared.telemetry.scrapes import SETTING as METRICS_SETTING
from shared.telemetry.scrapes import exposing

# A worker that ended is started again after this long; it doubles with each that never served.
RESTART_FIRST_S, RESTART_MAX_S = 0.1, 5.0
# Beside what draining takes, until a worker that does not end is killed.
STOP_MARGIN_S = 5.0
# One that does not tell its metrics by then is left out of the scrape.
METRICS_TIMEOUT_S = 2.0

_log = log.get_logger("edge.workers")


class WorkerRefused(Exception):
    """The first worker ended without serving; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass
class Worker:
    """One place among the workers, and the process that has it now."""

    number: int
    process: Process | None = None
    writer: asyncio.StreamWriter | None = None
    is_serving: asyncio.Event = field(default_factory=asyncio.Event)
    where: dict[str, Any] = field(default_factory=dict)
    failures: int = 0
    shall_reload: bool = False  # as soon as it serves
    metrics: asyncio.Future[bytes] | None = None


class Workers:
    """Keeps workers running until they are stopped.

    Args:
        config: how many, and how long they drain.
        listener: bound, and not listening.
        metrics: what the parent counts.
        has_begun: called once, when the first worker serves, with what it says of itself.
    """

    def __init__(
        self,
        config: EdgeConfig,
        listener: socket.socket,
        metrics: Metrics,
        has_begun: Callable[[dict[str, Any]], None],
    ) -> None:
        self._drain_s = config.drain_s
        self._listener = listener
        self._board = Board.make()
        self._workers = [Worker(number) for number in range(config.workers)]
        self._has_begun = has_begun
        self._stopping = asyncio.Event()
        self._restarts = metrics.counter(
            "tenfold_edge_worker_restarts_total", "Workers that ended and were started again."
        ).of()
        serving = metrics.gauge("tenfold_edge_workers", "Workers that take connections.")
        metrics.watch(serving, lambda: len(self._board.counts()))

    async def run(self) -> None:
        """Until stopped. The first worker serves before the others are started.

        Raises:
            WorkerRefused: it cannot serve.
        """
        first, *others = self._workers
        refused: list[BaseException] = []
        try:
            async with asyncio.TaskGroup() as group:
                _obey_signals(self, group)
                group.create_task(self._keep(first))
                await self._either(first.is_serving, self._stopping)
                if not self._stopping.is_set():
                    self._has_begun(first.where)
                    for worker in others:
                        group.create_task(self._keep(worker))
        except* WorkerRefused as all_refused:
            refused += all_refused.exceptions
        finally:
            self._board.close()
        if refused:
            raise refused[0]

    async def stop(self) -> None:
        """Drain all; who does not end in time is killed."""
        self._stopping.set()
        await asyncio.gather(*(self._end(worker) for worker in self._workers))

    def stop_at_once(self) -> None:
        """Tell them a second time, which ends them."""
        for worker in self._workers:
            self._signal(worker, signal.SIGTERM)

    def reload_all(self) -> None:
        """Let each look for new contracts; one that does not serve yet may have read the old."""
        for worker in self._workers:
            if worker.is_serving.is_set():
                self._signal(worker, signal.SIGHUP)
            else:
                worker.shall_reload = True

    async def replace_all(self) -> None:
        """One after another: each serves again before the next one drains."""
        for worker in self._workers:
            if self._stopping.is_set():
                return
            worker.is_serving.clear()
            await self._end(worker)
            await self._either(worker.is_serving, self._stopping)

    async def texts_of_metrics(self) -> list[bytes]:
        """What each worker tells of itself; of those that answer."""
        told = await asyncio.gather(*(self._metrics_of(worker) for worker in self._workers))
        return [text for text in told if text]

    # One worker
    async def _keep(self, worker: Worker) -> None:
        while not self._stopping.is_set():
            code = await self._run_once(worker)
            if self._stopping.is_set():
                return
            has_served = bool(worker.where)
            if not has_served and worker.number == 0 and code > 0:
                raise WorkerRefused(code)
            pause_s = min(RESTART_MAX_S, RESTART_FIRST_S * 2 ** min(worker.failures, 10))
            _log.warning("worker ended", worker=worker.number, code=code, again_in_s=pause_s)
            self._restarts.value += 1
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def _run_once(self, worker: Worker) -> int:
        ours, theirs = socket.socketpair()
        descriptors = self._listener.fileno(), theirs.fileno(), self._board.descriptor
        command = (sys.executable, "-P", "-m", "edge")
        others_serve = bool(self._board.counts())
        worker.shall_reload = False
        with closing(theirs):
            worker.process = await asyncio.create_subprocess_exec(
                *command,
                *arguments_of(worker.number, *descriptors, others_serve=others_serve),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=descriptors,
                process_group=0,  # Ctrl-C is the parent's to hear
            )
        reader, worker.writer = await asyncio.open_unix_connection(sock=ours)
        if self._stopping.is_set():  # it was told while this one was being born
            self._signal(worker, signal.SIGTERM)
        try:
            worker.failures += 1
            await self._hear(worker, reader)  # ends when the worker does
            return await worker.process.wait()
        finally:
            if worker.process.returncode is None:
                worker.process.kill()
                await worker.process.wait()
            worker.writer.close()
            worker.is_serving.clear()
            worker.process = worker.writer = worker.metrics = None
            self._board.write(worker.number, ABSENT)

    async def _hear(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, payload = await read_frame(reader)
                if kind == SERVING:
                    worker.where, worker.failures = json.loads(payload), 0
                    worker.is_serving.set()
                    if worker.shall_reload:
                        self._signal(worker, signal.SIGHUP)
                    assert worker.process is not None
                    _log.info("worker serves", worker=worker.number, pid=worker.process.pid)
                elif kind == METRICS and worker.metrics is not None:
                    worker.metrics.set_result(payload)
                    worker.metrics = None

    async def _metrics_of(self, worker: Worker) -> bytes:
        if worker.writer is None or not worker.is_serving.is_set():
            return b""
        if worker.metrics is None:
            worker.metrics = asyncio.get_running_loop().create_future()
            worker.writer.write(TELL_METRICS)
        with suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(worker.metrics), METRICS_TIMEOUT_S)
        return b""

    async def _end(self, worker: Worker) -> None:
        process = worker.process
        if process is None:
            return
        self._signal(worker, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), self._drain_s + STOP_MARGIN_S)
        except TimeoutError:
            _log.warning("worker did not stop and was killed", worker=worker.number)
            process.kill()

    def _signal(self, worker: Worker, number: signal.Signals) -> None:
        if worker.process is not None:
            with suppress(ProcessLookupError):
                worker.process.send_signal(number)

    async def _either(self, *events: asyncio.Event) -> None:
        waiting = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()


async def supervise(config: EdgeConfig, process: ProcessConfig) -> None:
    """Run workers until signalled.

    Raises:
        ListenError: an address is taken, or none.
        WorkerRefused: the first worker cannot serve.
    """
    metrics = Metrics(is_served=bool(process.metrics_listen))
    async with AsyncExitStack() as stack:
        listener = bind(config.listen, setting="TENFOLD_EDGE_LISTEN", listens=False)
        stack.enter_context(closing(listener))
        metrics_port = 0

        def say_where(where: dict[str, Any]) -> None:
            sentence = where.pop("sentence", "")
            _log.info("serving", **where, workers=config.workers, metrics_port=metrics_port)
            if sentence:
                tell(sentence)

        workers = Workers(config, listener, metrics, say_where)
        if process.metrics_listen:
            metrics_port = await stack.enter_async_context(
                _exposing(workers, metrics, process.metrics_listen)
            )
        await workers.run()


def _exposing(workers: Workers, metrics: Metrics, listen: str) -> AbstractAsyncContextManager[int]:
    from shared.telemetry.exposition import Exposition, merged

    own = Exposition(metrics, {"worker": "parent"})

    async def render() -> bytes:
        return merged([await own.render(), *await workers.texts_of_metrics()])

    return exposing(render, bind(listen, setting=METRICS_SETTING))


def _obey_signals(workers: Workers, group: asyncio.TaskGroup) -> None:
    loop = asyncio.get_running_loop()
    started: dict[str, asyncio.Task[None]] = {}

    def on_stop() -> None:
        if "stop" in started:
            workers.stop_at_once()
        else:
            started["stop"] = group.create_task(workers.stop())

    def on_replace() -> None:
        if "replace" not in started or started["replace"].done():
            started["replace"] = group.create_task(workers.replace_all())

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop)
    loop.add_signal_handler(signal.SIGUSR2, on_replace)
    loop.add_signal_handler(signal.SIGHUP, workers.reload_all)


def tell(sentence: object) -> None:
    """Say one sentence to whoever started it."""
    print(f"edge: {sentence}", file=sys.stderr, flush=True)  # noqa: T201


def main() -> None:
    """Run, and say in one sentence why it could not."""
    try:
        process = load(ProcessConfig, "TENFOLD_", os.environ)
        config = load(EdgeConfig, "TENFOLD_EDGE_", os.environ)
        log.configure(process.log_level)
        asyncio.run(supervise(config, process))
    except (ConfigError, ListenError) as error:
        tell(error)
        sys.exit(1)
    except WorkerRefused as refused:
        sys.exit(refused.code)


if __name__ == "__main__":
    main()
