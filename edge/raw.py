"""Raw bindings: bytes in, bytes out, for what google.api.http cannot say.

The body goes to a `stream HttpBody -> stream HttpBody` method in the chunks in which it
arrives, no faster than the service takes them. A client that leaves in the middle cancels
the call: half-closing instead would look like the end of a short body. What the service
had made durable by then is its own to keep; a resumable upload asks for its offset.
"""

import asyncio
from collections.abc import Awaitable, Iterator, Mapping
from typing import Protocol
from urllib.parse import quote

from google.protobuf.message import Message

from edge.exchange import BodyChunks, Exchange
from edge.http1_text import HeaderList
from edge.idempotency import key_of
from edge.refusals import ClientLeft, HttpRefusal
from edge.routes import Route
from shared.errors import Internal, NotFound, TenfoldError, Unavailable

# A gRPC message; well below the 4 MiB that services receive, large enough to be cheap.
CHUNK_BYTES_MAX = 256 * 1024

RETRY_AFTER_S = 0.5

STATUS_KEY = "http-status"
HEADER_KEY = "http-header-"
PATH_KEY = "http-path-"


class RawCall(Protocol):
    """A running bidirectional call."""

    async def write(self, message: Message) -> bool:
        """Send a message, waiting while the service is slow; False if it reads no more."""
        ...

    async def done_writing(self) -> None:
        """Tell the service that the body is whole."""
        ...

    async def read(self) -> Message | None:
        """The next message; None after the last.

        Raises:
            TenfoldError: the service ended the call with an error.
        """
        ...

    async def initial_metadata(self) -> Mapping[str, str]:
        """What the service sent before its first message."""
        ...

    def cancel(self) -> None:
        """End the call; safe to repeat."""
        ...


def raw_metadata(exchange: Exchange, *, public_url: str) -> list[tuple[str, str]]:
    """What a raw method learns of the request beside its body.

    Args:
        exchange: the request, its route already found.
        public_url: scheme and host under which clients reach the edge; "" takes them from
            the request.

    Raises:
        HttpRefusal: an allow-listed header is not visible ASCII.
        NotFound: a path variable is not; no such name exists.
    """
    metadata = [("http-method", exchange.method), ("http-url", _url(exchange, public_url))]
    for name, value in exchange.captures.items():
        if not (value.isascii() and value.isprintable()):
            raise NotFound("There is nothing of that name.")
        metadata.append((PATH_KEY + name.lower(), value))
    raw = exchange.call.raw
    assert raw is not None
    for name in raw.request_headers:
        value = exchange.header(name)
        if value:
            metadata.append((HEADER_KEY + name, value))
    key = key_of(exchange)
    return [*metadata, ("idempotency-key", key)] if key else metadata


async def relay(
    exchange: Exchange,
    call: RawCall,
    *,
    body_bytes_max: int,
    body_idle_s: float,
    ended: Awaitable[TenfoldError],
) -> None:
    """Stream the body up and the answer down.

    Args:
        exchange: the request; nothing of its body is read yet.
        call: the running call; cancelled before this returns, however it returns.
        body_bytes_max: what the body may hold.
        body_idle_s: how long the client may send nothing.
        ended: completes with the reason when the edge ends the exchange.

    Raises:
        TenfoldError: the service, or the edge, refused or ended it.
        ClientLeft: the client closed the connection.
    """
    chunks = BodyChunks(exchange, bytes_max=body_bytes_max, idle_s=body_idle_s)
    try:
        async with asyncio.TaskGroup() as group:
            up = group.create_task(_send_body(exchange, chunks, call))
            ending = group.create_task(_raise_result_of(ended))
            first = await call.read()
            if not exchange.body_is_read:
                up.cancel()  # answered early: the rest of the body interests nobody
            await _send_answer(exchange, call, first)
            up.cancel()
            ending.cancel()
    except BaseExceptionGroup as group_error:
        raise _cause(group_error) from None
    finally:
        call.cancel()


async def _raise_result_of(ended: Awaitable[TenfoldError]) -> None:
    raise await ended


async def _send_body(exchange: Exchange, chunks: BodyChunks, call: RawCall) -> None:
    message_class = exchange.call.method.input
    content_type = exchange.header("content-type")
    while chunk := await chunks.next():
        for part in frames_of(chunk):
            if not await call.write(message_class(content_type=content_type, data=part)):
                return
            content_type = ""  # said once
    await call.done_writing()
    # From here on nobody else listens for the client: to leave now is to cancel, too.
    await exchange.until_client_leaves()
    raise ClientLeft


async def _send_answer(exchange: Exchange, call: RawCall, first: Message | None) -> None:
    metadata = await call.initial_metadata()
    if first is None and STATUS_KEY not in metadata:
        # Neither status nor body: the answer was lost on its way, and success is not made up.
        raise Unavailable("the service's answer did not arrive", retry_after_s=RETRY_AFTER_S)
    status = _status(metadata, exchange.call)
    headers = list(_headers(metadata, exchange.call))
    content_type = str(getattr(first, "content_type", ""))
    if content_type:
        headers.append((b"content-type", content_type.encode("ascii", "replace")))
    if not any(name == b"cache-control" for name, _ in headers):
        headers.append((b"cache-control", b"no-store"))
    if first is None and status != 204 and exchange.method != "HEAD":
        headers.append((b"content-length", b"0"))
    left_bytes = _promised_bytes(exchange, status, headers)
    await exchange.start(status, headers)
    message = first
    while message is not None:
        data: bytes = getattr(message, "data", b"")
        if left_bytes is not None:
            left_bytes -= len(data)
            _require_promise(exchange, is_kept=left_bytes >= 0)
        if data:
            await exchange.write(data)
        message = await call.read()
    _require_promise(exchange, is_kept=not left_bytes)
    await exchange.finish()


def _promised_bytes(exchange: Exchange, status: int, headers: HeaderList) -> int | None:
    """The Content-Length that a service gave to a body; None if it gave none, or has no body.

    Raises:
        Internal: it is no number.
    """
    text = dict(headers).get(b"content-length")
    if text is None or exchange.method == "HEAD" or status in (204, 304):
        return None
    _require_promise(exchange, is_kept=text.isdigit())
    return int(text)


def _require_promise(exchange: Exchange, *, is_kept: bool) -> None:
    # What is too much would be read as the next answer of this connection.
    if not is_kept:
        raise Internal(f"{exchange.call.method.full_name} did not keep to its content-length")


def _status(metadata: Mapping[str, str], route: Route) -> int:
    text = metadata.get(STATUS_KEY, "200")
    if not (text.isdigit() and 200 <= int(text) <= 599):
        raise Internal(f"{route.method.full_name} answered with HTTP status {text!r}")
    return int(text)


def _headers(metadata: Mapping[str, str], route: Route) -> Iterator[tuple[bytes, bytes]]:
    assert route.raw is not None
    for name in route.raw.response_headers:
        value = metadata.get(HEADER_KEY + name)
        if value is not None:
            yield name.encode("ascii"), value.encode("latin-1", "replace")


def frames_of(chunk: bytes) -> Iterator[bytes]:
    """A chunk of a body in parts that fit a message."""
    for start in range(0, len(chunk), CHUNK_BYTES_MAX):
        yield chunk[start : start + CHUNK_BYTES_MAX]


def _url(exchange: Exchange, public_url: str) -> str:
    base = public_url or f"http://{exchange.header('host')}"
    path = quote(exchange.raw_path, safe="/%:@!$&'()*+,;=-._~")
    query = quote(exchange.query, safe="/%:@!$&'()*+,;=-._~?")
    return f"{base}{path}?{query}" if query else f"{base}{path}"


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The reason of several: what the edge refused counts before what followed from it."""
    flat = list(group.exceptions)
    for kind in (HttpRefusal, ClientLeft):
        for error in flat:
            if isinstance(error, kind):
                return error
    return flat[0]


__all__ = ["HeaderList", "RawCall", "raw_metadata", "relay"]
