"""CPU of one unary call on each engine: our server over the engine bare, alternating in one run.

All serve the same method of our contract with the same messages. Ours also verifies the caller's
identity and permission, validates the request, sets deadlines and writes a log line; the bare
servers, grpc.aio's and pygrpc-native's, do nothing of that. Servers are children; the first rows
count the server alone, the others our channel over a bare one as well.

    python -m tests.bench.bench_rpc [CALLS]
"""

import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import pygrpc_native.aio
from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.auth.v1 import auth_service_pb2_grpc as auth_grpc

from shared.identity import (
    IDENTITY_METADATA_KEY,
    IdentitySigner,
    IdentityVerifier,
    Principal,
    PrincipalKind,
)
from shared.lifecycle import Registration
from shared.rpc.client import Channels, Upstreams
from shared.rpc.server import RpcServer, RpcServerConfig
from shared.signals import send_signal
from tests.integration.shared.rpc.harness import key_pair

CALLS = 6000
AT_ONCE = 32
ROUNDS = 7
AIMS = {"grpcio": 1.3, "native": 1.8}
SESSIONS = "tenfold.auth.v1.SessionService"
USER = Principal(
    PrincipalKind.USER,
    "01890000-0000-7000-8000-000000000001",
    scopes=frozenset({"auth.sessions.read"}),
    credential="01890000-0000-7000-8000-000000000002",
)


class Handler(auth_grpc.SessionServiceServicer):
    async def ListSessions(self, request: Any, context: Any) -> auth.ListSessionsResponse:
        return auth.ListSessionsResponse(next_page_token="next")


async def serve_bare(engine: str) -> None:
    server = grpc.aio.server() if engine == "grpcio" else pygrpc_native.aio.server()
    auth_grpc.add_SessionServiceServicer_to_server(Handler(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(port)
    await asyncio.Event().wait()


async def serve_ours(engine: str, public_key_hex: str) -> None:
    verifier = IdentityVerifier({"edge": bytes.fromhex(public_key_hex)})
    config = RpcServerConfig(engine=engine)
    server = RpcServer(address="127.0.0.1:0", verifier=verifier, config=config)
    server.add(Registration(auth_grpc.add_SessionServiceServicer_to_server, Handler()))
    port = await server.start()
    server.set_serving("", True)
    announce(port)
    await asyncio.Event().wait()


def announce(port: int) -> None:
    sys.stderr.write(f"{port}\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Cost:
    """CPU microseconds per call."""

    server: float
    client: float

    @property
    def both(self) -> float:
        return self.server + self.client


@dataclass
class Side:
    """A server in a child, and how to call it."""

    child: asyncio.subprocess.Process
    call: Callable[[], Awaitable[Any]]

    async def cost(self, calls: int) -> Cost:
        server_s, client_s = cpu_s(self.child.pid), time.process_time()
        left = iter(range(calls))

        async def caller() -> None:
            for _ in left:
                await self.call()

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        server_s, client_s = cpu_s(self.child.pid) - server_s, time.process_time() - client_s
        return Cost(server_s / calls * 1e6, client_s / calls * 1e6)


def cpu_s(pid: int) -> float:
    """CPU of all threads of a process so far, to the nanosecond."""
    threads = os.listdir(f"/proc/{pid}/task")
    texts = (Path(f"/proc/{pid}/task/{thread}/schedstat").read_text() for thread in threads)
    return sum(int(text.split()[0]) for text in texts) / 1e9


async def start(*arguments: str) -> tuple[asyncio.subprocess.Process, int]:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.bench.bench_rpc",
        *arguments,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert child.stderr is not None
    return child, int(await asyncio.wait_for(child.stderr.readline(), 30))


REQUEST = auth.ListSessionsRequest(page_size=20)


async def open_bare(engine: str, stack: AsyncExitStack) -> Side:
    child, port = await start("serve-bare", engine)
    stack.push_async_callback(end, child)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
    stub: Any = auth_grpc.SessionServiceStub(channel)
    return Side(child, lambda: stub.ListSessions(REQUEST, timeout=10))


async def open_ours(engine: str, stack: AsyncExitStack) -> Side:
    private, public = key_pair()
    child, port = await start("serve-ours", engine, public.hex())
    stack.push_async_callback(end, child)
    signer = IdentitySigner("edge", private)
    channels = Channels(Upstreams({"*": f"127.0.0.1:{port}"}), signer)
    stack.push_async_callback(channels.close)
    stub: Any = auth_grpc.SessionServiceStub(channels.channel(SESSIONS))  # type: ignore[no-untyped-call]

    def call() -> Awaitable[Any]:
        metadata = [(IDENTITY_METADATA_KEY, signer.token_for(USER))]
        return cast("Awaitable[Any]", stub.ListSessions(REQUEST, metadata=metadata))

    return Side(child, call)


async def end(child: asyncio.subprocess.Process) -> None:
    send_signal(child, signal.SIGKILL)
    await child.wait()


Round = dict[tuple[str, str], Cost]


async def measure(calls: int) -> list[Round]:
    """The rounds, without a first one that warms everything up."""
    async with AsyncExitStack() as stack:
        sides = {}
        for engine in AIMS:
            sides["ours", engine] = await open_ours(engine, stack)
            sides["bare", engine] = await open_bare(engine, stack)
        rounds = [
            {name: await side.cost(calls) for name, side in sides.items()}
            for _ in range(ROUNDS + 1)
        ]
    return rounds[1:]


def report(rounds: list[Round]) -> dict[str, object]:
    rows = []
    for engine, aim in AIMS.items():
        ours, bare = ("ours", engine), ("bare", engine)
        rows.append(row(rounds, engine, f"server (aim {aim} x bare)", "server", ours, bare))
        rows.append(row(rounds, engine, "client and server", "both", ours, bare))
    native, grpcio = ("ours", "native"), ("ours", "grpcio")
    rows.append(row(rounds, "native", "server, ours, over grpcio's", "server", native, grpcio))
    return {"bench": "rpc", "engine": " and ".join(AIMS), "rows": rows}


def row(
    rounds: list[Round],
    engine: str,
    what: str,
    part: str,
    ours: tuple[str, str],
    peer: tuple[str, str],
) -> dict[str, object]:
    pairs = [(getattr(one[ours], part), getattr(one[peer], part)) for one in rounds]
    return {
        "what": f"CPU per unary call, {what}",
        "engine": engine,
        "unit": "us",
        "ours": round(statistics.median(one for one, _ in pairs), 1),
        "peer": round(statistics.median(other for _, other in pairs), 1),
        "ratio": round(statistics.median(one / other for one, other in pairs), 3),
        "better": "lower",
    }


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve-bare"]:
        asyncio.run(serve_bare(arguments[1]))
    elif arguments[:1] == ["serve-ours"]:
        asyncio.run(serve_ours(*arguments[1:]))
    else:
        calls = int(arguments[0]) if arguments else CALLS
        print(json.dumps(report(asyncio.run(measure(calls)))))


if __name__ == "__main__":
    main()
