"""Contracts that change while they are served: no request notices, and no mistake gets in."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from grpc_reflection.v1alpha.reflection import (  # type: ignore[import-untyped]
    enable_server_reflection,
)

from edge.app import EdgeApp
from edge.config import EdgeConfig
from edge.contracts import Contracts
from edge.serving import serving
from edge.wiring import Surroundings, open_edge
from shared.clock import SystemClock
from shared.listening import bind
from shared.rpc.client import Upstreams
from shared.signals import send_signal
from tests.integration.edge.test_process import running as running_process
from tests.integration.edge.worker import Worker
from tests.protos import compile_protos

WORKS = (Path(__file__).parent / "works" / "works.proto").read_text()
GROWN = WORKS.replace("int32 process_id = 2;", "int32 process_id = 2;\n  string note = 3;").replace(
    '{get: "/v1/look"}', '{get: "/v1/look" additional_bindings {get: "/v2/look"}}'
)
BROKEN = WORKS.replace("string name = 1;", "reserved 1;", 1)
WRONG = WORKS.replace('get: "/v1/wait"', 'get: "/v1/look"')


@dataclass
class Changing:
    """An edge whose contracts are written by the test."""

    folder: Path
    client: httpx.AsyncClient
    app: EdgeApp
    told: list[str] = field(default_factory=list)

    def write(self, text: str) -> None:
        """Replace the contracts in one step, as an operator does."""
        image = self.folder / "image.binpb"
        fresh = self.folder / "fresh.binpb"
        fresh.write_bytes(compiled(self.folder, text))
        fresh.replace(image)

    async def until_told(self, what: str) -> None:
        async with asyncio.timeout(20):
            while not any(what in sentence for sentence in self.told):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def compiled(folder: Path, text: str) -> bytes:
    source = folder / "source"
    source.mkdir(exist_ok=True)
    (source / "works.proto").write_text(text)
    return compile_protos(source, folder).SerializeToString()


@pytest.fixture
async def upstream(tmp_path: Path) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([Worker(Contracts.of_bytes(compiled(tmp_path, GROWN)))])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@asynccontextmanager
async def changing(folder: Path, upstream: str, **settings: Any) -> AsyncIterator[Changing]:
    told: list[str] = []
    image = folder / "image.binpb"
    image.write_bytes(compiled(folder, WORKS))
    config = EdgeConfig(
        listen="127.0.0.1:0",
        descriptors=str(image),
        api_burst_points=1_000_000,
        drain_s=1.0,
        **{"reload_s": 0.02, **settings},
    )
    around = Surroundings(Upstreams.parse(f"*={upstream}"), None, "", SystemClock())
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(closing(bind(config.listen, setting="listen")))
        app = await stack.enter_async_context(
            open_edge(config, around, tell=lambda sentence: told.append(str(sentence)))
        )
        port = await stack.enter_async_context(serving(app, config, listener))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20)
        yield Changing(folder, await stack.enter_async_context(client), app, told)


async def test_a_file_that_changes_is_served_and_the_difference_is_told(
    tmp_path: Path, upstream: str
) -> None:
    async with changing(tmp_path, upstream) as edge:
        assert (await edge.client.get("/v2/look")).status_code == 404
        edge.write(GROWN)
        await edge.until_told("+ GET /v2/look (/works.v1.Works/Look)")
        assert (await edge.client.get("/v2/look?name=a")).json()["note"] == ""
        document = (await edge.client.get("/openapi.json")).json()
    assert "/v2/look" in document["paths"]
    assert any("works.v1.Done.note is new" in sentence for sentence in edge.told)


async def test_what_would_break_a_client_is_refused_with_a_report_and_the_old_set_stays(
    tmp_path: Path, upstream: str
) -> None:
    async with changing(tmp_path, upstream) as edge:
        edge.write(BROKEN)
        await edge.until_told("--allow-breaking")
        assert any("works.v1.Work.name is gone" in sentence for sentence in edge.told)
        assert (await edge.client.get("/v1/look?name=a")).json()["name"] == "a"
        edge.write(GROWN)  # a later mend is served
        await edge.until_told("contracts changed")


async def test_an_operator_may_let_it_in(tmp_path: Path, upstream: str) -> None:
    async with changing(tmp_path, upstream, reload_breaking=True) as edge:
        edge.write(BROKEN)
        await edge.until_told("contracts changed")
        assert (await edge.client.get("/v1/look?name=a")).status_code == 400


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (b"", "without any file"),
        (b"\xff" * 99, "it is no FileDescriptorSet"),
        (None, "cannot be read: No such file"),
    ],
    ids=["empty", "half written", "gone"],
)
async def test_a_file_that_is_none_changes_nothing(
    tmp_path: Path, upstream: str, image: bytes | None, sentence: str
) -> None:
    async with changing(tmp_path, upstream) as edge:
        path = tmp_path / "image.binpb"
        if image is None:
            path.unlink()
        else:
            path.write_bytes(image)
        await edge.until_told(sentence)
        assert (await edge.client.get("/v1/look")).status_code == 200
        edge.write(GROWN)
        await edge.until_told("contracts changed")


async def test_routes_that_conflict_are_refused_by_name(tmp_path: Path, upstream: str) -> None:
    async with changing(tmp_path, upstream) as edge:
        edge.write(WRONG)
        await edge.until_told("these routes conflict: GET /v1/look (/works.v1.Works/Look)")
        assert (await edge.client.get("/v1/wait")).status_code == 200


async def test_what_is_in_flight_ends_as_it_began(tmp_path: Path, upstream: str) -> None:
    async with changing(tmp_path, upstream, reload_breaking=True) as edge:
        slow = asyncio.create_task(edge.client.get("/v1/wait?name=a&workMs=700"))
        await asyncio.sleep(0.1)
        edge.write(WORKS.replace('get: "/v1/wait"', 'get: "/v1/linger"'))
        await edge.until_told("- GET /v1/wait")
        assert not slow.done()
        assert (await edge.client.get("/v1/wait")).status_code == 404
        assert (await slow).json()["name"] == "a"


async def test_no_request_fails_while_contracts_change_again_and_again(
    tmp_path: Path, upstream: str
) -> None:
    async with changing(tmp_path, upstream) as edge:
        statuses: list[int] = []
        is_over = False

        async def client() -> None:
            while not is_over:
                answer = await edge.client.get("/v1/look?name=a")
                statuses.append(answer.status_code)

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(client())
            for number in range(5):
                edge.told.clear()
                notes = "".join(f"string note{at} = {at + 10};" for at in range(number + 1))
                edge.write(WORKS.replace("int32 process_id = 2;", f"int32 process_id = 2; {notes}"))
                await edge.until_told(f"works.v1.Done.note{number} is new")
            is_over = True
    assert set(statuses) == {200}


async def test_nothing_is_looked_at_unasked_if_the_operator_says_so(
    tmp_path: Path, upstream: str
) -> None:
    async with changing(tmp_path, upstream, reload_s=0) as edge:
        edge.write(GROWN)
        await asyncio.sleep(0.2)
        assert edge.told == []
        edge.app.ask_reload()
        await edge.until_told("contracts changed")
        edge.app.ask_reload()
        await edge.until_told("the contracts are those that are served")


async def test_servers_that_tell_of_more_are_asked_again(tmp_path: Path, free_port: int) -> None:
    upstreams = Upstreams.parse(f"*=127.0.0.1:{free_port}")
    config = EdgeConfig(reflect=True, reload_s=0)
    around, told = Surroundings(upstreams, None, "", SystemClock()), list[str]()
    async with telling(tmp_path, WORKS, free_port):
        opened = open_edge(config, around, tell=lambda sentence: told.append(str(sentence)))
        app = await opened.__aenter__()
    try:
        app.ask_reload()
        async with asyncio.timeout(20):
            while not any("contracts not changed" in line for line in told):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with telling(tmp_path, GROWN, free_port), asyncio.timeout(20):
            while "+ GET /v2/look (/works.v1.Works/Look)" not in told:
                app.ask_reload()
                await asyncio.sleep(0.05)
    finally:
        await opened.__aexit__(None, None, None)


@asynccontextmanager
async def telling(folder: Path, text: str, port: int) -> AsyncIterator[None]:
    """A server that tells these contracts."""
    contracts = Contracts.of_bytes(compiled(folder, text))
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    enable_server_reflection(["works.v1.Works"], server, pool=contracts.pool)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    yield
    await server.stop(0)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_sighup_makes_every_process_look(tmp_path: Path, upstream: str, workers: str) -> None:
    image = tmp_path / "image.binpb"
    image.write_bytes(compiled(tmp_path, WORKS))
    environ = {
        "TENFOLD_EDGE_LISTEN": "127.0.0.1:0",
        "TENFOLD_UPSTREAMS": f"*={upstream}",
        "TENFOLD_EDGE_DESCRIPTORS": str(image),
        "TENFOLD_EDGE_RELOAD_S": "0",
        "TENFOLD_EDGE_WORKERS": workers,
    }
    async with running_process(environ) as (process, told):
        image.write_bytes(compiled(tmp_path, GROWN))
        send_signal(process, signal.SIGHUP)
        in_a_row = 0
        async with asyncio.timeout(20):
            while in_a_row < 20:  # of several workers any may take a connection
                async with httpx.AsyncClient(base_url=told["url"], timeout=10) as client:
                    is_new = (await client.get("/v2/look")).status_code == 200
                in_a_row = in_a_row + 1 if is_new else 0
        assert process.returncode is None
