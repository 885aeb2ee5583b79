"""The edge on real sockets, in front of a small real gRPC server."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    closing,
)
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from edge.app import EdgeApp
from edge.config import EdgeConfig
from edge.contracts import Contracts
from edge.serving import serving
from edge.wiring import Surroundings, open_edge
from shared.clock import SystemClock
from shared.listening import bind
from shared.rpc.client import Upstreams
from shared.telemetry.metrics import Metrics
from tests.integration.edge.behind import Behind
from tests.integration.edge.bench import Bench, open_bench
from tests.integration.edge.duplex import Duplex
from tests.integration.edge.stranger import CONTRACT, Stranger
from tests.protos import compile_protos

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
        metrics: Metrics | None = None,
        quota_timeout_s: float = 5.0,
        quota_plans: Path | None = None,
    ) -> AsyncIterator[Edge]:
        config = replace(
            config or EdgeConfig(drain_s=1.0),
            listen="127.0.0.1:0",
            # Other tests' load must not look like an outage.
            quota_timeout_s=quota_timeout_s,
        )
        upstreams = Upstreams.parse(f"*={behind.address}")
        around = Surroundings(
            upstreams,
            behind.edge_signer,
            valkey,
            SystemClock(),
            metrics=metrics or Metrics(),
            quota_plans=quota_plans,
        )
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


@dataclass(frozen=True)
class ForeignEdge:
    """An edge that knows nothing of what it fronts but the contract."""

    port: int
    client: httpx.AsyncClient
    stranger: Stranger


StartForeignEdge = Callable[..., AbstractAsyncContextManager[ForeignEdge]]


@pytest.fixture(scope="session")
async def stranger(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Stranger, str]]:
    """A stranger's server, and the options by which an edge finds it and its contract."""
    image = tmp_path_factory.mktemp("foreign") / "image.binpb"
    image.write_bytes(compile_protos(CONTRACT, image.parent).SerializeToString())
    behind = Stranger(Contracts.of_bytes(image.read_bytes()))
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([behind])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield behind, f"{image}=127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture(scope="session")
def start_foreign_edge(stranger: tuple[Stranger, str]) -> StartForeignEdge:
    behind, where = stranger
    image, _, address = where.partition("=")

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[ForeignEdge]:
        config = EdgeConfig(
            listen="127.0.0.1:0",
            descriptors=image,
            allow_anonymous=True,
            api_burst_points=1_000_000,
            drain_s=1.0,
        )
        config = replace(config, **settings)
        upstreams = Upstreams.parse(f"*={address}")
        around = Surroundings(upstreams, None, "", SystemClock())
        async with AsyncExitStack() as stack:
            listener = stack.enter_context(closing(bind(config.listen, setting="listen")))
            app = await stack.enter_async_context(open_edge(config, around))
            port = await stack.enter_async_context(serving(app, config, listener))
            url = f"http://127.0.0.1:{port}"
            client = httpx.AsyncClient(base_url=url, timeout=10)
            yield ForeignEdge(port, await stack.enter_async_context(client), behind)

    return start


@pytest.fixture(scope="session")
async def _foreign_edge(start_foreign_edge: StartForeignEdge) -> AsyncIterator[ForeignEdge]:
    async with start_foreign_edge() as running:
        yield running


@pytest.fixture
def foreign_edge(_foreign_edge: ForeignEdge) -> ForeignEdge:
    """One for all tests that do not disturb it, in front of a stranger without a memory."""
    _foreign_edge.stranger.reset()
    return _foreign_edge


Talk = Callable[..., Awaitable[Duplex]]


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    """Opens connections that send and read at once; closes them after the test."""
    opened: list[Duplex] = []

    async def start(edge: Edge | ForeignEdge, target: str, *headers: str) -> Duplex:
        opened.append(await Duplex.post(edge.port, target, *headers))
        return opened[-1]

    yield start
    for duplex in opened:
        await duplex.leave()


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


@pytest.fixture(scope="session")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """An edge of the conformance contracts, and the server behind it."""
    async with open_bench(tmp_path_factory.mktemp("conformance")) as running:
        yield running
