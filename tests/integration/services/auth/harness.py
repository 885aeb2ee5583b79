"""The auth service in this process behind a real gRPC server, and callers to it."""

import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.auth.v1 import auth_service_pb2_grpc as auth_grpc

from services.auth.wiring import open_service
from shared.clock import Clock
from shared.config import ProcessConfig, load
from shared.identity import (
    DEFAULT_TENANT,
    IDENTITY_METADATA_KEY,
    AccessTokenVerifier,
    IdentitySigner,
    IdentityVerifier,
    Principal,
    PrincipalKind,
    RevocationList,
)
from shared.rpc.client import Channels, Upstreams
from shared.rpc.server import RpcServer
from shared.runtime import Runtime, open_runtime
from shared.spawner import Spawner
from tests.engine import CONFIG

PASSWORD = "a long and unlikely sentence"


def write_keys(data: Path, issuers: Iterable[str] = ("edge", "services")) -> None:
    """Identity keys and the secret, as a launcher makes them."""
    identity = data / "identity"
    identity.mkdir(parents=True, exist_ok=True)
    for issuer in issuers:
        key = Ed25519PrivateKey.generate()
        (identity / f"{issuer}.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        (identity / f"{issuer}.pub").write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
    (data / "secret").write_bytes(secrets.token_bytes(32))


def new_email() -> str:
    return f"user-{secrets.token_hex(8)}@example.org"


@dataclass
class Auth:
    """The running service, and the edge's side of a call to it."""

    port: int
    data: Path
    clock: Clock
    channels: Channels
    edge: IdentitySigner
    revocations: RevocationList

    def stub(self, make: Callable[[Any], Any]) -> Any:
        return make(self.channels.channel("tenfold.auth.v1"))

    @property
    def identities(self) -> Any:
        return self.stub(auth_grpc.IdentityServiceStub)

    @property
    def sessions(self) -> Any:
        return self.stub(auth_grpc.SessionServiceStub)

    @property
    def tokens(self) -> Any:
        return self.stub(auth_grpc.TokenServiceStub)

    @property
    def keys(self) -> Any:
        return self.stub(auth_grpc.ApiKeyServiceStub)

    def as_(self, principal: Principal) -> list[tuple[str, str]]:
        """Metadata of a call by this principal."""
        return [(IDENTITY_METADATA_KEY, self.edge.token_for(principal))]

    def public(self, tenant: str = DEFAULT_TENANT) -> list[tuple[str, str]]:
        return self.as_(Principal(PrincipalKind.PUBLIC, "", tenant))

    async def verifier(self) -> AccessTokenVerifier:
        """What an edge makes of the published keys."""
        jwks = await self.tokens.GetJwks(auth.GetJwksRequest())
        keys = [{"kty": k.kty, "alg": k.alg, "kid": k.kid, "n": k.n, "e": k.e} for k in jwks.keys]
        return AccessTokenVerifier(keys, revocations=self.revocations, clock=self.clock)

    async def sign_up(self, email: str, *, key: str = "", **fields: str) -> auth.SignUpReceipt:
        request = auth.SignUpRequest(
            email=email, request_id=key or email, **{"password": PASSWORD, **fields}
        )
        return await self.identities.SignUp(request, metadata=self.public())

    async def log_in(self, email: str, password: str = PASSWORD) -> auth.CreateSessionResponse:
        request = auth.CreateSessionRequest(email=email, password=password)
        return await self.sessions.CreateSession(request, metadata=self.public())

    async def refresh(self, token: str, tenant: str = DEFAULT_TENANT) -> auth.Tokens:
        request = auth.RefreshSessionRequest(refresh_token=token)
        return await self.sessions.RefreshSession(request, metadata=self.public(tenant))

    async def new_user(self) -> tuple[auth.CreateSessionResponse, Principal]:
        """A signed-in user: the log-in's answer, and the principal that its token gives."""
        email = new_email()
        await self.sign_up(email)
        session = await self.log_in(email)
        return session, (await self.verifier()).verify(session.tokens.access_token)


@asynccontextmanager
async def running_auth(
    data: Path, nats_url: str, clock: Clock, environ: Mapping[str, str] | None = None
) -> AsyncIterator[Auth]:
    """Auth with its own data folder, keys made if missing."""
    from dataclasses import replace

    if not (data / "secret").exists():
        write_keys(data)
    settings = {"TENFOLD_DATA": str(data), "TENFOLD_NATS_URL": nats_url, **(environ or {})}
    config = load(ProcessConfig, "TENFOLD_", settings)
    trust = {path.stem: path.read_bytes() for path in (data / "identity").glob("*.pub")}
    revocations = RevocationList(clock=clock)
    server = RpcServer(
        address="127.0.0.1:0",
        verifier=IdentityVerifier(trust, revocations=revocations),
        config=CONFIG,
    )
    spawner = Spawner.start()
    edge = IdentitySigner("edge", (data / "identity" / "edge.pem").read_bytes())
    opened: Any = open_runtime(
        config,
        settings,
        name="auth-test",
        spawner=spawner,
        revocations=revocations,
        set_serving=server.set_serving,
    )
    try:
        async with opened as runtime, _opened(replace(runtime, clock=clock)) as service:
            for registration in service.registrations:
                server.add(registration)
            port = await server.start()
            server.set_serving("", True)
            async with _running(service):
                channels = Channels(Upstreams({"*": f"127.0.0.1:{port}"}), edge)
                try:
                    yield Auth(port, data, clock, channels, edge, revocations)
                finally:
                    await channels.close()
                    await server.stop(1)
    finally:
        spawner.close()


@asynccontextmanager
async def _opened(runtime: Runtime) -> AsyncIterator[Any]:
    async with open_service(runtime) as service:
        yield service


@asynccontextmanager
async def _running(service: Any) -> AsyncIterator[None]:
    import asyncio

    tasks = [asyncio.create_task(loop()) for loop in service.loops]
    try:
        yield
    finally:
        ended = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in ended:
            raise AssertionError("a loop of the service ended") from task.exception()


os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
