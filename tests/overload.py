"""Stories of too much: each on a real edge and real servers, in processes of their own.

`make chaos` tells them at length and judges the figures; the tests tell them in a few seconds.
"""

import asyncio
import os
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from deploy.local.address import free_addresses
from shared.signals import send_signal
from tests.bench import http_load
from tests.integration.edge.worker import CONTRACT, worker, works_image
from tests.open_loop import Request, Shot, Shots, fire, steadily
from tests.protos import compile_protos

START_TIMEOUT_S = 30.0
TOIL_MS = 5
TOIL = Request.of("toil", "POST", "/v1/toil", {"workMs": TOIL_MS})
LOOK = Request.of("look", "GET", "/v1/look")
AMPLE = "1000000"
# Changes of the contract that break nobody.
WORKS = (CONTRACT / "works.proto").read_text()


@dataclass(frozen=True)
class Scene:
    """A running edge, and the server behind it.

    Attributes:
        url: of the edge.
        edge: its process.
        image: the file with its contracts.
        upstream: the address of the server.
        server: its process.
    """

    url: str
    edge: Process
    image: Path
    upstream: str
    server: Process


@asynccontextmanager
async def scene(**settings: str) -> AsyncIterator[Scene]:
    """An edge before a server of `works.proto`."""
    listen, upstream = map(str, free_addresses(2))
    async with AsyncExitStack() as stack:
        image = works_image(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        server = await stack.enter_async_context(worker(image, upstream))
        environ = {
            "PATH": os.environ["PATH"],
            "TENFOLD_EDGE_LISTEN": listen,
            "TENFOLD_UPSTREAMS": f"*={upstream}",
            "TENFOLD_EDGE_DESCRIPTORS": str(image),
            "TENFOLD_EDGE_API_POINTS_PER_S": AMPLE,
            "TENFOLD_EDGE_API_BURST_POINTS": AMPLE,
            "TENFOLD_EDGE_ADDRESS_POINTS_PER_S": AMPLE,
            "TENFOLD_EDGE_RELOAD_S": "0.2",
            "TENFOLD_LOG_LEVEL": "warning",
            **settings,
        }
        edge = await stack.enter_async_context(_edge(environ))
        await _until_ready(f"http://{listen}")
        yield Scene(f"http://{listen}", edge, image, upstream, server)


@asynccontextmanager
async def _edge(environ: dict[str, str]) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge", env=environ,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        send_signal(process, signal.SIGKILL)
        await process.wait()


async def _until_ready(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client, asyncio.timeout(START_TIMEOUT_S):
        while True:
            try:
                if (await client.get("/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Overload:
    """What was seen around an overload.

    Attributes:
        peak_per_s: answers a second when callers wait for each other.
        before: at half of that.
        during: at five times that.
        served_per_s: good answers a second during it.
        after: at half again, ten seconds later.
    """

    peak_per_s: float
    before: Shots
    during: Shots
    served_per_s: float
    after: Shots

    @property
    def goodput(self) -> float:
        """Good answers under overload, over those at the peak."""
        return self.served_per_s / self.peak_per_s


async def overload(*, measure_s: float, seconds: float, pause_s: float) -> Overload:
    """Five times what the server can do, from callers who do not wait."""
    async with scene() as set_up:
        peak = await _peak_per_s(set_up.url, measure_s)
        before = await fire(set_up.url, steadily({TOIL: peak / 2}, measure_s))
        during = await fire(set_up.url, steadily({TOIL: 5 * peak}, seconds))
        await asyncio.sleep(pause_s)
        after = await fire(set_up.url, steadily({TOIL: peak / 2}, measure_s))
    # A call that ends after the last one was sent is not of these seconds.
    good = [s for s in during.with_status(200).shots if s.due_s + s.took_s <= seconds]
    return Overload(peak, before, during, len(good) / seconds, after)


async def _peak_per_s(url: str, seconds: float) -> float:
    """What eight callers get that wait for their answers; all but the first moments."""
    where = urlsplit(url)
    body = f'{{"workMs": {TOIL_MS}}}'.encode()
    toil = http_load.Request("POST", "/v1/toil", body=body)
    for duration_s in (1.0, seconds):
        load = await http_load.run_load(
            str(where.hostname),
            where.port or 80,
            lambda _: toil,
            connections=8,
            duration_s=duration_s,
        )
    return load.requests_per_s


@dataclass(frozen=True)
class Beside:
    """What others had: alone, and beside what shall not disturb them."""

    alone: Shots
    beside: Shots
    disturbing: Shots

    @property
    def ratio(self) -> float:
        """Their slowest hundredth beside it, over alone."""
        return self.beside.slowest_s() / self.alone.slowest_s()


async def slow_method(*, seconds: float, takes_s: float, per_s: float = 100) -> Beside:
    """One method hangs, and is asked for more than its part holds."""
    slow = Request.of("slow", "GET", f"/v1/wait?workMs={round(takes_s * 1000)}")
    async with scene(TENFOLD_EDGE_UPSTREAM_CALLS_MAX="200") as set_up:
        await fire(set_up.url, steadily({LOOK: per_s}, 1.0))
        alone = await fire(set_up.url, steadily({LOOK: per_s}, seconds / 2))
        plan = steadily({slow: 200 / takes_s}, seconds) + steadily({LOOK: per_s}, seconds)
        mixed = await fire(set_up.url, sorted(plan, key=lambda entry: entry[0]))
        after = await fire(set_up.url, steadily({LOOK: per_s}, seconds / 2))
    alone = Shots(alone.shots + after.shots)  # the machine may have other things to do, too
    return Beside(alone, mixed.of("look"), mixed.of("slow"))


async def greedy_caller(*, seconds: float, slice_s: float = 2.0, per_s: float = 20) -> Beside:
    """One caller asks ten times what its quota allows; another is counted apart.

    The greedy one comes and goes, so that both have the same of what else the machine does.
    """
    greedy = Request.of("greedy", "GET", "/v1/look", x_forwarded_for="192.0.2.1")
    polite = Request.of("polite", "GET", "/v1/look", x_forwarded_for="198.51.100.1")
    slices = round(seconds / slice_s)
    async with scene(
        TENFOLD_EDGE_TRUSTED_HOPS="1",
        TENFOLD_EDGE_API_POINTS_PER_S=str(2 * per_s),
        TENFOLD_EDGE_API_BURST_POINTS=str(round(2 * per_s)),
    ) as set_up:
        plan = steadily({polite: per_s}, 2 * slices * slice_s)
        for number in range(slices):
            plan += steadily({greedy: 20 * per_s}, slice_s, since_s=(2 * number + 1) * slice_s)
        shots = await fire(set_up.url, sorted(plan, key=lambda entry: entry[0]))
    heard: tuple[list[Shot], list[Shot]] = [], []
    for shot in shots.of("polite").shots:
        heard[int(shot.due_s / slice_s) % 2].append(shot)
    return Beside(Shots(heard[0]), Shots(heard[1]), shots.of("greedy"))


@dataclass(frozen=True)
class Changed:
    """What callers met while everything behind them changed."""

    shots: Shots
    reloads: int
    restarts: int


async def changes_under_load(*, seconds: float, every_s: float, per_s: float = 100) -> Changed:
    """Contracts change and the server is replaced, again and again."""
    async with scene() as set_up, AsyncExitStack() as stack:
        shooting = asyncio.create_task(fire(set_up.url, steadily({LOOK: per_s}, seconds)))
        server, rounds = set_up.server, 0
        while not shooting.done():
            await asyncio.sleep(every_s)
            rounds += 1
            await asyncio.to_thread(_grow, set_up.image, rounds)
            # The next one listens beside it before it is told to go.
            fresh = await stack.enter_async_context(worker(set_up.image, set_up.upstream))
            send_signal(server, signal.SIGTERM)
            await server.wait()
            server = fresh
        return Changed(await shooting, rounds, rounds)


def _grow(image: Path, fields: int) -> None:
    """Write a contract with one field more, in one step."""
    grown = "".join(f"string note{number} = {number + 10};" for number in range(fields))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        text = WORKS.replace("int32 process_id = 2;", f"int32 process_id = 2; {grown}")
        (source / "works.proto").write_text(text)
        fresh = image.with_suffix(".new")
        fresh.write_bytes(compile_protos(source, Path(folder)).SerializeToString())
        fresh.replace(image)
