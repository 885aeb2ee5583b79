"""The listening socket, and the life of what is served on it."""

import asyncio
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from edge.accepting import Acceptor
from edge.app import EdgeApp
from edge.board import Turn
from edge.config import EdgeConfig
from edge.http1 import ConnectionLimits, Server
from edge.http1_request import Http1Request
from shared import log
from shared.listening import BACKLOG

# After the drain what is left is cancelled; then this for it to notice.
STOP_MARGIN_S = 2.0
# For the last answers to arrive; closed before, a client that still sends could lose its own.
STOP_LINGER_S = 0.5

_log = log.get_logger("edge")


@asynccontextmanager
async def serving(
    app: EdgeApp, config: EdgeConfig, listener: socket.socket, turn: Turn | None = None
) -> AsyncIterator[int]:
    """Serve until left; gives the port.

    Leaving drains: no new connections, open streams end, requests in flight get
    config.drain_s.

    Args:
        app: answers.
        config: limits and times.
        listener: bound.
        turn: ours among the workers that share the listener; None for the only one.
    """
    per_address_max = math.ceil(config.connections_per_address_max / config.workers)
    limits = ConnectionLimits(config.head_timeout_s, config.keep_alive_s, per_address_max)
    requests = _Requests(app)
    server = Server(requests.begin, limits, app.note_refusal)
    app.watch_connections(lambda: len(server.connections))
    port: int = listener.getsockname()[1]
    acceptor = await _accepting(server, listener, turn)
    async with asyncio.TaskGroup() as group:
        sweeper = group.create_task(_sweep(server))
        try:
            yield port
        finally:
            app.drain()
            acceptor.close()
            server.stop()
            await requests.finish(config.drain_s)
            await server.ended(STOP_LINGER_S)
            for connection in tuple(server.connections):
                connection.close()
            sweeper.cancel()


async def _accepting(
    server: Server, listener: socket.socket, turn: Turn | None
) -> Acceptor | asyncio.AbstractServer:
    if turn is None:
        loop = asyncio.get_running_loop()
        return await loop.create_server(server.connection, sock=listener, backlog=BACKLOG)
    acceptor = Acceptor(listener, server.connection, turn)
    server.note_count = acceptor.note_count
    return acceptor


class _Requests:
    """The requests being answered, each in a task of its own."""

    def __init__(self, app: EdgeApp) -> None:
        self._app = app
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, request: Http1Request) -> None:
        """See http1.Server."""
        task = self._loop.create_task(self._app.serve(request))
        self._tasks.add(task)
        task.add_done_callback(partial(self._end, request))

    def _end(self, request: Http1Request, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A bug beyond the app's own boundary; without an end the client would wait for ever.
            _log.error("request failed without an answer", exc_info=error)
            request.abort()

    async def finish(self, timeout_s: float) -> None:
        """Let them end; what is left then is cancelled."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_MARGIN_S)


async def _sweep(server: Server) -> None:
    limits = server.limits
    pause_s = min(1.0, limits.head_timeout_s / 4, limits.keep_alive_s / 4)
    while True:
        await asyncio.sleep(pause_s)
        server.sweep()
