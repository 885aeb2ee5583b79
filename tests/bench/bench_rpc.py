"""CPU of one unary call: our server and channel over bare grpc.aio, alternating in one run.

Both serve the same method of our contract with the same messages. Ours also verifies the
caller's identity and permission, validates the request, sets deadlines and writes a log line;
the bare ones do nothing of that. Servers are children; the CPU of both sides counts.

    python -m tests.bench.bench_rpc [CALLS]
"""

import asyncio
import json
import os
import signal
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
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
ROUNDS = 5
AIM = 1.3
SESSIONS = "tenfold.auth.v1.SessionService"
USER = Principal(
    PrincipalKind.USER,
    "01890000-0000-7000-8000-000000000001",
    scopes=frozenset({"auth.sessions.read"}),
    credential="01890000-0000-7000-8000-000000000002",
)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Handler(auth_grpc.SessionServiceServicer):
    async def ListSessions(self, request: Any, context: Any) -> auth.ListSessionsResponse:
        return auth.ListSessionsResponse(next_page_token="next")


async def serve_bare() -> None:
    server = grpc.aio.server()
    auth_grpc.add_SessionServiceServicer_to_server(Handler(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(port)
    await asyncio.Event().wait()


async def serve_ours(public_key_hex: str) -> None:
    verifier = IdentityVerifier({"edge": bytes.fromhex(public_key_hex)})
    config = RpcServerConfig(logs_requests=True)
    server = RpcServer(address="127.0.0.1:0", verifier=verifier, config=config)
    server.add(Registration(auth_grpc.add_SessionServiceServicer_to_server, Handler()))
    port = await server.start()
    server.set_serving("", True)
    announce(port)
    await asyncio.Event().wait()


def announce(port: int) -> None:
    sys.stderr.write(f"{port}\n")
    sys.stderr.flush()


@dataclass
class Side:
    """A server in a child, and how to call it."""

    name: str
    child: asyncio.subprocess.Process
    call: Callable[[], Awaitable[Any]]

    def cpu_s(self) -> float:
        """CPU of the child and of this process so far."""
        with open(f"/proc/{self.child.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        own = os.times()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S + own.user + own.system

    async def cpu_us_per_call(self, calls: int) -> float:
        before_s = self.cpu_s()
        left = iter(range(calls))

        async def caller() -> None:
            for _ in left:
                await self.call()

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        return (self.cpu_s() - before_s) / calls * 1e6


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


async def measure(calls: int) -> dict[str, object]:
    private, public = key_pair()
    bare_child, bare_port = await start("serve-bare")
    ours_child, ours_port = await start("serve-ours", public.hex())
    request = auth.ListSessionsRequest(page_size=20)
    signer = IdentitySigner("edge", private)
    channels = Channels(Upstreams({"*": f"127.0.0.1:{ours_port}"}), signer)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{bare_port}") as channel:
            bare_stub: Any = auth_grpc.SessionServiceStub(channel)
            ours_stub: Any = auth_grpc.SessionServiceStub(channels.channel(SESSIONS))  # type: ignore[no-untyped-call]
            bare = Side("bare", bare_child, lambda: bare_stub.ListSessions(request, timeout=10))
            ours = Side(
                "ours",
                ours_child,
                lambda: ours_stub.ListSessions(
                    request, metadata=[(IDENTITY_METADATA_KEY, signer.token_for(USER))]
                ),
            )
            return report([await one_round(bare, ours, calls) for _ in range(ROUNDS + 1)][1:])
    finally:
        await channels.close()
        for child in (bare_child, ours_child):
            send_signal(child, signal.SIGKILL)
            await child.wait()


async def one_round(bare: Side, ours: Side, calls: int) -> tuple[float, float]:
    return await ours.cpu_us_per_call(calls), await bare.cpu_us_per_call(calls)


def report(rounds: list[tuple[float, float]]) -> dict[str, object]:
    ours = statistics.median(one for one, _ in rounds)
    peer = statistics.median(other for _, other in rounds)
    ratio = statistics.median(one / other for one, other in rounds)
    return {
        "bench": "rpc",
        "engine": "grpcio",
        "rows": [
            {
                "what": f"CPU per unary call, client and server (aim {AIM} x bare grpc.aio)",
                "unit": "us",
                "ours": round(ours, 1),
                "peer": round(peer, 1),
                "ratio": round(ratio, 3),
                "better": "lower",
            }
        ],
    }


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve-bare"]:
        asyncio.run(serve_bare())
    elif arguments[:1] == ["serve-ours"]:
        asyncio.run(serve_ours(arguments[1]))
    else:
        calls = int(arguments[0]) if arguments else CALLS
        print(json.dumps(asyncio.run(measure(calls))))


if __name__ == "__main__":
    main()
