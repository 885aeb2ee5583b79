"""What strangers send to the edge, under a coverage-guided fuzzer (atheris, libFuzzer).

    python -m tests.fuzz.edge_input TARGET [-max_total_time=SECONDS] [CORPUS_FOLDER]

A target takes any bytes. It ends normally, or raises the error that a caller is meant to see;
everything else is a crash, which libFuzzer writes to a file and reports with exit code 77.
"""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import atheris

with atheris.instrument_imports(
    include=["edge", "shared.rpc.http2", "shared.rpc.call", "shared.rpc.header_block"]
):
    from edge import connect, deadlines, etags, streams
    from edge.auth import bearer_of
    from edge.binary import message_of_bytes
    from edge.codec import codecs_of
    from edge.contracts import Contracts
    from edge.exchange import Exchange, address_block
    from edge.gzipped import decompress
    from edge.http1 import ConnectionLimits, Http1Request, Server
    from edge.json_text import Wrong
    from edge.problem import problem_of
    from edge.routes import Match, RouteTable
    from edge.transcode import request_message
    from tests.unit.shared.rpc.wire import connected

from shared.errors import Internal, TenfoldError
from tests.protos import compile_protos

EDGE_TESTS = Path(__file__).parents[1] / "unit" / "edge"
METHODS = ("GET", "POST", "PATCH", "DELETE", "HEAD")
BODY_BYTES_MAX = 64 * 1024

Target = Callable[[bytes], None]

CHUNKED = (
    b"\x30POST /a?b=c HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nT: t\r\n\r\n"
)
# Where the fuzzer starts: without them it would look for the alphabet of each format.
SEEDS = {
    "target": [
        b"\0v1/shelves/1/books/2?view=FULL&page_size=3&book.labels[a]=b&names=x&names=y",
        b"\1v1/shelves/1:archive?time=2026-01-01T00:00:00.5%2B01:00&mask=a,b.c&flag=true",
        b"\2v1/files/a%2Fb/c%20d/%C3%A9?filter.value=-0&struct=%7B%22a%22:%5B1%5D%7D",
        b"\0v1//..;/%2e%2e/:verb:verb?%=&&=&a=%00",
    ],
    "json": [
        b'{"text":"x","anInt32":1,"anInt64":"-9","aDouble":"NaN","aFloat":1e38,"data":"-_8="}',
        b'{"time":"2026-02-29T00:00:00.1+02:00","duration":"-1.5s","mask":"a,bC","any":{"@type":"t"}}',
        b'{"struct":{"a":[1,{"b":null}]},"value":[[]],"values":[1,"x"],"labels":{"a":"b"},"color":5}',
        b'{"inner":{"inner":{}},"int64s":["1",2],"stringWrapper":"x","choiceText":"\\ud83d\\ude00"}',
    ],
    "http1": [
        b"\x10GET / HTTP/1.1\r\nHost: a\r\nA: b\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
        CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: 5"),
        CHUNKED,
        b"\x05GET / HTTP/1.0\r\nConnection: keep-alive\r\nUpgrade: h2c\r\n\r\n",
    ],
    "headers": [
        b"Bearer abc.def-ghi_~+/=",
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"10.0.0.1, 203.0.113.9",
        b"500m",
        b"text/event-stream;q=0.5, application/*;q=0",
        b'W/"a", "b", *',
        b"gzip;q=0.5, identity;q=0",
        b"\1\0\0\0\5\x1f\x8b\x08\0\0",
        b"connect=v1&encoding=proto&compression=gzip&base64=1&message=CgNh_-%3D",
    ],
    "http2": [
        b"\0\0\4\x08\0\0\0\0\0\0\0\1\0\0\0\1\x01\x05\0\0\0\1\x88",
        b"\0\0\1\x01\4\0\0\0\1\x88\0\0\7\0\0\0\0\0\1\0\0\0\0\2hi\0\0\x0f\x01\5\0\0\0\1\0\x0bgrpc-status\x010",
        b"\0\0\4\3\0\0\0\0\1\0\0\0\7\0\0\x08\7\0\0\0\0\0\0\0\0\1\0\0\0\0",
        b"\0\0\x06\4\0\0\0\0\0\0\4\0\0\0\1\0\0\1\x09\4\0\0\0\1\x88",
    ],
}


def main() -> None:
    """Fuzz the target that the first argument names."""
    targets = {"target": fuzz_target, "json": fuzz_json, "http1": fuzz_http1,
               "headers": fuzz_headers, "http2": fuzz_http2}  # fmt: skip
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(targets)} [-max_total_time=SECONDS] [FOLDER]")
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(SEEDS[name]):
            (Path(folder) / str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, folder], targets[name]())
        atheris.Fuzz()


def contracts_of(folder: Path) -> Contracts:
    """The contracts of a folder of protos."""
    with tempfile.TemporaryDirectory() as out:
        return Contracts(compile_protos(folder, Path(out)))


def is_told(error: TenfoldError) -> bool:
    """Whether a caller can mend the request: never our bug, always one problem document."""
    problem = problem_of(error, request_id="r")
    return not isinstance(error, Internal) and 400 <= problem.status < 500 and bool(problem.body)


def fuzz_target() -> Target:
    """Path and query: whatever matches becomes a message, or a refusal."""
    table = RouteTable.of_contracts(contracts_of(EDGE_TESTS / "library"))

    def one(data: bytes) -> None:
        method, target = METHODS[data[0] % len(METHODS)] if data else "GET", b"/" + data[1:]
        path, _, query = target.partition(b"?")
        try:
            found = table.match(method, path)
            if isinstance(found, Match) and found.route.raw is None:
                request_message(found.route, found.captures, query, b"")
        except TenfoldError as error:
            assert is_told(error)

    return one


def fuzz_json() -> Target:
    """A body of every kind of field, binary or JSON; that is written, and read as the same."""
    contracts = contracts_of(EDGE_TESTS)
    everything = contracts.message("everything.v1.Everything")
    codec = codecs_of(everything.file.pool).of(everything)

    def one(data: bytes) -> None:
        with contextlib.suppress(Wrong):
            message_of_bytes(codec.message_class, data)
        try:
            message = codec.message_of_json(data)
        except Wrong:
            return
        again = codec.message_of_json(codec.json_of_message(message))
        assert again.SerializeToString(deterministic=True) == message.SerializeToString(
            deterministic=True
        )

    return one


class FakeTransport:
    """Takes what is written; remembers that it was closed."""

    def __init__(self) -> None:
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert isinstance(data, bytes)
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def write_eof(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.is_closed

    def get_extra_info(self, name: str) -> object:
        return ("192.0.2.1", 1) if name == "peername" else None

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def fuzz_http1() -> Target:
    """Bytes on a connection: requests come out whole, or the connection ends with one answer."""
    loop = asyncio.new_event_loop()

    def serve(request: Http1Request) -> None:
        assert request.raw_path.startswith(b"/")
        assert all(name == name.lower() for name, _ in request.headers)
        head = request.begin(200, [(b"content-length", b"0")], b"")
        request.write(head, b"", is_last=True)

    async def converse(data: bytes) -> None:
        server = Server(serve, ConnectionLimits(10, 10, 10))
        connection, transport = server.connection(), FakeTransport()
        connection.connection_made(transport)
        cut = data[0] if data else 0
        for part in (data[1 : cut + 1], data[cut + 1 :]):
            if part:
                connection.data_received(part)
        assert not transport.written or transport.written.startswith(b"HTTP/1.1 ")
        connection.connection_lost(None)
        assert not server.connections
        assert not server.limits.open_by_address

    return lambda data: loop.run_until_complete(converse(data))


def fuzz_headers() -> Target:
    """The values of the headers that the edge reads."""

    def exchange_with(data: bytes) -> Exchange:
        connection = SimpleNamespace(address="192.0.2.7")
        names = (b"authorization", b"traceparent", b"x-request-id", b"x-forwarded-for")
        headers = [(name, data) for name in names]
        return Exchange.of(Http1Request(connection, "GET", b"/", headers), trusted_hops=1)

    def one(data: bytes) -> None:
        exchange, text = exchange_with(data), data.decode("latin-1")
        address_block(exchange.address)
        assert exchange.request_id.isascii()
        for read in (
            lambda: bearer_of(exchange),
            lambda: exchange.header("authorization"),
            lambda: deadlines.timeout_of(text, default_s=1, max_s=2),
            lambda: deadlines.connect_timeout_of(text, default_s=1, max_s=2),
            lambda: streams.choose_framing(text),
            lambda: etags.parse_tags(text, "If-Match"),
            lambda: connect.takes_gzip(text, ""),
            lambda: decompress(data, bytes_max=BODY_BYTES_MAX),
            lambda: connect.only_message(data, gzip=True, bytes_max=BODY_BYTES_MAX),
            lambda: connect.GetRequest.of_query(data),
        ):
            try:
                read()
            except TenfoldError as error:
                assert is_told(error) or error.error_reason == "UNIMPLEMENTED"

    return one


def fuzz_http2() -> Target:
    """Bytes of a service that went mad: every call ends once, and nothing is thrown."""
    loop = asyncio.new_event_loop()

    async def converse(data: bytes) -> None:
        peer = await connected()
        calls = [peer.start(b"message"), peer.start(bytes(70_000))]
        peer.send(data)
        peer.connection.connection_lost(None)
        assert [len(call.endings) for call in calls] == [1, 1]

    return lambda data: loop.run_until_complete(converse(data))


if __name__ == "__main__":
    main()
