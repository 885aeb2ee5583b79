"""A nats-server of the test's own, that may be killed and started again."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from shared.bus.jetstream import Bus, open_bus
from tests.integration.shared.bus.nats_server import NatsServer


@pytest.fixture
def nats_folder(tmp_path: Path) -> Path:
    return tmp_path / "jetstream"


@pytest.fixture
def nats_process(nats_folder: Path) -> Iterator[NatsServer]:
    server = NatsServer(nats_folder)
    yield server
    server.kill()


@pytest.fixture
async def nats(nats_process: NatsServer) -> NatsServer:
    await nats_process.start()
    return nats_process


@pytest.fixture
async def bus(nats: NatsServer) -> AsyncIterator[Bus]:
    async with open_bus(nats.url, name="test") as opened:
        yield opened


Eventually = Callable[[Callable[[], Awaitable[object] | object]], Awaitable[None]]


@pytest.fixture
def eventually() -> Eventually:
    """Polls until what it is given is true, for a bounded time."""

    async def poll(ask: Callable[[], Awaitable[object] | object], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while True:
                answer = ask()
                if isinstance(answer, Awaitable):
                    answer = await answer
                if answer:
                    return
                await asyncio.sleep(0.02)

    return poll
