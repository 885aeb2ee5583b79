"""The edge on real sockets, in front of a small real gRPC server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    closing,
)
from dataclasses import dataclass, replace

import httpx
import pytest

from edge.app import EdgeApp
from edge.config import EdgeConfig
from edge.serving import bind, serving
from edge.wiring import Surroundings, open_edge
from shared.clock import SystemClock
from shared.rpc.client import Upstreams
from tests.integration.edge.behind import Behind

READY_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Edge:
    """A running edge: its port, a client of it, and what is behind it."""

    port: int
    client: httpx.AsyncClient
    behind: Behind
    app: EdgeApp

    def bearer(self, **claims: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.behind.tokens.token(**claims)}"}

    async def raw(self, *parts: bytes, silence_s: float = 0.5) -> bytes:
        """Send bytes as they are; all that comes until the edge closes or is silent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        received = b""
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            async with asyncio.timeout(10):
                while chunk := await asyncio.wait_for(reader.read(65536), silence_s):
                    received += chunk
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
        return received


@pytest.fixture(scope="session")
async def behind() -> AsyncIterator[Behind]:
    server = Behind()
    await server.start()
    yield server
    await server.stop()


StartEdge = Callable[..., AbstractAsyncContextManager[Edge]]


@pytest.fixture(scope="session")
def start_edge(behind: Behind, valkey_url: str) -> StartEdge:
    @asynccontextmanager
    async def start(
        config: EdgeConfig | None = None,
        *,
        valkey: str = valkey_url,
        behind: Behind = behind,
        is_ready: bool = True,
    ) -> AsyncIterator[Edge]:
        config = replace(config or EdgeConfig(drain_s=1.0), listen="127.0.0.1:0")
        upstreams = Upstreams.parse(f"*={behind.address}")
        around = Surroundings(upstreams, behind.edge_signer, valkey, SystemClock())
        async with AsyncExitStack() as stack:
            listener = stack.enter_context(closing(bind(config.listen, setting="listen")))
            yield await stack.enter_async_context(
                running(config, around, listener, behind, is_ready=is_ready)
            )

    return start


@asynccontextmanager
async def running(config, around, listener, behind, *, is_ready: bool) -> AsyncIterator[Edge]:
    async with (
        open_edge(config, around) as app,
        serving(app, config, listener) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client,
    ):
        if is_ready:
            await until_ready(client)
        yield Edge(port, client, behind, app)


@pytest.fixture(scope="session")
async def edge(start_edge: StartEdge) -> AsyncIterator[Edge]:
    """One edge for all tests that do not disturb it."""
    async with start_edge() as running:
        yield running


async def until_ready(client: httpx.AsyncClient) -> None:
    until = time.monotonic() + READY_TIMEOUT_S
    while (answer := await client.get("/readyz")).status_code != 200:
        assert time.monotonic() < until, answer.text
        await asyncio.sleep(0.02)
