"""HTTP/1.1 framing: what uvicorn and httptools let through, closed here.

httptools is strict about most of what smuggles requests (RFC 9112 §6.3): two lengths, bare
line feeds, folded headers, bad chunk sizes. It does not bound the head of a request, chunk
extensions or the time they take; it reports trailers as if they were headers, and it takes
HTTP/0.9 and transfer codings other than "chunked". Whatever is refused here closes the
connection: after a framing error nothing on it can be trusted.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NoReturn

import httptools
import orjson
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

# What nginx takes in one header line; proxies in front refuse longer targets themselves.
TARGET_BYTES_MAX = 8 * 1024
HEAD_BYTES_MAX = 32 * 1024
HEADERS_MAX = 100
# Requests of one connection that may wait for their turn; browsers use none, tools a few.
PIPELINED_MAX = 16
# Chunk sizes, extensions and trailers beside the body. The smallest honest chunk carries
# one byte in six, so overhead may grow with the body, but not without it.
CHUNK_OVERHEAD_BYTES_MAX = 64 * 1024
CHUNK_OVERHEAD_PER_BYTE = 8

# Two of these and two readers may disagree about whom or how much the request means.
_ONCE_ONLY = (b"host", b"content-length", b"transfer-encoding", b"content-type")
_CODES = {400: "INVALID_ARGUMENT", 408: "DEADLINE_EXCEEDED", 501: "UNIMPLEMENTED"}


@dataclass
class ConnectionLimits:
    """What connections may take; one object per server, shared by its connections.

    Attributes:
        head_timeout_s: from the first byte of a request to the end of its headers.
        per_address_max: open connections from one address.
        open_by_address: how many there are.
    """

    head_timeout_s: float
    per_address_max: int
    open_by_address: Counter[str] = field(default_factory=Counter)


class _Refused(Exception):
    """This request ends its connection, with this status."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def protocol_class(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """The class that uvicorn instantiates for each connection."""

    class LimitedProtocol(EdgeHttpProtocol):
        connection_limits = limits

    return LimitedProtocol


class EdgeHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on head, time, connections and pipelining."""

    connection_limits: ConnectionLimits

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._address = ""
        self._is_in_head = True
        self._is_same_head = True  # since the last bytes came
        self._head_bytes = 0  # of an unfinished head, as they came from the wire
        self._wire_bytes = 0  # of an unfinished body, as they came from the wire
        self._body_bytes = 0  # of the same body, without its chunk framing
        self._head_timer: asyncio.TimerHandle | None = None
        self._refusal: _Refused | None = None

    # Connection
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and give its first request's head a time limit."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        counts = self.connection_limits.open_by_address
        counts[self._address] += 1
        if counts[self._address] > self.connection_limits.per_address_max:
            transport.close()
            return
        self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Uncount it, and let go of its timers."""
        counts = self.connection_limits.open_by_address
        counts[self._address] -= 1
        if counts[self._address] <= 0:
            del counts[self._address]
        self._disarm_head_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; what cannot be parsed gets one problem document and a closed connection."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._is_same_head = self._is_in_head
        try:
            self.parser.feed_data(data)
            self._bound_what_is_unfinished(len(data))
        except httptools.HttpParserUpgrade:
            # The upgrade is declined by answering in HTTP/1.1 (RFC 9110 §7.8); bytes in
            # the other protocol may follow, so this is the connection's last request.
            self.cycle.keep_alive = False
        except httptools.HttpParserInvalidMethodError:
            self._refuse(_Refused(501, "This server does not know the method."))
        except (httptools.HttpParserError, _Refused):
            self._refuse(self._refusal or _Refused(400, "The request is not valid HTTP/1.1."))

    # Parser callbacks
    def on_message_begin(self) -> None:
        """A request has begun: its head has only so long."""
        super().on_message_begin()
        self._arm_head_timer()

    def on_url(self, url: bytes) -> None:
        """Bound the target while it arrives."""
        super().on_url(url)
        if len(self.url) > TARGET_BYTES_MAX:
            self._stop(414, f"The target is longer than {TARGET_BYTES_MAX} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bound headers while they arrive; drop trailers, which would look like headers."""
        if not self._is_in_head:
            return
        super().on_header(name, value)
        if len(self.headers) > HEADERS_MAX:
            self._stop(431, f"More than {HEADERS_MAX} headers.")

    def on_headers_complete(self) -> None:
        """Check what frames the body, then let the request begin."""
        self._check_target()
        self._check_framing()
        if len(self.pipeline) >= PIPELINED_MAX:
            self._stop(429, f"More than {PIPELINED_MAX} requests wait on this connection.")
        self._is_in_head = self._is_same_head = False
        self._head_bytes = self._wire_bytes = self._body_bytes = 0
        self._disarm_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See HttpToolsProtocol."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next bytes are a new head."""
        self._is_in_head = True
        super().on_message_complete()

    # Checks
    def _check_target(self) -> None:
        if self.url[:1] != b"/":
            self._stop(400, "The target must be a path.")
        if not self.url.isascii():
            self._stop(400, "The target holds bytes that must be percent-encoded.")

    def _check_framing(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._stop(505, "This server speaks HTTP/1.1.")
        if sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_BYTES_MAX:
            self._stop(431, f"The headers are longer than {HEAD_BYTES_MAX} bytes.")
        names = [name for name, _ in self.headers]
        for name in _ONCE_ONLY:
            if names.count(name) > 1:
                self._stop(400, f"{name.decode()} came twice.")
        if version == "1.1" and b"host" not in names:
            self._stop(400, "An HTTP/1.1 request names its host.")
        coding = dict(self.headers).get(b"transfer-encoding")
        # Exactly this spelling: proxies differ over the others, httptools takes several.
        if coding is not None and (coding != b"chunked" or version == "1.0"):
            self._stop(400, 'The only transfer coding taken is "chunked".')

    def _bound_what_is_unfinished(self, data_bytes: int) -> None:
        """Bound what httptools keeps to itself: half a header, a chunk's extension."""
        if self._is_in_head:
            if self.cycle is None or self.cycle.response_complete:
                self._arm_head_timer()  # also for blank lines that never begin a request
            # Bytes that also held the end of a head, and perhaps a body, are not counted.
            self._head_bytes = self._head_bytes + data_bytes if self._is_same_head else 0
            if self._head_bytes > HEAD_BYTES_MAX + TARGET_BYTES_MAX:
                self._stop(431, f"The headers are longer than {HEAD_BYTES_MAX} bytes.")
            return
        self._wire_bytes += data_bytes
        overhead_max = CHUNK_OVERHEAD_BYTES_MAX + CHUNK_OVERHEAD_PER_BYTE * self._body_bytes
        if self._wire_bytes - self._body_bytes > overhead_max:
            self._stop(400, "The chunks carry more framing than body.")

    def _stop(self, status: int, detail: str) -> NoReturn:
        self._refusal = _Refused(status, detail)
        raise self._refusal

    def _refuse(self, refusal: _Refused) -> None:
        """Answer if no other answer is under way, and close."""
        is_idle = self.cycle is None or self.cycle.response_complete
        may_answer = is_idle or not (self.cycle.response_started or self.pipeline)
        if not is_idle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if may_answer:
            self.transport.write(_answer(refusal))
        self.transport.close()

    # Time
    def _arm_head_timer(self) -> None:
        if self._head_timer is None:
            timeout_s = self.connection_limits.head_timeout_s
            self._head_timer = self.loop.call_later(timeout_s, self._end_slow_head)

    def _disarm_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_slow_head(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(_Refused(408, "The headers took too long."))


def _answer(refusal: _Refused) -> bytes:
    document = {
        "type": "about:blank",
        "title": HTTPStatus(refusal.status).phrase,
        "status": refusal.status,
        "detail": refusal.detail,
        "code": _CODES.get(refusal.status, "INVALID_ARGUMENT"),
        "reason": "BAD_HTTP",
    }
    body = orjson.dumps(document)
    head = (
        f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n"
        "content-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\n"
        "x-content-type-options: nosniff\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
