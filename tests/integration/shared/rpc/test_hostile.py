"""Hostile peers on a raw socket (spec c.6, S75 to S88, and S72): each engine's stated answer.

Whatever a peer does, the next caller is served and memory stays flat; where an answer of the
native engine is another than that of grpcio, its docstring says so.
"""

import asyncio
import contextlib
import gzip
import itertools
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.media.v1 import media_service_pb2_grpc as media_grpc

from shared.identity import IDENTITY_METADATA_KEY
from shared.lifecycle import Registration
from shared.rpc.server import RpcServerConfig
from tests.integration.shared.rpc.harness import USER, Harness, Sessions, serving, until
from tests.integration.shared.rpc.raw_http2 import (
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    RST_STREAM,
    SETTINGS,
    Answer,
    Headers,
    Peer,
    call_headers,
    connected,
    frame,
    header_block,
    message,
)

pytestmark = pytest.mark.usefixtures("engine")

LIST = "/tenfold.auth.v1.SessionService/ListSessions"
WATCH = "/tenfold.auth.v1.SessionService/WatchRevocations"
PATCH = "/tenfold.media.v1.UploadService/PatchTusUpload"
HASTY = RpcServerConfig(read_timeout_s=1, stream_idle_s=1, calls_max=50, logs_requests=False)
MIB = 1024 * 1024


class Uploads(media_grpc.UploadServiceServicer):
    async def PatchTusUpload(self, requests: Any, context: Any) -> Any:
        async for _ in requests:
            pass
        yield HttpBody()


def token(harness: Harness) -> Headers:
    scopes = USER.scopes | {"media.upload"}
    principal = USER.__class__(USER.kind, USER.subject, scopes=scopes, credential=USER.credential)
    return [(IDENTITY_METADATA_KEY, harness.edge.token_for(principal))]


def outcome(peer: Peer, answer: Answer) -> str:
    """The gRPC code's name, else the HTTP status, else what became of stream and connection."""
    if answer.status is not None:
        return next(code.name for code in grpc.StatusCode if code.value[0] == answer.status)
    if answer.headers.get(":status", "200") != "200":
        return f"HTTP {answer.headers[':status']}"
    if answer.reset is not None:
        return "reset"
    return "closed" if peer.is_closed else "silence"


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@asynccontextmanager
async def attacked(
    handler: Sessions | None = None, settings: dict[int, int] | None = None
) -> AsyncIterator[tuple[Harness, Peer]]:
    """A server and a hostile peer; in the end the server must serve somebody else."""
    others = [Registration(media_grpc.add_UploadServiceServicer_to_server, Uploads())]
    async with serving(handler, HASTY, others) as harness:
        async with connected(harness.port, settings) as peer:
            yield harness, peer
        await requires_service(harness)


async def requires_service(harness: Harness) -> None:
    """Another caller, on a connection of its own, is served."""
    async with connected(harness.port) as peer:
        answer = await peer.call(LIST, message(b""), token(harness))
        assert outcome(peer, answer) == "OK"


def case(name: str, body: bytes, *headers: tuple[str, str], grpcio: str, native: str) -> Any:
    return pytest.param(body, headers, {"grpcio": grpcio, "native": native}, id=name)


def same(name: str, body: bytes, *headers: tuple[str, str], answer: str) -> Any:
    return case(name, body, *headers, grpcio=answer, native=answer)


EMPTY = message(b"")
LARGE = bytes(64 * MIB)
ZEROS = gzip.compress(LARGE)


@pytest.mark.parametrize(
    ("body", "headers", "answers"),
    [
        same("nothing wrong", EMPTY, answer="OK"),
        case("no message (S77)", b"", grpcio="INVALID_ARGUMENT", native="INTERNAL"),
        case(
            "message cut short (S77)", message(b"x", length=99),
            grpcio="INVALID_ARGUMENT", native="INTERNAL",
        ),
        case("half a prefix (S77)", b"\0\0", grpcio="INVALID_ARGUMENT", native="INTERNAL"),
        same("two messages", EMPTY + EMPTY, answer="OK"),
        same("3 MiB", message(bytes(3 * MIB)), answer="RESOURCE_EXHAUSTED"),
        same(
            "64 MiB of zeros in gzip (S79)", message(ZEROS, compressed=1),
            ("grpc-encoding", "gzip"), answer="RESOURCE_EXHAUSTED",
        ),
        same("compressed without encoding (S83)", message(b"", compressed=1), answer="INTERNAL"),
        same(
            "gzip that is none (S83)", message(b"zip", compressed=1), ("grpc-encoding", "gzip"),
            answer="INTERNAL",
        ),
        case(
            "unknown encoding (S83)", message(b"", compressed=1), ("grpc-encoding", "zip"),
            grpcio="INTERNAL", native="UNIMPLEMENTED",
        ),
        case(
            "compressed flag of 2 (S83)", message(b"", compressed=2),
            grpcio="OK or INVALID_ARGUMENT", native="INTERNAL",
        ),
        case("bad base 64 (S83)", EMPTY, ("x-bin", "***"), grpcio="INTERNAL", native="OK"),
        case(
            "20 KB of metadata (S80)", EMPTY, ("x-long", "x" * 20_000),
            grpcio="INVALID_ARGUMENT", native="HTTP 431",
        ),
        case(
            "10,000 small entries (S80)", EMPTY, *((f"x-{n}", "y") for n in range(10_000)),
            grpcio="INVALID_ARGUMENT", native="closed",
        ),
        same("timeout of 0 (S82)", EMPTY, ("grpc-timeout", "0S"), answer="DEADLINE_EXCEEDED"),
        same("timeout of 10^14 s (S82)", EMPTY, ("grpc-timeout", f"{10**14}S"), answer="OK"),
        case(
            "timeout that is none (S82)", EMPTY, ("grpc-timeout", "soon"),
            grpcio="INTERNAL", native="OK",
        ),
        case(
            "negative timeout (S82)", EMPTY, ("grpc-timeout", "-1S"), grpcio="INTERNAL", native="OK"
        ),
        same("groups 10,000 deep (S84)", message(b"\x0b" * 10_000), answer="INVALID_ARGUMENT"),
        same("text that is no UTF-8 (S84)", message(b"\x12\x01\xff"), answer="INVALID_ARGUMENT"),
        same(
            "2 MB of unknown fields (S84)", message(b"\xfa\x3f\0" * 650_000), answer="OK",
        ),
        same("a hidden retry (S88)", EMPTY, ("grpc-previous-rpc-attempts", "9"), answer="OK"),
        same("another content type", EMPTY, ("content-type", "application/json"), answer="OK"),
    ],
)  # fmt: skip
async def test_a_call_has_its_stated_answer(
    body: bytes, headers: Headers, answers: dict[str, str], engine: str
) -> None:
    async with attacked() as (harness, peer):
        answer = await peer.call(LIST, body, [*token(harness), *headers])
        assert outcome(peer, answer) in answers[engine].split(" or ")


async def test_a_length_prefix_of_4_gib(engine: str) -> None:
    """S78: refused at once by grpcio; the native engine waits for it until the deadline."""
    answers = {"grpcio": "RESOURCE_EXHAUSTED", "native": "DEADLINE_EXCEEDED"}
    async with attacked() as (harness, peer):
        await peer.send(peer.request(LIST, [*token(harness), ("grpc-timeout", "700m")]))
        await peer.send(frame(DATA, 0, peer.last, message(b"x" * 1000, length=2**32 - 1)))
        assert outcome(peer, await peer.ended(peer.last)) == answers[engine]


async def test_a_large_message_is_not_kept(engine: str) -> None:
    """The native engine keeps it until it has all come: why it listens on loopback alone."""
    async with attacked() as (harness, peer):
        before = resident_bytes()
        answer = await peer.call(LIST, message(LARGE), token(harness))
        assert outcome(peer, answer) == "RESOURCE_EXHAUSTED"
        assert (resident_bytes() - before > len(LARGE) / 2) == (engine == "native")


@pytest.mark.parametrize(
    ("path", "refusal"), [(PATCH, "RESOURCE_EXHAUSTED"), (LIST + "X", "UNIMPLEMENTED")]
)
async def test_a_large_message_elsewhere_is_not_kept(path: str, refusal: str) -> None:
    """On either engine these are grpcio's."""
    async with attacked() as (harness, peer):
        before = resident_bytes()
        answer = await peer.call(path, message(LARGE), token(harness))
        assert outcome(peer, answer) == refusal
        assert resident_bytes() - before < len(LARGE) / 2


async def test_a_thousand_calls_without_a_message(engine: str) -> None:
    """S76: ended by the read deadline; on the native engine they wait, and harm nobody."""
    ends = {"grpcio": "DEADLINE_EXCEEDED", "native": "silence"}
    async with attacked() as (harness, peer):
        await peer.send(*(peer.request(LIST, token(harness)) for _ in range(1000)))
        await requires_service(harness)
        await asyncio.sleep(2 * HASTY.read_timeout_s)
        await until(lambda: {outcome(peer, a) for a in peer.answers.values()} == {ends[engine]})


Flood = Callable[[Peer, Headers], Iterator[bytes]]


def rapid_reset(peer: Peer, token: Headers) -> Iterator[bytes]:
    for _ in range(20_000):
        yield peer.request(LIST, token)
        yield frame(RST_STREAM, 0, peer.last, struct.pack(">I", CANCEL))


def continuations(piece: bytes, count: int) -> Flood:
    def flood(peer: Peer, token: Headers) -> Iterator[bytes]:
        block = header_block(call_headers(LIST, token))
        yield frame(HEADERS, 0, peer.stream(), block)
        for _ in range(count):
            yield frame(CONTINUATION, 0, peer.last, piece)

    return flood


def unknown_index(peer: Peer, _token: Headers) -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, peer.stream(), b"\xff\xff\xff\xff\x07")


def large_table(peer: Peer, _token: Headers) -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, peer.stream(), b"\x3f\xe1\xff\xff\x07")


def amplified(peer: Peer, token: Headers) -> Iterator[bytes]:
    """One header of 3 KB enters the table; each call names it 5,000 times, in a byte each."""
    entry = b"\x40" + header_block([("x-big", "y" * 3000)])[1:]
    block = header_block(call_headers(LIST, token))
    for _ in range(20):
        named = block + entry + b"\xbe" * 5000
        yield frame(HEADERS, END_HEADERS | END_STREAM, peer.stream(), named)


def empty_data(peer: Peer, token: Headers) -> Iterator[bytes]:
    yield peer.request(LIST, token)
    yield from (frame(DATA, 0, peer.last) for _ in range(100_000))


def always(one: bytes) -> Flood:
    return lambda _peer, _token: (one for _ in range(50_000))


@pytest.mark.parametrize(
    ("flood", "closing"),
    [
        (rapid_reset, {"native"}),
        (continuations(header_block([("x", "y" * 100)]), 50_000), {"grpcio", "native"}),
        (continuations(b"", 50_000), {"grpcio", "native"}),
        (continuations(header_block([("x", "y" * 16_000)]), 5000), {"grpcio", "native"}),
        (unknown_index, {"native"}),
        (large_table, {"native"}),
        (amplified, set()),
        (empty_data, {"grpcio", "native"}),
        (always(frame(PING, payload=b"12345678")), {"grpcio"}),
        (always(frame(SETTINGS)), set()),
    ],
    ids=[
        "S75 rapid reset", "S81 CONTINUATION", "S81 empty CONTINUATION",
        "S81 large CONTINUATION", "S81 index outside the table", "S81 table of our own size",
        "S81 amplified headers", "S81 zero-length DATA", "S81 PING", "S81 SETTINGS",
    ],
)  # fmt: skip
async def test_a_flood_of_frames(flood: Flood, closing: set[str], engine: str) -> None:
    """The connection is closed, or the flood is endured; memory stays flat."""
    async with attacked() as (harness, peer):
        before, frames = resident_bytes(), flood(peer, token(harness))
        while not peer.is_closed and (some := list(itertools.islice(frames, 500))):
            await peer.send(*some)
            await asyncio.sleep(0)
        await requires_service(harness)
        if engine in closing:
            await peer.closed()
        assert resident_bytes() - before < 150 * MIB


async def test_answers_that_nobody_reads_hold_no_place() -> None:
    """S81, tiny windows: four times as many calls as there are places."""
    answer = auth.ListSessionsResponse(next_page_token="x" * 10_000)
    handler = Sessions(on_list=lambda _context: answer)
    async with attacked(handler, {INITIAL_WINDOW_SIZE: 0}) as (harness, peer):
        for number in range(4 * HASTY.calls_max):
            await peer.send(peer.request(LIST, token(harness)))
            await peer.send_body(EMPTY)
            await until(lambda number=number: len(handler.seen) > number)
        await requires_service(harness)
        assert {outcome(peer, answer) for answer in peer.answers.values()} == {"silence"}


async def test_a_stream_that_nobody_reads_waits_and_ends_with_its_caller() -> None:
    """S81, tiny windows."""
    async with attacked(ChattySessions(), {INITIAL_WINDOW_SIZE: 1}) as (harness, peer):
        streams, before = harness.server._chain.open_streams, resident_bytes()
        service = harness.services.token_for(harness.services.own)
        await peer.send(peer.request(WATCH, [(IDENTITY_METADATA_KEY, service)]))
        await peer.send_body(EMPTY)
        await until(lambda: bool(streams))
        await asyncio.sleep(0.5)
        assert len(streams) == 1
        assert resident_bytes() - before < 50 * MIB
        await peer.send(frame(RST_STREAM, 0, peer.last, struct.pack(">I", CANCEL)))
        await until(lambda: not streams)


class ChattySessions(Sessions):
    async def WatchRevocations(self, request: Any, context: Any) -> Any:
        while True:
            yield auth.WatchRevocationsResponse(credential="x" * 100_000)


async def test_a_million_empty_messages_are_cut_early() -> None:
    """S85."""
    async with attacked() as (harness, peer):
        await peer.send(peer.request(PATCH, token(harness)))
        await peer.send_body(EMPTY * 1_000_000)
        assert outcome(peer, await peer.ended(peer.last)) == "INVALID_ARGUMENT"


async def test_a_stream_that_falls_silent_is_ended() -> None:
    """S85, never half-closed."""
    async with attacked() as (harness, peer):
        await peer.send(peer.request(PATCH, token(harness)))
        await peer.send(frame(DATA, 0, peer.last, EMPTY))
        assert outcome(peer, await peer.ended(peer.last)) == "DEADLINE_EXCEEDED"


async def test_connections_that_say_nothing_keep_nobody_out() -> None:
    """S86, as far as one process has descriptors."""
    async with attacked() as (harness, _peer), contextlib.AsyncExitStack() as stack:
        for _ in range(300):
            _reader, writer = await asyncio.open_connection("127.0.0.1", harness.port)
            stack.callback(writer.close)
        await requires_service(harness)
