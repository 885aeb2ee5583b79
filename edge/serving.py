"""The HTTP server: uvicorn with httptools, its life in our hands."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import uvicorn

from edge.app import EdgeApp
from edge.config import EdgeConfig
from edge.protocol import ConnectionLimits, protocol_class

# Connections that the kernel may hold until we take them.
BACKLOG = 1024
START_TIMEOUT_S = 5.0
# After the drain uvicorn cancels what is left; then this for it to notice.
STOP_MARGIN_S = 2.0


class ListenError(Exception):
    """The address cannot be listened on; the message says why, in one sentence."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process decides when to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        await super().startup(sockets)
        self.has_started.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def bind(address: str, *, setting: str) -> socket.socket:
    """A listening socket.

    Args:
        address: "127.0.0.1:8080" or "[::1]:0".
        setting: where the address came from, for the error.

    Raises:
        ListenError: it is no address, or it is taken.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ListenError(f"{setting}={address!r} is not HOST:PORT.")
    host = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ListenError(f"{setting}={address}: cannot listen there: {reason}.") from error
    listener.setblocking(False)
    return listener


@asynccontextmanager
async def serving(app: EdgeApp, config: EdgeConfig, listener: socket.socket) -> AsyncIterator[int]:
    """Serve until left; gives the port.

    Leaving drains: no new connections, open streams end, requests in flight get
    config.drain_s.
    """
    limits = ConnectionLimits(config.head_timeout_s, config.connections_per_address_max)
    server = _Server(
        uvicorn.Config(
            app,
            http=protocol_class(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=round(config.keep_alive_s),
            timeout_graceful_shutdown=max(1, round(config.drain_s)),
        )
    )
    port: int = listener.getsockname()[1]
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await server.has_started.wait()
            yield port
        finally:
            app.drain()
            server.should_exit = True
            await asyncio.wait({task}, timeout=config.drain_s + STOP_MARGIN_S)
            task.cancel()
