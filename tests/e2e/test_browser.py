"""A real browser against a real mesh: a page with generated TypeScript clients, and /docs.

The page is another origin than the edge's, so every call of it passes CORS. What it does
stands in connect_web/page.ts; here is what must come of it.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from tests.browser import Visit, open_browser, visit
from tests.mesh import ROOT, Mesh, poll_until, running_mesh

SOURCE = Path(__file__).parent / "connect_web"
IMAGE = ROOT / "proto" / "gen" / "tenfold" / "contracts.binpb"
NODE_MAJOR_MIN = 20  # what protoc-gen-es asks for
# What npm says when it cannot reach a registry at all.
UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")
INDEX = '<!doctype html><title>A shop</title><link rel="icon" href="data:,">'
INDEX += '<script type="module" src="page.js"></script>'


def has_node() -> bool:
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        return False
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True)
    return int(version.stdout.removeprefix("v").partition(".")[0]) >= NODE_MAJOR_MIN


def run(*command: str | Path, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        pytest.skip("not run: no npm registry")
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"


def generate_stubs(folder: Path) -> None:
    """TypeScript of every contract, and of the details that errors carry."""
    image = FileDescriptorSet.FromString(IMAGE.read_bytes())
    contracts = [f.name for f in image.file if not f.name.startswith("google/protobuf/")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "--es_out=gen", "--es_opt=target=ts"]
    protoc += ["--plugin=protoc-gen-es=node_modules/.bin/protoc-gen-es"]
    (folder / "gen").mkdir()
    run(*protoc, f"--descriptor_set_in={IMAGE}", *contracts, folder=folder)
    details = "google/rpc/error_details.proto"
    run(*protoc, f"-I{sysconfig.get_paths()['purelib']}", details, folder=folder)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The origin of a static site, on loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    async with open_browser(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Another web site than the edge's, and the folder with its files."""
    public = tmp_path_factory.mktemp("site")
    with served(public) as url:
        yield url, public


@pytest.fixture(scope="module")
def mesh(origin: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh whose edge lets that site in."""
    environ = {**os.environ, "TENFOLD_EDGE_CORS_ORIGINS": origin[0]}
    with running_mesh(tmp_path_factory.mktemp("mesh") / "data", environ=environ) as running:
        yield running


@pytest.fixture(scope="module")
async def shop(
    browser: Any, origin: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Visit]:
    """The page as its user would build it (npm, protoc, a type check, one bundle), open."""
    if not has_node():
        pytest.skip(f"not run: no node ({NODE_MAJOR_MIN} or newer, with npm)")
    url, public = origin
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(SOURCE, folder, dirs_exist_ok=True)
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", folder=folder)
    generate_stubs(folder)
    run("node_modules/.bin/tsc", folder=folder)
    esbuild = ["node_modules/.bin/esbuild", "page.ts", "--bundle", "--format=esm"]
    run(*esbuild, f"--outfile={public / 'page.js'}", folder=folder)
    (public / "index.html").write_text(INDEX)
    async with visit(browser, url) as page:
        yield page


@pytest.fixture
def settings(mesh: Mesh, sign_in: Callable[[Mesh], str]) -> dict[str, Any]:
    """A new user's, for the page's functions."""
    return {"edge": mesh.edge_url, "token": sign_in(mesh), "binary": False}


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
async def test_unary_calls(shop, settings, binary):
    told = await shop.call("calls.account", {**settings, "binary": binary})
    content_type = "application/proto" if binary else "application/json"
    assert told["name"].startswith("accounts/")
    assert told["displayName"] == "Späti ☕"
    assert told["availableIs"] == "bigint"
    assert told["repeated"] == told["name"]
    assert told["types"] == [content_type] * 3 + ["true"]


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
async def test_errors_come_with_their_details_unpacked(shop, settings, binary):
    told = await shop.call("calls.refusals", {**settings, "binary": binary})
    assert told["poor"]["code"] == "FailedPrecondition"
    assert told["poor"]["reason"] == "INSUFFICIENT_FUNDS"
    assert told["nothing"]["code"] == "InvalidArgument"
    assert told["nothing"]["fields"] == ["amount"]
    assert told["nobody"]["code"] == "NotFound"
    assert (told["anonymous"]["code"], told["anonymous"]["reason"]) == (
        "Unauthenticated",
        "CREDENTIAL_MISSING",
    )


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
async def test_a_stream_tells_what_happens_and_leaving_it_ends_the_call(
    shop, mesh, settings, binary
):
    settings = {**settings, "binary": binary}
    bearer = {"Authorization": f"Bearer {settings['token']}"}
    poll_until(
        lambda: mesh.get("/v1/inbox/items", headers=bearer).json()["items"],
        timeout_s=30,
        what="the notice that says welcome",
    )
    opened = await shop.call("calls.watch", settings)
    assert await shop.call("calls.readNewest", settings) == {
        "name": mesh.get("/v1/inbox/items", headers=bearer).json()["items"][0]["name"],
        "unread": "0",
    }
    assert calls_ended(mesh, opened["requestId"]) == []
    assert (await shop.call("calls.leave"))["code"] == "Canceled"
    ended = poll_until(
        lambda: calls_ended(mesh, opened["requestId"]), timeout_s=10, what="the end of the call"
    )
    assert [call["code"] for call in ended] == ["CANCELLED"]


def calls_ended(mesh: Mesh, request_id: str) -> list[dict[str, Any]]:
    """The services' log lines of a request: one for each call, written when it ends."""
    lines = (mesh.data / "logs" / "services.log").read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if request_id in line and '"handled"' in line]


async def test_the_edge_keeps_a_deadline(shop, settings):
    assert (await shop.call("calls.deadline", settings))["code"] == "DeadlineExceeded"


async def test_the_reference_shows_every_call_and_asks_no_other_host(mesh, browser):
    async with visit(browser, f"{mesh.edge_url}/docs") as reference:
        page = reference.page
        await page.wait_for_selector(".opblock")
        document = mesh.get("/openapi.json").json()
        calls = sum(len(path) for path in document["paths"].values())
        assert await page.locator(".opblock").count() == calls
        assert await page.locator(".opblock-tag").count() == len(document["tags"])
        keys = page.locator(".opblock", has_text="/.well-known/jwks.json")
        await keys.locator(".opblock-summary-control").click()
        await keys.get_by_text("Try it out").click()
        await keys.get_by_text("Execute", exact=True).click()
        answer = keys.locator(".live-responses-table .response .microlight").first
        await answer.wait_for()
        assert '"RS256"' in await answer.inner_text()
        assert reference.complaints == []
        assert reference.hosts == {mesh.edge_url.removeprefix("http://")}


async def test_the_shop_talks_to_nobody_but_the_edge(shop, mesh, origin):
    hosts = {url.removeprefix("http://") for url in (mesh.edge_url, origin[0])}
    assert shop.hosts <= hosts
