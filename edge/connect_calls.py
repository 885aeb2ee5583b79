"""Calls in the Connect protocol: what generated TypeScript clients send.

They come here by every step that any other request takes; only how messages are written,
and how an answer and its errors look, is their own. See `edge.connect`.
"""

from google.protobuf.message import Message

from edge import charges as charging
from edge import streams
from edge.answer import cache_control
from edge.calls import CallLimits, Calls, fill_request_id
from edge.connect import (
    GZIP,
    HEAD_BYTES,
    STREAM_TYPES,
    UNARY_TYPES,
    Codec,
    ConnectFraming,
    GetRequest,
    codec_of,
    error_json,
    is_gzip,
    only_message,
    require_version,
    takes_gzip,
)
from edge.exchange import Exchange
from edge.gzipped import compress, decompress, is_worth_compressing
from edge.refusals import PreconditionUnsupported
from edge.upstream import Upstream
from shared.errors import Unimplemented


class ConnectCalls:
    """Makes calls to the services, and answers in the Connect protocol.

    Args:
        upstream: the services.
        calls: counts open streams, for both protocols together.
        limits: what one call may take.
    """

    def __init__(self, upstream: Upstream, calls: Calls, limits: CallLimits) -> None:
        self._upstream = upstream
        self._calls = calls
        self._limits = limits

    async def make(self, exchange: Exchange) -> None:
        """See Calls.make."""
        method = exchange.call.method
        require_version(exchange.header("connect-protocol-version"))
        if b"if-match" in exchange.headers:  # to ignore it would overwrite
            raise PreconditionUnsupported(
                "Over Connect the message carries the etag, not If-Match."
            )
        if method.client_streaming:
            codec_of(exchange.header("content-type"), STREAM_TYPES)
            message = "Client streams are not served over HTTP/1.1: call the service by gRPC."
            raise Unimplemented(message)
        if method.server_streaming:
            await self._call_stream(exchange)
        else:
            await self._call_unary(exchange)

    # Unary
    async def _call_unary(self, exchange: Exchange) -> None:
        route = exchange.call
        is_get = exchange.method in {"GET", "HEAD"}
        given = GetRequest.of_query(exchange.query) if is_get else await self._posted(exchange)
        is_packed = is_gzip(given.encoding)
        data = given.message
        if is_packed:
            data = decompress(data, bytes_max=self._limits.body_bytes_max)
        request = given.codec.decode(route, data)
        fill_request_id(exchange, request)
        reply = await self._upstream.unary(route.method, request, self._calls.caller_of(exchange))
        if reply.is_replayed and exchange.charge is not None:
            charging.note_replay(exchange.charge)
        headers = [
            (b"content-type", f"application/{given.codec.name}".encode()),
            (b"cache-control", cache_control(route)),
            (b"accept-encoding", GZIP.encode()),
        ]
        if reply.is_replayed:
            headers.append((b"idempotency-replayed", b"true"))
        body = given.codec.encode(route, reply.message)
        if is_worth_compressing(body):
            headers.append((b"vary", b"accept-encoding"))
            if takes_gzip(exchange.header("accept-encoding"), given.encoding):
                headers.append((b"content-encoding", GZIP.encode()))
                body = compress(body)
        await exchange.respond(200, headers, body)

    async def _posted(self, exchange: Exchange) -> GetRequest:
        codec = codec_of(exchange.header("content-type"), UNARY_TYPES)
        encoding = exchange.header("content-encoding")
        is_gzip(encoding)  # before the body is read
        return GetRequest(codec, encoding, await self._body(exchange, 0))

    # Server streams
    async def _call_stream(self, exchange: Exchange) -> None:
        route = exchange.call
        codec = codec_of(exchange.header("content-type"), STREAM_TYPES)
        request = await self._streamed(exchange, codec)
        fill_request_id(exchange, request)
        gzip = takes_gzip(
            exchange.header("connect-accept-encoding"),
            exchange.header("connect-content-encoding"),
        )
        encodings = [(b"connect-accept-encoding", GZIP.encode())]
        if gzip:
            encodings.append((b"connect-content-encoding", GZIP.encode()))
        exchange.answer_headers = [*exchange.answer_headers, *encodings]
        answer = streams.Answer(
            exchange,
            ConnectFraming(codec, gzip=gzip),
            encode=lambda message: codec.encode(route, message),
            problem=lambda error: error_json(error, request_id=exchange.request_id, route=route),
            heartbeat_s=self._limits.heartbeat_s,
        )
        with self._calls.opened(exchange) as ended:
            stream = self._upstream.stream(route.method, request, self._calls.caller_of(exchange))
            await streams.relay(answer, stream, ended=ended)

    async def _streamed(self, exchange: Exchange, codec: Codec) -> Message:
        gzip = is_gzip(exchange.header("connect-content-encoding"))
        body = await self._body(exchange, HEAD_BYTES)
        bytes_max = self._limits.body_bytes_max
        return codec.decode(exchange.call, only_message(body, gzip=gzip, bytes_max=bytes_max))

    async def _body(self, exchange: Exchange, head_bytes: int) -> bytes:
        limits = self._limits
        return await exchange.read_body(
            bytes_max=limits.body_bytes_max + head_bytes, timeout_s=limits.body_timeout_s
        )
