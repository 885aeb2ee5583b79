"""What an edge does while its server is dead, frozen, slow or full, in a process of its own."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge.config import EdgeConfig
from edge.serving import serving
from edge.wiring import Surroundings, open_edge
from shared.clock import SystemClock
from shared.listening import bind
from shared.rpc.client import Upstreams
from shared.telemetry.metrics import Metrics
from tests.integration.edge.worker import worker, works_image


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return works_image(tmp_path_factory.mktemp("works"))


@pytest.fixture
def address(free_port: int) -> str:
    return f"127.0.0.1:{free_port}"


@dataclass(frozen=True)
class Fronted:
    """A client of an edge."""

    client: httpx.AsyncClient

    async def look(self) -> httpx.Response:
        return await self.client.get("/v1/look")

    async def wait(self, seconds: float, **headers: str) -> httpx.Response:
        query = {"work_ms": round(seconds * 1000)}
        return await self.client.get("/v1/wait", params=query, headers=headers)

    async def toil(self, milliseconds: int) -> httpx.Response:
        return await self.client.post("/v1/toil", json={"workMs": milliseconds})

    async def status_without_body(self) -> bytes:
        """The first line of the answer to a request whose body does not come."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.client.base_url.port)
        try:
            writer.write(b"POST /v1/toil HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n")
            return await asyncio.wait_for(reader.readline(), 10)
        finally:
            writer.close()

    async def until(self, is_so: Callable[[httpx.Response], bool]) -> httpx.Response:
        """Look again and again until the answer is so."""
        async with asyncio.timeout(20):
            while not is_so(answer := await self.look()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return answer


@asynccontextmanager
async def edge_before(
    image: Path, address: str, metrics: Metrics | None = None, **settings: Any
) -> AsyncIterator[Fronted]:
    config = EdgeConfig(
        listen="127.0.0.1:0",
        descriptors=str(image),
        api_burst_points=1_000_000,
        drain_s=0.5,
        **settings,
    )
    upstreams, metrics = Upstreams.parse(f"*={address}"), metrics or Metrics()
    around = Surroundings(upstreams, None, "", SystemClock(), metrics=metrics)
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(closing(bind(config.listen, setting="listen")))
        app = await stack.enter_async_context(open_edge(config, around))
        port = await stack.enter_async_context(serving(app, config, listener))
        limits = httpx.Limits(max_connections=None)
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, limits=limits)
        yield Fronted(await stack.enter_async_context(client))


def reason(answer: httpx.Response) -> str:
    return str(answer.json()["reason"])


async def test_a_dead_server_is_asked_no_more_and_found_again_at_once(
    image: Path, address: str
) -> None:
    async with edge_before(image, address) as edge:
        async with worker(image, address) as process:
            assert (await edge.look()).status_code == 200
            process.kill()
            refused = await edge.until(
                lambda answer: answer.status_code == 503 and (reason(answer) == "UPSTREAM_DOWN")
            )
        assert int(refused.headers["retry-after"]) >= 1
        stream = await edge.client.get("/v1/watch")
        assert (stream.status_code, reason(stream)) == (503, "UPSTREAM_DOWN")
        assert await edge.status_without_body() == b"HTTP/1.1 503 Service Unavailable\r\n"
        async with worker(image, address):
            answer = await edge.until(lambda answer: answer.status_code == 200)
            assert "retry-after" not in answer.headers
            assert (await edge.client.get("/v1/watch")).status_code == 200


async def test_a_frozen_server_costs_a_few_deadlines_and_then_nobody_waits(
    image: Path, address: str
) -> None:
    async with edge_before(image, address) as edge, worker(image, address) as process:
        assert (await edge.look()).status_code == 200
        process.send_signal(signal.SIGSTOP)
        late = await asyncio.gather(*(edge.look() for _ in range(12)))
        assert {answer.status_code for answer in late} == {504}
        later = await asyncio.gather(*(edge.look() for _ in range(12)))
        began_s = time.monotonic()
        refused = await edge.until(lambda answer: reason(answer) == "UPSTREAM_DOWN")
        assert refused.status_code == 503
        process.send_signal(signal.SIGCONT)
        await edge.until(lambda answer: answer.status_code == 200)
        assert time.monotonic() - began_s < 20
        assert {answer.status_code for answer in later} <= {503, 504}


async def test_clients_in_a_hurry_close_nothing_to_others(image: Path, address: str) -> None:
    async with edge_before(image, address) as edge, worker(image, address):
        for _ in range(30):
            assert (await edge.wait(5, **{"grpc-timeout": "20m"})).status_code == 504
        assert (await edge.wait(0)).status_code == 200


async def test_a_method_that_hangs_leaves_room_for_all_others(image: Path, address: str) -> None:
    metrics = Metrics()
    async with (
        edge_before(image, address, metrics, upstream_calls_max=40) as edge,
        worker(image, address),
    ):
        hanging = [asyncio.create_task(edge.wait(1.0)) for _ in range(60)]
        await asyncio.sleep(0.3)
        for _ in range(20):
            assert (await edge.look()).status_code == 200
        answers = await asyncio.gather(*hanging)
    shed = [answer for answer in answers if answer.status_code == 503]
    assert len(shed) == 40  # half of the upstream's calls is all that one method has
    assert {reason(answer) for answer in shed} == {"LIMIT_REACHED"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in shed)
    told = {family.name: family for family in metrics.families()}
    assert told["tenfold_upstream_shed_total"].of(address, "READ").value == 40
    assert told["tenfold_upstream_limit"].of(address).value == 40


async def test_too_much_work_is_shed_and_what_is_taken_is_done_in_time(
    image: Path, address: str
) -> None:
    async with edge_before(image, address) as edge, worker(image, address):
        for _ in range(40):
            assert (await edge.toil(5)).status_code == 200
        statuses: list[int] = []

        async def client() -> None:
            while 503 not in statuses:
                statuses.append((await edge.toil(10)).status_code)

        async with asyncio.timeout(30):
            await asyncio.gather(*(client() for _ in range(80)))
        assert set(statuses) == {200, 503}
        assert (await edge.look()).status_code == 200
