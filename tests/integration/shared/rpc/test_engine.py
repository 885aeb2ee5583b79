"""What an engine does beyond one call: TLS, compression, streams, and a stop under load."""

import asyncio
import datetime
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.api.httpbody_pb2 import HttpBody
from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.auth.v1 import auth_service_pb2_grpc as auth_grpc
from tenfold.media.v1 import media_service_pb2_grpc as media_grpc

from shared.errors import Unavailable
from shared.lifecycle import Registration
from shared.rpc.client import Channels, Upstreams
from shared.rpc.engine import EngineLimits
from shared.rpc.server import RpcServerConfig
from tests.integration.shared.rpc.harness import (
    SESSIONS,
    USER,
    Harness,
    Sessions,
    only_on_grpcio,
    only_on_native,
    serving,
    until,
)
from tests.integration.shared.rpc.raw_http2 import (
    CANCEL,
    DATA,
    RST_STREAM,
    connected,
    frame,
    message,
)

pytestmark = pytest.mark.usefixtures("engine")

LIST = "/tenfold.auth.v1.SessionService/ListSessions"
PATCH = "/tenfold.media.v1.UploadService/PatchTusUpload"
UPLOADER = replace(USER, scopes=USER.scopes | {"media.upload"})
QUIET = RpcServerConfig(logs_requests=False)


def self_signed() -> tuple[bytes, bytes]:
    """A key and a certificate for "localhost", in PEM."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return (
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.public_bytes(pem),
    )


@only_on_grpcio
async def test_grpcio_serves_tls() -> None:
    key, certificate = self_signed()
    limits = EngineLimits(tls=grpc.ssl_server_credentials([(key, certificate)]))
    trust = grpc.ssl_channel_credentials(certificate)
    async with serving(config=replace(QUIET, limits=limits)) as harness:
        target = f"localhost:{harness.port}"
        async with grpc.aio.secure_channel(target, trust) as channel:
            await channel.unary_unary(LIST)(b"", metadata=harness.as_(USER), timeout=10)
        async with harness.raw_channel() as channel:
            call = channel.unary_unary(LIST)(b"", metadata=harness.as_(USER), timeout=10)
            assert await call.code() is grpc.StatusCode.UNAVAILABLE


@only_on_grpcio
async def test_grpcio_compresses_answers_when_asked() -> None:
    answer = auth.ListSessionsResponse(next_page_token="x" * 100_000)
    config = replace(QUIET, limits=EngineLimits(compresses=True))
    async with serving(Sessions(on_list=lambda _: answer), config) as harness:
        async with connected(harness.port) as peer:
            headers = [*harness.as_(USER), ("grpc-accept-encoding", "gzip")]
            came = await peer.call(LIST, message(b""), headers)
        assert came.headers["grpc-encoding"] == "gzip"
        assert len(came.data) < 1000


class Uploads(media_grpc.UploadServiceServicer):
    """Echoes pieces until its caller leaves."""

    def __init__(self) -> None:
        self.has_ended = asyncio.Event()
        self.pieces, self.whole, self.cut = 0, 0, 0

    async def PatchTusUpload(self, requests: Any, context: Any) -> Any:
        await context.send_headers({"http-status": "204"})
        try:
            async for piece in requests:
                self.pieces += 1
                yield HttpBody(data=piece.data)
            self.whole += 1
        except asyncio.CancelledError:
            self.cut += 1
            raise
        finally:
            self.has_ended.set()


@asynccontextmanager
async def uploads() -> AsyncIterator[tuple[Harness, Uploads, Any]]:
    handler = Uploads()
    others = [Registration(media_grpc.add_UploadServiceServicer_to_server, handler)]
    async with serving(config=QUIET, others=others) as harness, harness.raw_channel() as channel:
        start = channel.stream_stream(PATCH)(metadata=harness.as_(UPLOADER), timeout=30)
        yield harness, handler, start


async def test_a_stream_both_ways_carries_headers_messages_and_its_end() -> None:
    async with uploads() as (_, _, call):
        for number in range(100):
            await call.write(HttpBody(data=bytes([number])).SerializeToString())
            assert HttpBody.FromString(await call.read()).data == bytes([number])
        assert ("http-status", "204") in tuple(await call.initial_metadata())
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK


async def test_a_caller_that_leaves_a_stream_both_ways_cancels_its_handler() -> None:
    async with uploads() as (_, handler, call):
        await call.write(HttpBody(data=b"x").SerializeToString())
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            await handler.has_ended.wait()


async def test_a_stream_that_its_caller_cancels_is_never_taken_for_whole() -> None:
    async with uploads() as (harness, handler, _), connected(harness.port) as peer:
        for number in range(1, 51):
            await peer.send(peer.request(PATCH, harness.as_(UPLOADER)))
            await peer.send(frame(DATA, 0, peer.last, message(b"")))
            await until(lambda number=number: handler.pieces == number)
            await peer.send(frame(RST_STREAM, 0, peer.last, struct.pack(">I", CANCEL)))
        await until(lambda: handler.whole + handler.cut == 50)
        assert handler.whole == 0


async def test_a_stop_ends_a_stream_both_ways() -> None:
    async with uploads() as (harness, handler, call):
        await call.write(HttpBody(data=b"x").SerializeToString())
        await call.read()
        await harness.server.stop(10)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert handler.has_ended.is_set()


async def test_a_long_stream_keeps_its_order_past_a_caller_that_is_slow() -> None:
    count = 2000

    class Many(Sessions):
        async def WatchRevocations(self, request: Any, context: Any) -> Any:
            for number in range(count):
                yield auth.WatchRevocationsResponse(credential=f"{number:01000}")

    async with serving(Many(), QUIET) as harness:
        stream = harness.stub.WatchRevocations(auth.WatchRevocationsRequest())
        numbers = []
        async for answer in stream:
            numbers.append(int(answer.credential))
            if len(numbers) % 500 == 0:
                await asyncio.sleep(0.05)
        assert numbers == list(range(count))


async def slow(_context: object) -> None:
    await asyncio.sleep(0.02)


async def test_one_of_two_servers_stops_under_load_and_no_call_fails() -> None:
    """P10: clients that watch health go to the other."""
    first, second = Sessions(on_list=slow), Sessions(on_list=slow)
    async with serving(first, QUIET) as one, serving(second, QUIET) as other:
        other.server._chain.verifier = one.server._chain.verifier
        target = f"ipv4:127.0.0.1:{one.port},127.0.0.1:{other.port}"
        channels, has_stopped = Channels(Upstreams({"*": target}), one.services), asyncio.Event()
        # A name with several addresses has one of its own; the native engine refuses a list.
        channels._options.append(("grpc.default_authority", "services"))
        stub: Any = auth_grpc.SessionServiceStub(channels.channel(SESSIONS))  # type: ignore[no-untyped-call]

        async def call_on() -> None:
            while not has_stopped.is_set():
                await stub.ListSessions(auth.ListSessionsRequest(), metadata=one.as_(USER))

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(call_on())
            await asyncio.sleep(0.5)
            assert first.seen
            assert second.seen
            await one.server.stop(5)
            await asyncio.sleep(0.2)
            has_stopped.set()
        await channels.close()


async def test_a_call_that_a_stop_meets_is_answered_or_refused_before_it_began() -> None:
    """Also of clients that do not watch health."""
    handler = Sessions(on_list=slow)
    async with serving(handler, QUIET, checks_health=False) as harness:
        answered = 0

        async def call_until_refused() -> None:
            nonlocal answered
            with pytest.raises(Unavailable):
                while True:
                    await harness.list(timeout=10)
                    answered += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(call_until_refused())
            await asyncio.sleep(0.3)
            await harness.server.stop(2)
        assert answered == len(handler.seen)


@only_on_native
async def test_native_leaves_no_socket_to_others_and_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with uploads() as (_, _, call):
        assert os.listdir(tmp_path) == []
        await call.write(HttpBody(data=b"x").SerializeToString())
        assert HttpBody.FromString(await call.read()).data == b"x"
