"""Stories of too much: each on a real edge and real servers, in processes of their own.

`make chaos` tells them at length and judges the figures; the tests tell them in a few seconds.
"""

import asyncio
import os
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from deploy.local.address import free_addresses
from deploy.local.processes import family
from shared.signals import send_signal
from tests.bench import http_load
from tests.integration.edge.behind import KNOWN, Behind, Tokens
from tests.integration.edge.quotas import PATIENT_S, valkey_of_its_own
from tests.integration.edge.worker import CONTRACT, worker, works_image
from tests.mesh import wait_until_gone
from tests.open_loop import Request, Shot, Shots, fire, steadily
from tests.protos import compile_protos

START_TIMEOUT_S = CHANGE_TIMEOUT_S = 30.0
TOIL_MS = 5
TOIL = Request.of("toil", "POST", "/v1/toil", {"workMs": TOIL_MS})
LOOK = Request.of("look", "GET", "/v1/look")
LABOUR = Request.of("labour", "POST", "/v1/toil", {"workMs": 1})
AMPLE = "1000000"
BURST = "50"  # what the dearest call of our contracts costs
WORKS = (CONTRACT / "works.proto").read_text()
EDGE_WORKERS = 2
# New connections that all must come to an edge of the newest contracts, to believe it of both.
IN_A_ROW = 8


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
        yield Scene(f"http://{listen}", edge, image, upstream, server)


@asynccontextmanager
async def _edge(environ: dict[str, str]) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge", env=environ, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        await _until_ready(f"http://{environ['TENFOLD_EDGE_LISTEN']}", process)
        yield process
    finally:
        marks = family(process.pid)
        send_signal(process, signal.SIGKILL)
        await process.wait()
        await asyncio.to_thread(wait_until_gone, marks)


async def _until_ready(url: str, process: Process) -> None:
    async with httpx.AsyncClient(base_url=url) as client, asyncio.timeout(START_TIMEOUT_S):
        while True:
            assert process.returncode is None, "it has ended, and said why"
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
    def names(self) -> list[str]:
        """The kinds of the others' requests."""
        return sorted({shot.name for shot in self.beside.shots})


async def slow_method(*, seconds: float, takes_s: float, per_s: float = 100) -> Beside:
    """One method hangs, and is asked for more than its part holds."""
    slow = Request.of("slow", "GET", f"/v1/wait?workMs={round(takes_s * 1000)}")
    others = {LOOK: per_s, LABOUR: per_s / 2}
    async with scene(TENFOLD_EDGE_UPSTREAM_CALLS_MAX="200") as set_up:
        await fire(set_up.url, steadily(others, 1.0))
        alone = await fire(set_up.url, steadily(others, seconds / 2))
        plan = steadily({slow: 200 / takes_s, **others}, seconds)
        mixed = await fire(set_up.url, plan)
        after = await fire(set_up.url, steadily(others, seconds / 2))
    alone = Shots(alone.shots + after.shots)  # the machine may have other things to do, too
    return Beside(alone, Shots(mixed.of("look").shots + mixed.of("labour").shots), mixed.of("slow"))


async def greedy_caller(*, seconds: float, slice_s: float = 2.0, per_s: float = 20) -> Beside:
    """One credential asks ten times what its quota allows; another is counted apart.

    The greedy one comes and goes, so that both have the same of what else the machine does.
    """
    slices = round(seconds / slice_s)
    async with _guarded_scene(points_per_s=2 * per_s) as (url, tokens):
        greedy, polite = (
            Request.of(name, "GET", f"/v1/{KNOWN}", authorization=f"Bearer {tokens.token()}")
            for name in ("greedy", "polite")
        )
        plan = steadily({polite: per_s}, 2 * slices * slice_s)
        for number in range(slices):
            plan += steadily({greedy: 20 * per_s}, slice_s, since_s=(2 * number + 1) * slice_s)
        shots = await fire(url, sorted(plan, key=lambda entry: entry[0]))
    heard: tuple[list[Shot], list[Shot]] = [], []
    for shot in shots.of("polite").shots:
        heard[int(shot.due_s / slice_s) % 2].append(shot)
    return Beside(Shots(heard[0]), Shots(heard[1]), shots.of("greedy"))


@asynccontextmanager
async def _guarded_scene(points_per_s: float) -> AsyncIterator[tuple[str, Tokens]]:
    """An edge that knows credentials, before our contracts; quotas are counted in Valkey."""
    behind, [listen] = Behind(), map(str, free_addresses(1))
    await behind.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(behind.stop)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "edge.pem").write_bytes(behind.identity_pem)
        environ = {
            "PATH": os.environ["PATH"],
            "TENFOLD_EDGE_LISTEN": listen,
            "TENFOLD_UPSTREAMS": f"*={behind.address}",
            "TENFOLD_IDENTITY_FOLDER": str(folder),
            "TENFOLD_VALKEY_URL": stack.enter_context(valkey_of_its_own(folder)).url,
            "TENFOLD_EDGE_QUOTA_TIMEOUT_S": str(PATIENT_S),
            "TENFOLD_EDGE_API_POINTS_PER_S": str(points_per_s),
            "TENFOLD_EDGE_API_BURST_POINTS": BURST,
            "TENFOLD_LOG_LEVEL": "warning",
        }
        await stack.enter_async_context(_edge(environ))
        yield f"http://{listen}", behind.tokens


class Change(StrEnum):
    """What happens to an edge of several workers, or behind it, while callers ask."""

    FILE = "the contracts' file changes"
    HANGUP = "the contracts' file changes, and SIGHUP says so"
    WORKERS = "SIGUSR2 replaces the workers"
    SERVER = "the server behind is replaced"
    KILL = "one of two servers behind is killed"


@dataclass(frozen=True)
class Changed:
    """What callers met, and how often things changed."""

    shots: Shots
    changes: int


async def changes_under_load(change: Change, *, seconds: float, per_s: float = 100) -> Changed:
    """The same thing happens again and again, as often as it has become true."""
    reload_s = "0" if change is Change.HANGUP else "0.1"
    settings = {"TENFOLD_EDGE_WORKERS": str(EDGE_WORKERS), "TENFOLD_EDGE_RELOAD_S": reload_s}
    async with scene(**settings) as set_up, AsyncExitStack() as stack:
        changing = _Changing(set_up, stack)
        shooting = asyncio.create_task(fire(set_up.url, steadily({LOOK: per_s}, seconds)))
        while not shooting.done():
            async with asyncio.timeout(CHANGE_TIMEOUT_S):
                await changing.make(change)
        return Changed(await shooting, changing.made)


class _Changing:
    """Makes changes, and waits until they have become true."""

    def __init__(self, set_up: Scene, stack: AsyncExitStack) -> None:
        self._scene, self._stack = set_up, stack
        self._server = set_up.server
        self.made = 0

    async def make(self, change: Change) -> None:
        match change:
            case Change.FILE | Change.HANGUP:
                await self._change_contracts(says_so=change is Change.HANGUP)
            case Change.WORKERS:
                await self._replace_workers()
            case Change.SERVER:
                await self._replace_server(signal.SIGTERM)
            case Change.KILL:
                await self._replace_server(signal.SIGKILL)
        self.made += 1

    async def _change_contracts(self, *, says_so: bool) -> None:
        await asyncio.to_thread(_grow, self._scene.image, self.made + 1)
        if says_so:
            send_signal(self._scene.edge, signal.SIGHUP)
        await self._until_answers(lambda done: f"note{self.made}" in done)

    async def _replace_workers(self) -> None:
        before = set(family(self._scene.edge.pid)[1:])
        while before & set(family(self._scene.edge.pid)):
            send_signal(self._scene.edge, signal.SIGUSR2)  # ignored while the last one is obeyed
            await asyncio.sleep(0.05)
        await _until_ready(self._scene.url, self._scene.edge)

    async def _replace_server(self, end: signal.Signals) -> None:
        """The next one listens beside it before it goes."""
        fresh = await self._stack.enter_async_context(
            worker(self._scene.image, self._scene.upstream)
        )
        send_signal(self._server, end)
        await self._server.wait()
        self._server = fresh
        await self._until_answers(lambda done: done["processId"] == fresh.pid)

    async def _until_answers(self, are_new: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until all of the edge answers like this: any worker may take a connection."""
        in_a_row = 0
        while in_a_row < IN_A_ROW:
            async with httpx.AsyncClient(base_url=self._scene.url) as client:
                is_new = are_new((await client.get("/v1/look")).json())
            in_a_row = in_a_row + 1 if is_new else 0


def _grow(image: Path, fields: int) -> None:
    """Write a contract with so many fields more, which break nobody, in one step."""
    grown = "".join(f"string note{number} = {number + 10};" for number in range(fields))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        text = WORKS.replace("int32 process_id = 2;", f"int32 process_id = 2; {grown}")
        (source / "works.proto").write_text(text)
        fresh = image.with_suffix(".new")
        fresh.write_bytes(compile_protos(source, Path(folder)).SerializeToString())
        fresh.replace(image)
