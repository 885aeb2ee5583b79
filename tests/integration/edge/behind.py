"""A small real mesh behind the edge: our RPC server, our contracts, a few lines per service."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from google.api import httpbody_pb2
from google.protobuf.empty_pb2 import Empty
from tenfold.auth.v1 import auth_pb2, auth_service_pb2, auth_service_pb2_grpc
from tenfold.ledger.v1 import ledger_pb2, ledger_service_pb2, ledger_service_pb2_grpc
from tenfold.media.v1 import media_pb2, media_service_pb2, media_service_pb2_grpc

from shared.errors import (
    FailedPrecondition,
    IdempotencyInFlight,
    IdempotencyKeyReused,
    NotFound,
    Unauthenticated,
)
from shared.identity import (
    ACCESS_TOKEN_AUDIENCE,
    ACCESS_TOKEN_ISSUER,
    ACCESS_TOKEN_TYPE,
    IdentitySigner,
    IdentityVerifier,
)
from shared.lifecycle import Registration
from shared.rpc.context import Context
from shared.rpc.policy import contract_policies
from shared.rpc.server import RpcServer
from tests.engine import CONFIG

KNOWN = "accounts/0197a000-0000-7000-8000-000000000001"
SCOPES = "ledger.read ledger.transfer ledger.accounts.write media.read media.upload"


class InsufficientFunds(FailedPrecondition):
    """The one business refusal of this ledger."""

    reason = "INSUFFICIENT_FUNDS"


class Ledger(ledger_service_pb2_grpc.LedgerServiceServicer):
    """Remembers what reached it."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.was_cut = asyncio.Event()
        self.transfers: dict[str, ledger_pb2.Transaction] = {}
        self.asked: dict[str, str] = {}  # by request id: the description
        self.running: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def GetAccount(self, request: Any, context: Context) -> Any:
        self.contexts.append(context)
        if request.name.endswith("slow"):
            try:
                await asyncio.sleep(30)
            finally:
                self.was_cut.set()
        if request.name.endswith("bug"):
            raise RuntimeError("secret of the house")
        if request.name.endswith("large"):
            return ledger_pb2.Account(name=request.name, owner="x" * 20_000)
        if request.name != KNOWN:
            raise NotFound("There is no such account.")
        return ledger_pb2.Account(
            name=request.name, owner=f"users/{context.principal.subject}", currency_code="EUR"
        )

    async def TransferFunds(self, request: Any, context: Context) -> Any:
        self.contexts.append(context)
        if request.amount.minor_units > 1_000_000:
            raise InsufficientFunds("There is not enough.", metadata={"available": "7"})
        first = self.asked.setdefault(request.request_id, request.description)
        if first != request.description:
            raise IdempotencyKeyReused("This key came with another request.")
        if request.request_id in self.transfers:
            context.mark_replayed()
            return self.transfers[request.request_id]
        if request.request_id in self.running:
            raise IdempotencyInFlight("The first one is still running.", retry_after_s=1)
        self.running.add(request.request_id)
        await self.gate.wait()
        made = ledger_pb2.Transaction(
            name=f"transactions/{uuid4()}", description=request.description
        )
        self.transfers[request.request_id] = made
        return made


class Videos(media_service_pb2_grpc.VideoServiceServicer):
    """Streams progress; counts the streams it holds open."""

    def __init__(self) -> None:
        self.open_streams = 0
        self.sent = 0
        self.cursors: list[str] = []

    async def WatchVideo(self, request: Any, context: Context) -> AsyncIterator[Any]:
        kind = request.name.removeprefix("videos/")
        if kind == "absent":
            raise NotFound("There is no such video.")
        self.open_streams += 1
        try:
            for percent in range(3):
                yield self._step(request.name, percent)
            if kind == "breaks":
                raise InsufficientFunds("It broke half way.")
            if kind == "endless":
                await asyncio.Event().wait()
            if kind == "flood":
                while True:
                    yield self._step(request.name + "x" * 50_000, 50)
        finally:
            self.open_streams -= 1

    async def GetVideoFile(self, requests: Any, context: Context) -> AsyncIterator[Any]:
        """As long as the file's name says, with the body "hello"."""
        length = context.metadata["http-path-file"]
        await context.send_headers({"http-status": "200", "http-header-content-length": length})
        yield httpbody_pb2.HttpBody(content_type="text/plain", data=b"hello")

    def _step(self, name: str, percent: int) -> Any:
        self.sent += 1
        return media_service_pb2.WatchVideoResponse(
            cursor=f"c{percent}", video=media_pb2.Video(name=name, progress_percent=percent)
        )


class Uploads(media_service_pb2_grpc.UploadServiceServicer):
    """Raw bindings: counts bytes, answers in its own words."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.received = 0
        self.was_cut = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def CreateTusUpload(self, requests: Any, context: Context) -> AsyncIterator[Any]:
        self.metadata = dict(context.metadata)
        async for _ in requests:
            pass
        await context.send_headers(
            {
                "http-status": "201",
                "http-header-location": "/v1/files/1",
                "http-header-set-cookie": "not=allowed",
            }
        )
        return
        yield

    async def HeadTusUpload(self, requests: Any, context: Context) -> AsyncIterator[Any]:
        await context.send_headers({"http-status": "200", "http-header-upload-offset": "7"})
        return
        yield

    async def PatchTusUpload(self, requests: Any, context: Context) -> AsyncIterator[Any]:
        self.metadata = dict(context.metadata)
        if context.metadata["http-path-upload"] == "absent":
            raise NotFound("There is no such upload.")
        if context.metadata["http-path-upload"] == "early":
            await context.send_headers({"http-status": "409"})
            yield httpbody_pb2.HttpBody(content_type="text/plain", data=b"wrong offset")
            return
        if context.metadata["http-path-upload"] == "bodiless":
            await context.send_headers({"http-status": "204"})
            yield httpbody_pb2.HttpBody(data=b"HTTP/1.1 200 OK\r\n\r\n")
            return
        self.received = 0
        try:
            async for part in requests:
                await self.gate.wait()
                self.received += len(part.data)
            await context.send_headers(
                {"http-status": "204", "http-header-upload-offset": str(self.received)}
            )
        except asyncio.CancelledError:
            self.was_cut.set()
            raise

    async def TerminateTusUpload(self, requests: Any, context: Context) -> AsyncIterator[Any]:
        yield httpbody_pb2.HttpBody(content_type="text/plain", data=b"gone")


class Sessions(auth_service_pb2_grpc.SessionServiceServicer):
    """The revocation feed, and a log-in that is always refused."""

    def __init__(self) -> None:
        self.revoked: list[str] = []
        self.changed = asyncio.Condition()

    async def revoke(self, credential: str) -> None:
        async with self.changed:
            self.revoked.append(credential)
            self.changed.notify_all()

    async def WatchRevocations(self, request: Any, context: Context) -> AsyncIterator[Any]:
        sent = 0
        yield auth_service_pb2.WatchRevocationsResponse(caught_up=True)
        while True:
            async with self.changed:
                while len(self.revoked) == sent:
                    await self.changed.wait()
            for credential in self.revoked[sent:]:
                message = auth_service_pb2.WatchRevocationsResponse(credential=credential)
                message.forget_time.FromSeconds(int(time.time()) + 600)
                yield message
            sent = len(self.revoked)

    async def CreateSession(self, request: Any, context: Context) -> Any:
        raise Unauthenticated("E-mail or password is wrong.", reason="CREDENTIALS_REJECTED")

    async def RevokeSession(self, request: Any, context: Context) -> Any:
        return Empty()


class Keys(auth_service_pb2_grpc.ApiKeyServiceServicer):
    """Resolves the keys it is given."""

    def __init__(self) -> None:
        self.known: dict[str, auth_service_pb2.ResolveApiKeyResponse] = {}
        self.asked = 0

    async def ResolveApiKey(self, request: Any, context: Context) -> Any:
        self.asked += 1
        if request.secret not in self.known:
            raise Unauthenticated("No such key.", reason="CREDENTIALS_REJECTED")
        return self.known[request.secret]


class Tokens(auth_service_pb2_grpc.TokenServiceServicer):
    """Publishes the public half of the signing key, and makes access tokens."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.asked = 0

    async def GetJwks(self, request: Any, context: Context) -> Any:
        self.asked += 1
        numbers = self._key.public_key().public_numbers()
        jwk = auth_service_pb2.Jwk(
            kty="RSA",
            use="sig",
            alg="RS256",
            kid="test-key",
            n=_b64(numbers.n.to_bytes(256, "big")),
            e=_b64(numbers.e.to_bytes(3, "big")),
        )
        return auth_service_pb2.Jwks(keys=[jwk])

    def token(
        self,
        *,
        subject: UUID | None = None,
        session: str = "",
        scope: str = SCOPES,
        header: dict[str, Any] | None = None,
        **claims: Any,
    ) -> str:
        now = int(time.time())
        body = {
            "iss": ACCESS_TOKEN_ISSUER,
            "aud": ACCESS_TOKEN_AUDIENCE,
            "sub": str(subject or uuid4()),
            "sid": session or str(uuid4()),
            "tenant": "default",
            "scope": scope,
            "iat": now,
            "exp": now + 300,
            **claims,
        }
        head = {"alg": "RS256", "kid": "test-key", "typ": ACCESS_TOKEN_TYPE, **(header or {})}
        signed = f"{_b64(json.dumps(head).encode())}.{_b64(json.dumps(body).encode())}"
        signature = self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{_b64(signature)}"


class Behind:
    """The server and its services; `edge_signer` is the key it believes."""

    def __init__(self) -> None:
        self.ledger, self.videos, self.uploads = Ledger(), Videos(), Uploads()
        self.sessions, self.keys, self.tokens = Sessions(), Keys(), Tokens()
        key = ed25519.Ed25519PrivateKey.generate()
        self.identity_pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        self.public_pem = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.edge_signer = IdentitySigner("edge", self.identity_pem)
        self.port = 0
        self.server = self._make_server("127.0.0.1:0")

    async def start(self) -> None:
        self.port = await self.server.start()
        self.serve_all()

    def serve_all(self) -> None:
        for policy in contract_policies().values():
            self.server.set_serving(policy.service, True)
        self.server.set_serving("", True)

    async def restart(self) -> None:
        self.server = self._make_server(f"127.0.0.1:{self.port}")
        await self.start()

    async def stop(self) -> None:
        await self.server.stop(0)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _make_server(self, address: str) -> RpcServer:
        server = RpcServer(
            address=address,
            verifier=IdentityVerifier({"edge": self.public_pem}),
            config=CONFIG,
        )
        auth, media = auth_service_pb2_grpc, media_service_pb2_grpc
        add_ledger = ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server
        server.add(Registration(add_ledger, self.ledger))
        server.add(Registration(media.add_VideoServiceServicer_to_server, self.videos))
        server.add(Registration(media.add_UploadServiceServicer_to_server, self.uploads))
        server.add(Registration(auth.add_SessionServiceServicer_to_server, self.sessions))
        server.add(Registration(auth.add_ApiKeyServiceServicer_to_server, self.keys))
        server.add(Registration(auth.add_TokenServiceServicer_to_server, self.tokens))
        return server


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


__all__ = ["KNOWN", "Behind", "auth_pb2", "ledger_service_pb2"]
