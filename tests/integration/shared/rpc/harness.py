"""A real server with small handlers of our own contracts, and callers to it."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.empty_pb2 import Empty
from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.auth.v1 import auth_service_pb2_grpc as auth_grpc

from shared.identity import (
    IDENTITY_METADATA_KEY,
    IdentitySigner,
    IdentityVerifier,
    Principal,
    PrincipalKind,
    RevocationList,
)
from shared.lifecycle import Registration
from shared.rpc.client import Channels, Upstreams
from shared.rpc.context import Context
from shared.rpc.server import RpcServer, RpcServerConfig

SESSIONS = "tenfold.auth.v1.SessionService"
only_on_grpcio = pytest.mark.parametrize("engine", ["grpcio"], indirect=True)
only_on_native = pytest.mark.parametrize("engine", ["native"], indirect=True)
SUBJECT = "01890000-0000-7000-8000-000000000001"
USER = Principal(
    PrincipalKind.USER,
    SUBJECT,
    scopes=frozenset({"auth.sessions.read", "auth.sessions.write"}),
    credential="01890000-0000-7000-8000-000000000002",
)


def key_pair() -> tuple[bytes, bytes]:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return private, public


@dataclass
class Sessions:
    """A SessionService whose methods do what a test tells them to."""

    on_list: Callable[[Context], Any] | None = None
    seen: list[Context] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def CreateSession(self, request: Any, context: Context) -> Any:
        self.seen.append(context)
        return auth.CreateSessionResponse()

    async def RefreshSession(self, request: Any, context: Context) -> Any:
        self.seen.append(context)
        return auth.Tokens()

    async def ListSessions(self, request: Any, context: Context) -> Any:
        self.seen.append(context)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.on_list is not None:
                answer = self.on_list(context)
                if asyncio.iscoroutine(answer):
                    answer = await answer
                if answer is not None:
                    return answer
            return auth.ListSessionsResponse()
        finally:
            self.running -= 1

    async def RevokeSession(self, request: Any, context: Context) -> Any:
        self.seen.append(context)
        return Empty()

    async def WatchRevocations(self, request: Any, context: Context) -> Any:
        self.seen.append(context)
        yield auth.WatchRevocationsResponse(caught_up=True)
        await asyncio.Event().wait()


@dataclass
class Harness:
    """A running server."""

    port: int
    server: RpcServer
    handler: Sessions
    edge: IdentitySigner
    services: IdentitySigner
    channels: Channels
    revocations: RevocationList

    @property
    def stub(self) -> Any:
        return auth_grpc.SessionServiceStub(self.channels.channel(SESSIONS))

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def as_(self, principal: Principal) -> list[tuple[str, str]]:
        return [(IDENTITY_METADATA_KEY, self.edge.token_for(principal))]

    async def list(self, principal: Principal = USER, **options: Any) -> Any:
        return await self.stub.ListSessions(
            auth.ListSessionsRequest(), metadata=self.as_(principal), **options
        )

    def raw_channel(self, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(
            self.target, options=[("grpc.use_local_subchannel_pool", 1), *options]
        )


@asynccontextmanager
async def serving(
    handler: Sessions | None = None,
    config: RpcServerConfig | None = None,
    others: Sequence[Registration] = (),
    **client: Any,
) -> AsyncIterator[Harness]:
    """A server on the engine of the test, and a client that signs as "services"."""
    handler = handler or Sessions()
    (edge_private, edge_public), (own_private, own_public) = key_pair(), key_pair()
    revocations = RevocationList()
    verifier = IdentityVerifier(
        {"edge": edge_public, "services": own_public}, revocations=revocations
    )
    config = replace(config or RpcServerConfig(), engine=os.environ["TENFOLD_RPC_ENGINE"])
    server = RpcServer(address="127.0.0.1:0", verifier=verifier, config=config)
    server.add(Registration(auth_grpc.add_SessionServiceServicer_to_server, handler))
    for registration in others:
        server.add(registration)
    port = await server.start()
    server.set_serving("", True)
    services = IdentitySigner("services", own_private)
    channels = Channels(Upstreams({"*": f"127.0.0.1:{port}"}), services, **client)
    edge = IdentitySigner("edge", edge_private)
    try:
        yield Harness(port, server, handler, edge, services, channels, revocations)
    finally:
        await channels.close()
        await server.stop(0)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
