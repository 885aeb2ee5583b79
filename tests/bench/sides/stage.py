"""Every side that `make bench-edge` measures, started the way its users start it."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx

from deploy.local import servers
from deploy.local.address import free_addresses
from tests.bench.sides import auth, envoy, samples
from tests.bench.sides.children import BESIDE, PEERS, Child, module, running
from tests.bench.sides.contract import compile_contract, strangers
from tests.bench.sides.hs256 import Caller, token_of
from tests.bench.sides.looks import Side
from tests.mesh import poll_until, running_program

ENVOY = PEERS / "envoy" / "_bin" / "envoy"
READY_TIMEOUT_S = 20.0
# Quotas are decided, and counted, but never used up.
PLENTY = {
    "TENFOLD_EDGE_API_POINTS_PER_S": "1000000",
    "TENFOLD_EDGE_API_BURST_POINTS": "1000000",
    "TENFOLD_EDGE_TENANT_POINTS_PER_S": "1000000",
    "TENFOLD_EDGE_TENANT_BURST_POINTS": "1000000",
    "TENFOLD_EDGE_ADDRESS_POINTS_PER_S": "1000000",
}


class Stage:
    """Starts sides and what they need, in a folder; all of it ends with the stack.

    Attributes:
        descriptors: of shop.proto, for whoever transcodes.
        responder: the backend of `bare`, `full` and Envoy.
    """

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self.descriptors = compile_contract(folder)
        self._valkey_url = self._start_valkey()
        generated = {"PYTHONPATH": str(folder)}
        self.responder = self._run("responder", environ=generated)
        self._auth = self._run("auth", str(folder))

    def bare(self, name: str = "bare", route_count: int = 2, workers: int = 1) -> Side:
        """The command that puts our edge in front of a stranger's server; it logs no requests."""
        [address] = free_addresses(1)
        contract = strangers(self.descriptors, route_count)
        upstream = f"127.0.0.1:{self.responder.port}"
        command = module("deploy.cli", "edge", "--allow-anonymous", "--upstream", upstream)
        command += ["--listen", str(address), "--descriptors", str(contract)]
        command += ["--workers", str(workers)]
        environ = {**PLENTY, "TENFOLD_LOG_LEVEL": "warning"}
        edge = self._start(command, f"edge-{name}", port=address.port, environ=environ)
        return Side(name, (edge,), samples.http_request)

    def full(self) -> Side:
        """Our edge as in a mesh: credential, authorization, quota in Valkey, log line, all on."""
        return Side("full", (self._mesh_edge("full", self.responder),), self._request)

    def whole_path(self, engine: str) -> Side:
        """The same in front of a service process of ours."""
        name = f"whole path, {engine}"
        environ = {"PYTHONPATH": str(self._folder), "TENFOLD_RPC_ENGINE": engine}
        command = module("tests.bench.sides.service", str(self._folder))
        service = self._start(command, f"service-{engine}", environ=environ)
        return Side(name, (self._mesh_edge(name, service), service), self._request)

    def envoy(self) -> Side:
        """Envoy in front of the same backend."""
        [address] = free_addresses(1)
        command = envoy.command(
            self._folder,
            ENVOY,
            descriptors=strangers(self.descriptors),
            port=address.port,
            upstream=self.responder.port,
        )
        child = self._start(command, "envoy", port=address.port)
        return Side("Envoy", (child,), samples.http_request)

    def fastapi(self) -> Side:
        """One FastAPI process, and no mesh."""
        [address] = free_addresses(1)
        secret = os.urandom(32).hex()
        caller = Caller(auth.SUBJECT, frozenset(auth.SCOPES.split()))
        command = module(
            "tests.bench.sides.fastapi_app", str(address.port), secret, self._valkey_url
        )
        environ = {"PYTHONPATH": str(PEERS)}
        child = self._start(command, "fastapi", port=address.port, environ=environ)
        token = token_of(secret.encode(), caller)
        return Side("FastAPI", (child,), lambda method: samples.http_request(method, bearer=token))

    def _mesh_edge(self, name: str, shop: Child) -> Child:
        [address] = free_addresses(1)
        environ = {
            **PLENTY,
            "TENFOLD_EDGE_LISTEN": str(address),
            "TENFOLD_EDGE_DESCRIPTORS": str(self.descriptors),
            "TENFOLD_IDENTITY_FOLDER": str(self._folder),
            "TENFOLD_UPSTREAMS": (
                f"shop=127.0.0.1:{shop.port},tenfold=127.0.0.1:{self._auth.port}"
            ),
            "TENFOLD_VALKEY_URL": self._valkey_url,
        }
        edge = self._start(module("edge"), f"edge-{name}", port=address.port, environ=environ)
        _wait_until_ready(edge.port)
        return edge

    def _start_valkey(self) -> str:
        [address] = free_addresses(1)
        token = servers.new_token()
        program = servers.valkey_program(self._folder, address, token=token, environ=os.environ)
        self._stack.enter_context(running_program(program, self._folder))
        return servers.valkey_url(address, token)

    def _run(self, name: str, *arguments: str, environ: dict[str, str] | None = None) -> Child:
        command = module(f"tests.bench.sides.{name}", *arguments)
        log = self._folder / f"{name}.log"
        return self._stack.enter_context(running(command, log, environ=environ, cores=BESIDE))

    def _start(
        self, command: list[str], name: str, *, port: int = 0, environ: dict[str, str] | None = None
    ) -> Child:
        log = self._folder / f"{name}.log"
        return self._stack.enter_context(running(command, log, port=port, environ=environ))

    def _request(self, method: str) -> bytes:
        token = (self._folder / auth.TOKEN_FILE).read_text()
        return samples.http_request(method, bearer=token)


def _wait_until_ready(port: int) -> None:
    url = f"http://127.0.0.1:{port}/readyz"
    poll_until(
        lambda: httpx.get(url).status_code == 200,
        timeout_s=READY_TIMEOUT_S,
        what=f"readiness of {url}",
    )


def versions() -> str:
    """Of both sides' parts, for a reader of the figures."""
    from importlib.metadata import distributions

    of_peers = {each.name: each.version for each in distributions(path=[str(PEERS)])}
    ours = {each.name: each.version for each in distributions()}
    shown = [f"Python {sys.version.split()[0]}", f"Envoy {envoy.version(ENVOY)}"]
    shown += [f"{n} {of_peers[n]}" for n in ("fastapi", "starlette", "pydantic", "uvicorn")]
    shown += [f"{name} {ours[name]}" for name in ("uvloop", "httptools", "redis", "hiredis")]
    return ", ".join(shown)
