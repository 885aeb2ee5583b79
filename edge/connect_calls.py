"""Calls in the Connect protocol: what generated TypeScript clients send.

They come here by every step that any other request takes; only how messages are written,
and how an answer and its errors look, is their own. See `edge.connect`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

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
    end_of_stream,
    error_json,
    is_gzip,
    only_message,
    require_version,
    takes_gzip,
)
from edge.exchange import Exchange
from edge.forwarding import Crossing, Forwarding, headers_of, in_bytes
from edge.gzipped import compress, decompress, is_worth_compressing
from edge.http1_text import HeaderList
from edge.refusals import PreconditionUnsupported
from edge.shapes import shape_of
from edge.upstream import Reply, Upstream, UpstreamStream
from shared.errors import TenfoldError, Unimplemented

# Of a unary answer: by this its trailing metadata are told from the leading.
TRAILER = b"trailer-"


class ConnectCalls:
    """Makes calls to the services, and answers in the Connect protocol.

    Args:
        upstream: the services.
        calls: counts open streams, and knows what travels beside messages, for both protocols.
        limits: what one call may take.
        forwarding: which metadata leaves.
    """

    def __init__(
        self, upstream: Upstream, calls: Calls, limits: CallLimits, forwarding: Forwarding
    ) -> None:
        self._upstream = upstream
        self._calls = calls
        self._limits = limits
        self._forwarding = forwarding

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
            message = "Client streams need HTTP/2 over Connect: use the REST path, or gRPC."
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
        if not route.method.has_side_effects:
            exchange.cancel_when_client_leaves()  # an effect goes on: the client may only be gone
        reply = await self._upstream.unary(route.method, request, self._calls.caller_of(exchange))
        if reply.is_replayed and exchange.charge is not None:
            charging.note_replay(exchange.charge)
        await self._respond(exchange, reply, given)

    async def _respond(self, exchange: Exchange, reply: Reply, given: GetRequest) -> None:
        route = exchange.call
        headers = [
            (b"content-type", f"application/{given.codec.name}".encode()),
            (b"cache-control", cache_control(route)),
            (b"accept-encoding", GZIP.encode()),
        ]
        if reply.is_replayed:
            headers.append((b"idempotency-replayed", b"true"))
        crossing = self._forwarding.of(route.method)
        if crossing.leaving:
            headers += headers_of(crossing, reply.initial)
            headers += [(TRAILER + n, value) for n, value in headers_of(crossing, reply.trailing)]
        body = given.codec.encode(route, reply.message)
        if is_worth_compressing(body) and shape_of(route).may_compress:
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
        crossing = self._forwarding.of(route.method)
        with self._calls.opened(exchange) as ended:
            stream = self._upstream.stream(route.method, request, self._calls.caller_of(exchange))
            answer = self._stream_answer(exchange, codec, partial(_trailing, stream, crossing))
            leading = partial(_leading, crossing) if crossing.leaving else None
            await streams.relay(answer, stream, ended=ended, headers=leading)

    def _stream_answer(
        self, exchange: Exchange, codec: Codec, trailing: Callable[[], Awaitable[HeaderList]]
    ) -> "ConnectAnswer":
        route = exchange.call
        gzip = shape_of(route).may_compress and takes_gzip(
            exchange.header("connect-accept-encoding"),
            exchange.header("connect-content-encoding"),
        )
        headers = [(b"connect-accept-encoding", GZIP.encode())]
        if gzip:
            headers.append((b"connect-content-encoding", GZIP.encode()))
        return ConnectAnswer(
            exchange,
            ConnectFraming(codec, gzip=gzip),
            encode=partial(codec.encode, route),
            problem=partial(error_json, request_id=exchange.request_id, route=route),
            heartbeat_s=None,
            headers=headers,
            trailing=trailing,
        )

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


async def _no_metadata() -> HeaderList:
    return []


@dataclass
class ConnectAnswer(streams.Answer):
    """See StreamAnswer.

    Attributes:
        trailing: what of the service's trailing metadata leaves, in the last envelope.
    """

    trailing: Callable[[], Awaitable[HeaderList]] = _no_metadata

    async def close(self, error: TenfoldError | None) -> None:
        """See StreamAnswer.close."""
        problem = self.problem(error) if error is not None else b""
        await self.exchange.write(end_of_stream(problem, await self.trailing()))
        await self.exchange.finish()


def _leading(crossing: Crossing, metadata: Mapping[str, str]) -> HeaderList:
    return headers_of(crossing, in_bytes(metadata))


async def _trailing(stream: UpstreamStream, crossing: Crossing) -> HeaderList:
    """What leaves of a call that has ended; nothing of one that ends without a word."""
    if not crossing.leaving:
        return []
    try:
        async with asyncio.timeout(streams.METADATA_S):
            metadata = await stream.trailing_metadata()
    except TimeoutError:
        return []
    return headers_of(crossing, in_bytes(metadata))
