"""A service that does what its caller's metadata asks, on our server and on a stranger's.

    python -m tests.integration.shared.rpc.echo KIND ADDRESS

serves until it is killed, and prints its port.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import BytesValue

from shared.config import RPC_ENGINES
from shared.errors import NotFound, TenfoldError, Unavailable
from shared.identity import IdentityVerifier
from shared.lifecycle import Registration
from shared.rpc.context import Context
from shared.rpc.engine import EngineLimits
from shared.rpc.policy import Access, MethodPolicy
from shared.rpc.server import RpcServer, RpcServerConfig
from shared.rpc.status import status_of

SERVICE = "tests.Echo"
CALL, SAFE = f"/{SERVICE}/Call", f"/{SERVICE}/Safe"
POLICIES = {
    path: MethodPolicy(path, access=Access.PUBLIC, retry_safe=path == SAFE) for path in (CALL, SAFE)
}
STRANGER = "stranger"
KINDS = (*RPC_ENGINES, STRANGER)
MESSAGE_BYTES_MAX = 17 * 1024 * 1024

Metadata = dict[str, str | bytes]


@dataclass
class Echo:
    """What the calls asked for, by metadata.

    "sleep-s" waits; "wait" waits until cancelled; "fail" raises NotFound; "down" answers
    UNAVAILABLE, at most so often per value of "key".
    """

    seen: list[Metadata] = field(default_factory=list)
    left_s: list[float] = field(default_factory=list)
    tries: Counter[str | bytes] = field(default_factory=Counter)
    running: int = 0
    most: int = 0
    cancelled: int = 0
    trailing: tuple[tuple[str, str], ...] = ()

    async def answer(self, request: BytesValue, metadata: Metadata, left_s: float) -> BytesValue:
        self.seen.append(metadata)
        self.left_s.append(left_s)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._obey(metadata)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return request

    async def _obey(self, metadata: Metadata) -> None:
        key = metadata.get("key", "")
        self.tries[key] += 1
        if "sleep-s" in metadata:
            await asyncio.sleep(float(metadata["sleep-s"]))
        if "wait" in metadata:
            await asyncio.Event().wait()
        if "fail" in metadata:
            raise NotFound("no such echo: 100 % of “it”", metadata={"echo": "e"}, reason="NO_ECHO")
        if self.tries[key] <= int(metadata.get("down", 0)):
            raise Unavailable("down", retry_after_s=1.5)


class _Ours:
    def __init__(self, echo: Echo) -> None:
        self._echo = echo

    async def Call(self, request: BytesValue, context: Context) -> BytesValue:
        return await self._echo.answer(request, dict(context.metadata), context.remaining_s())

    Safe = Call


class _Stranger(_Ours):
    async def Call(self, request: BytesValue, context: Any) -> BytesValue:
        metadata = dict(context.invocation_metadata())
        binary = tuple((key, value) for key, value in metadata.items() if key.endswith("-bin"))
        await context.send_initial_metadata((*binary, ("began", "yes")))
        context.set_trailing_metadata((*binary, ("ended", "yes")))
        try:
            return await self._echo.answer(request, metadata, context.time_remaining())
        except TenfoldError as error:
            status = status_of(error)
            trailing = (*status.trailing_metadata, *self._echo.trailing)
            await context.abort(status.code, status.message, trailing)
            raise

    Safe = Call


def _add(handler: _Ours, server: Any) -> None:
    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(handler, name), BytesValue.FromString, BytesValue.SerializeToString
        )
        for name in ("Call", "Safe")
    }
    server.add_registered_method_handlers(SERVICE, methods)


@dataclass
class Served:
    """A running server."""

    echo: Echo
    address: str
    port: int
    set_serving: Callable[[bool], None]
    stop: Callable[[float], Coroutine[Any, Any, None]]


async def serve(kind: str, address: str = "127.0.0.1:0", **limits: Any) -> Served:
    """Start a server; `stop` ends it gracefully."""
    if kind == STRANGER:
        return await _serve_stranger(address)
    echo = Echo()
    server = RpcServer(
        address=address,
        verifier=IdentityVerifier({}),
        config=RpcServerConfig(
            engine=kind,
            calls_max=6000,
            logs_requests=False,
            limits=EngineLimits(
                receive_bytes_max=MESSAGE_BYTES_MAX,
                **{"connection_age_s": 0, **limits},
            ),
        ),
        policies=POLICIES,
    )
    server.add(Registration(_add, _Ours(echo)))
    port = await server.start()
    server.set_serving("", True)
    host = address.rpartition(":")[0]
    return Served(
        echo,
        f"{host}:{port}",
        port,
        lambda is_serving: server.set_serving("", is_serving),
        server.stop,
    )


async def _serve_stranger(address: str) -> Served:
    echo = Echo()
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_metadata_size", 100_000),
            ("grpc.absolute_max_metadata_size", 100_000),
            ("grpc.so_reuseport", 0),
            ("grpc.server.max_pending_requests", 20_000),
        ]
    )
    _add(_Stranger(echo), server)
    port = server.add_insecure_port(address)
    await server.start()
    host = address.rpartition(":")[0]
    return Served(echo, f"{host}:{port}", port, lambda _: None, server.stop)


@asynccontextmanager
async def served(kind: str, address: str = "127.0.0.1:0", **limits: Any) -> AsyncIterator[Served]:
    server = await serve(kind, address, **limits)
    try:
        yield server
    finally:
        await server.stop(0)


@asynccontextmanager
async def child(kind: str, address: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The same in a process of its own, which is ready, and killed in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.integration.shared.rpc.echo", kind, address,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 30), "it does not start"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def main(kind: str, address: str) -> None:
    server = await serve(kind, address)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
