"""Several processes on one address: killed, replaced and stopped under load."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.processes import family
from tests.integration.edge.behind import KNOWN
from tests.integration.edge.conftest import until_ready
from tests.integration.edge.test_process import environment
from tests.mesh import ROOT, wait_until_gone

START_TIMEOUT_S = 30.0
OK = "200"
CLIENTS = 4
CONTRACTS = ROOT / "proto" / "gen" / "tenfold" / "contracts.binpb"
WORKERS = 2


@dataclass
class Running:
    """The parent, and what it has said."""

    process: Process
    said: list[dict[str, Any]] = field(default_factory=list)

    @property
    def serving(self) -> dict[str, Any]:
        return self.events("serving")[0]

    @property
    def url(self) -> str:
        return str(self.serving["url"])

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.said if line["event"] == name]

    def pids(self) -> dict[int, int]:
        """Who has each worker's place; the last that was said counts."""
        return {line["worker"]: line["pid"] for line in self.events("worker serves")}

    async def until(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while not holds():
            assert time.monotonic() < until, self.said[-5:]
            await asyncio.sleep(0.02)

    async def connections(self) -> list[float]:
        """That each worker holds."""
        told = await self.metrics()
        return [told["tenfold_http_connections", str(worker)] for worker in range(WORKERS)]

    async def metrics(self) -> Counter[tuple[str, str]]:
        """Sums of samples by name and worker."""
        url = f"http://127.0.0.1:{self.serving['metrics_port']}/metrics"
        async with httpx.AsyncClient(timeout=10) as client:
            text = (await client.get(url)).text
        told: Counter[tuple[str, str]] = Counter()
        for each in text_string_to_metric_families(text):
            for one in each.samples:
                told[one.name, one.labels["worker"]] += one.value
        return told


@asynccontextmanager
async def running(behind, folder, **settings: str) -> AsyncIterator[Running]:
    environ = environment(
        behind,
        folder,
        TENFOLD_EDGE_WORKERS=str(WORKERS),
        TENFOLD_EDGE_API_BURST_POINTS="100000",
        TENFOLD_METRICS_LISTEN="127.0.0.1:0",
        **settings,
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge"),
        stdout=PIPE,
        env=environ,
        process_group=0,
        limit=2**20,
    )
    told = Running(process)
    reading = asyncio.create_task(read_lines(told))
    marks = []
    try:
        await told.until(lambda: len(told.pids()) == WORKERS)
        async with httpx.AsyncClient(base_url=told.url) as client:
            await until_ready(client)
        yield told
        marks = family(process.pid)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await reading
        await asyncio.to_thread(wait_until_gone, marks)


async def read_lines(told: Running) -> None:
    assert told.process.stdout is not None
    async for line in told.process.stdout:
        said = json.loads(line)
        if said["event"] != "request":
            told.said.append(said)


class Load:
    """Clients that ask again and again; a broken connection is retried once (RFC 9110 §9.2.2).

    They are fewer than any limit on calls at once, which is not what is tested here.
    """

    def __init__(self, url: str, headers: dict[str, str], clients: int = CLIENTS) -> None:
        self.answers: Counter[str] = Counter()
        self.broken = 0
        self.failed: list[Exception] = []
        self._url, self._headers, self._clients = url, headers, clients
        self._is_over = False

    async def _ask(self, client: httpx.AsyncClient) -> str:
        answer = await client.get(f"/v1/{KNOWN}", headers=self._headers)
        return OK if answer.status_code == 200 else answer.text

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=10) as client:
            while not self._is_over:
                try:
                    answer = await self._ask(client)
                except httpx.TransportError:
                    self.broken += 1
                    try:
                        answer = await self._ask(client)
                    except httpx.TransportError as error:
                        self.failed.append(error)
                        continue
                self.answers[answer] += 1
                await asyncio.sleep(0.005)

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator["Load"]:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._run())
            await asyncio.sleep(0.3)
            yield self
            self._is_over = True


@pytest.fixture(scope="module")
async def edge(behind, tmp_path_factory) -> AsyncIterator[Running]:
    """One for all tests after which it serves as before."""
    async with running(behind, tmp_path_factory.mktemp("edge")) as told:
        yield told


@pytest.fixture
def bearer(behind) -> dict[str, str]:
    return {"authorization": f"Bearer {behind.tokens.token()}"}


async def test_a_killed_worker_costs_its_own_connections_and_returns(edge, bearer):
    async with Load(edge.url, bearer)() as load:
        killed = edge.pids()[0]
        os.kill(killed, signal.SIGKILL)
        await edge.until(lambda: edge.pids()[0] != killed)
        answered = load.answers.total()
        await edge.until(lambda: load.answers.total() > answered + 50)
        assert (await edge.metrics())["tenfold_edge_worker_restarts_total", "parent"] >= 1
    assert set(load.answers) == {OK}
    assert not load.failed
    assert load.broken <= CLIENTS


async def test_a_rolling_restart_fails_no_request_that_can_be_retried(edge, bearer):
    async with Load(edge.url, bearer)() as load:
        before = edge.pids()
        edge.process.send_signal(signal.SIGUSR2)
        await edge.until(lambda: not set(before.values()) & set(edge.pids().values()))
        await asyncio.sleep(0.3)
    assert set(load.answers) == {OK}
    assert not load.failed


async def test_ctrl_c_drains_and_ends_all_and_frees_the_port(behind, tmp_path, bearer):
    async with running(behind, tmp_path) as edge:
        marks = family(edge.process.pid)
        assert len(marks) == WORKERS + 1
        async with httpx.AsyncClient(base_url=edge.url, timeout=10) as client:
            headers = {**bearer, "grpc-timeout": "1S"}
            slow = asyncio.create_task(client.get("/v1/accounts/slow", headers=headers))
            await asyncio.sleep(0.3)
            os.killpg(edge.process.pid, signal.SIGINT)
            assert (await slow).status_code == 504  # it was let finish
        assert await asyncio.wait_for(edge.process.wait(), 10) == 0
        await asyncio.to_thread(wait_until_gone, marks)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", edge.serving["port"]))


async def test_workers_do_not_outlive_their_parent(behind, tmp_path):
    async with running(behind, tmp_path) as edge:
        marks = family(edge.process.pid)
        edge.process.kill()
        await edge.process.wait()
        await asyncio.to_thread(wait_until_gone, marks, timeout_s=10)


async def test_each_worker_takes_its_part_of_the_connections(edge):
    port = edge.serving["port"]
    before = await edge.connections()
    opening = (asyncio.open_connection("127.0.0.1", port) for _ in range(60))
    held = await asyncio.gather(*opening)
    for number in range(0, 60, 2):  # one after the other, as real clients come
        held[number][1].close()
        held[number] = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.005)
    counts = await edge.connections()
    for _, writer in held:
        writer.close()
    assert sum(counts) == 60 + sum(before)
    # On a busy machine one that is ahead waits for the other in vain, now and then.
    assert min(counts) >= 60 / WORKERS / 2


async def test_the_metrics_of_all_workers_are_one_text(edge, bearer):
    before = await edge.metrics()
    async with Load(edge.url, bearer)() as load:
        pass
    told = await edge.metrics()
    name = "http_server_request_duration_seconds_count"
    counts = [told[name, str(worker)] - before[name, str(worker)] for worker in range(WORKERS)]
    assert all(counts)
    assert sum(counts) >= load.answers.total()
    assert told["tenfold_edge_workers", "parent"] == WORKERS


@pytest.mark.rare
async def test_a_worker_that_cannot_start_is_tried_ever_later_and_harms_nobody(
    behind, tmp_path, bearer
):
    contracts = tmp_path / "contracts.binpb"
    contracts.write_bytes(CONTRACTS.read_bytes())
    settings = {"TENFOLD_EDGE_DESCRIPTORS": str(contracts)}
    async with running(behind, tmp_path, **settings) as edge, Load(edge.url, bearer)() as load:
        contracts.rename(tmp_path / "away")
        killed = edge.pids()[1]
        os.kill(killed, signal.SIGKILL)
        await edge.until(lambda: len(edge.events("worker ended")) == 4)
        pauses = [line["again_in_s"] for line in edge.events("worker ended")]
        assert pauses == [0.1, 0.2, 0.4, 0.8]
        (tmp_path / "away").rename(contracts)
        await edge.until(lambda: edge.pids()[1] != killed)
    assert set(load.answers) == {OK}
    assert not load.failed


async def test_a_strict_quota_is_one_over_all_workers(behind, tmp_path, valkey_url):
    settings = {"TENFOLD_EDGE_LOGIN_BURST_POINTS": "20", "TENFOLD_VALKEY_URL": valkey_url}
    async with running(behind, tmp_path, **settings) as edge:

        async def log_in() -> int:
            async with httpx.AsyncClient(base_url=edge.url, timeout=10) as client:
                body = {"email": "a@b.example", "password": "wrong"}
                return (await client.post("/v1/sessions", json=body)).status_code

        statuses = Counter(await asyncio.gather(*(log_in() for _ in range(40))))
    assert statuses[401] <= 21  # one refills in a second
    assert statuses[429] >= 19


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("TENFOLD_EDGE_WORKERS", "0"),
        ("TENFOLD_EDGE_WORKERS", "many"),
        ("TENFOLD_EDGE_LISTEN", "nowhere"),
        ("TENFOLD_METRICS_LISTEN", "nowhere"),
        ("TENFOLD_EDGE_DESCRIPTORS", "/nonexistent"),
    ],
)
async def test_what_cannot_be_served_is_one_sentence_from_all_of_them(
    behind, tmp_path, setting, value
):
    environ = {**environment(behind, tmp_path, TENFOLD_EDGE_WORKERS="2"), setting: value}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge"), stdout=DEVNULL, stderr=PIPE, env=environ
    )
    _, errors = await asyncio.wait_for(process.communicate(), START_TIMEOUT_S)
    assert process.returncode == 1
    [line] = errors.decode().strip().splitlines()
    assert setting in line or value in line
