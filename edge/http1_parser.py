"""Bytes -> HTTP/1.1 requests, bounded (RFC 9112).

httptools parses. It is strict about most of what smuggles requests (RFC 9112 §6.3): two lengths,
bare line feeds, folded headers, bad chunk sizes. It does not bound the head of a request, chunk
extensions or the time they take; it reports trailers as if they were headers, and it takes
HTTP/0.9 and transfer codings other than "chunked". That is closed here, and whatever is refused
here closes the connection: after a framing error nothing on it can be trusted.
"""

import re
from typing import NoReturn, Protocol

import httptools

from edge.http1_request import Connection, Http1Request
from edge.http1_text import HeaderList, Refusal

# What nginx takes in one header line; proxies in front refuse longer targets themselves.
TARGET_BYTES_MAX = 8 * 1024
HEAD_BYTES_MAX = 32 * 1024
HEADERS_MAX = 100
# Chunk sizes, extensions and trailers beside the body. The smallest honest chunk carries
# one byte in six, so overhead may grow with the body, but not without it.
CHUNK_OVERHEAD_BYTES_MAX = 64 * 1024
CHUNK_OVERHEAD_PER_BYTE = 8

# Two of these and two readers may disagree about whom or how much the request means.
_ONCE_ONLY = (b"host", b"content-length", b"transfer-encoding", b"content-type")
# RFC 9112 §3.2.2; without user information, which RFC 9110 §4.2.4 has taken out of use.
_ABSOLUTE = re.compile(rb"(?i:https?)://([A-Za-z0-9\-._~%!$&'()*+,;=:\[\]]+)(/.*|\?.*|)")


class Sink(Connection, Protocol):
    """What the parser tells a connection, which decides about turns and flow."""

    def now_s(self) -> float:
        """The loop's time."""
        ...

    def take(self, request: Http1Request) -> None:
        """A request whose headers are there.

        Raises:
            Refusal: it is one too many.
        """
        ...

    def pause_reading(self) -> None:
        """The body that arrives is not read as fast as it comes."""
        ...

    def take_upgrade(self) -> None:
        """Bytes in another protocol may follow."""
        ...


class RequestParser:
    """Takes one connection's requests apart.

    Attributes:
        arriving: the request whose body arrives; None between two.
        headers: of the head that arrives, or that was the last.
        head_since_s: when the unfinished head began; 0 outside one.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._parser = httptools.HttpRequestParser(self)
        self.arriving: Http1Request | None = None
        self.headers: HeaderList = []
        self.head_since_s = 0.0
        self._target = b""
        self._is_in_head = True
        self._is_same_head = True  # since the last bytes came
        self._data_bytes = 0  # that came last
        self._head_bytes = 0  # of an unfinished head, as they came from the wire
        self._wire_bytes = 0  # of an unfinished body, as they came from the wire
        self._body_bytes = 0  # of the same body, without its chunk framing
        self._refusal: Refusal | None = None

    def feed(self, data: bytes) -> None:
        """Take what came.

        Raises:
            Refusal: nothing that comes from now on can be trusted.
        """
        self._is_same_head = self._is_in_head
        self._data_bytes = len(data)
        try:
            self._parser.feed_data(data)
            self._bound_what_is_unfinished(len(data))
        except httptools.HttpParserUpgrade:
            # The upgrade is declined by answering in HTTP/1.1 (RFC 9110 §7.8).
            self._sink.take_upgrade()
        except httptools.HttpParserInvalidMethodError:
            raise Refusal(501, "This server does not know the method.") from None
        except httptools.HttpParserError:
            raise self._refusal or Refusal(400, "The request is not valid HTTP/1.1.") from None

    # httptools' callbacks
    def on_message_begin(self) -> None:
        """A request has begun; the first one's time runs since the connection was made."""
        self.head_since_s = self.head_since_s or self._sink.now_s()
        self._target = b""
        self.headers = []

    def on_url(self, url: bytes) -> None:
        """Bound the target while it arrives."""
        self._target += url
        if len(self._target) > TARGET_BYTES_MAX:
            self._stop(414, f"The target is longer than {TARGET_BYTES_MAX} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bound headers while they arrive; drop trailers, which would look like headers."""
        if not self._is_in_head:
            return
        self.headers.append((name.lower(), value))
        if len(self.headers) > HEADERS_MAX:
            self._stop(431, f"More than {HEADERS_MAX} headers.")

    def on_headers_complete(self) -> None:
        """Check the target and what frames the body, then let the request begin."""
        if self._target[:1] != b"/":
            self._take_absolute_target()
        if not self._target.isascii():
            self._stop(400, "The target holds bytes that must be percent-encoded.")
        method = self._parser.get_method().decode("ascii")
        request = Http1Request(self._sink, method, self._target, self.headers)
        self._check_framing(request)
        request.keeps_alive = self._parser.should_keep_alive()
        try:
            self._sink.take(request)
        except Refusal as refusal:
            self._refusal = refusal
            raise
        self._is_in_head = self._is_same_head = False
        self._head_bytes = self._wire_bytes = self._body_bytes = 0
        self.head_since_s = 0.0
        self.arriving = request

    def on_body(self, body: bytes) -> None:
        """A part of the body of the request that arrives."""
        self._body_bytes += len(body)
        request = self.arriving
        if request is not None and not request.feed(body):
            self._sink.pause_reading()

    def on_message_complete(self) -> None:
        """The next bytes are a new head."""
        self._is_in_head = True
        if self.arriving is not None:
            self.arriving.complete()
            self.arriving = None

    # Checks
    def _take_absolute_target(self) -> None:
        """A target with scheme and host, which every server takes (RFC 9112 §3.2.2).

        Its host is the request's: a Host header that says another must not count.
        """
        found = _ABSOLUTE.fullmatch(self._target)
        if found is None:
            self._stop(400, "The target must be a path, or begin with http:// or https://.")
        host, path = found.groups()
        self._target = path if path.startswith(b"/") else b"/" + path
        others = [header for header in self.headers if header[0] != b"host"]
        host_count = len(self.headers) - len(others)
        if host_count > 1:
            self._stop(400, "host came twice.")
        if host_count or self._parser.get_http_version() == "1.0":
            self.headers = [(b"host", host), *others]

    def _check_framing(self, request: Http1Request) -> None:
        request.version = version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._stop(505, "This server speaks HTTP/1.1.")
        may_be_long = self._head_bytes + self._data_bytes > HEAD_BYTES_MAX
        if may_be_long and _size(self.headers) > HEAD_BYTES_MAX:
            self._stop(431, f"The headers are longer than {HEAD_BYTES_MAX} bytes.")
        named = dict(self.headers)
        if len(named) < len(self.headers):
            names = [name for name, _ in self.headers]
            for name in _ONCE_ONLY:
                if names.count(name) > 1:
                    self._stop(400, f"{name.decode()} came twice.")
        if version == "1.1" and b"host" not in named:
            self._stop(400, "An HTTP/1.1 request names its host.")
        coding = named.get(b"transfer-encoding")
        # Exactly this spelling: proxies differ over the others, httptools takes several.
        if coding is not None and (coding != b"chunked" or version == "1.0"):
            self._stop(400, 'The only transfer coding taken is "chunked".')
        if named.get(b"expect", b"").lower() == b"100-continue" and version == "1.1":
            request.expect_continue()

    def _bound_what_is_unfinished(self, data_bytes: int) -> None:
        """Bound what httptools keeps to itself: half a header, a chunk's extension."""
        if self._is_in_head:
            # Bytes that also held the end of a head, and perhaps a body, are not counted.
            self._head_bytes = self._head_bytes + data_bytes if self._is_same_head else 0
            if self._head_bytes > HEAD_BYTES_MAX + TARGET_BYTES_MAX:
                raise Refusal(431, f"The headers are longer than {HEAD_BYTES_MAX} bytes.")
            return
        self._wire_bytes += data_bytes
        overhead_max = CHUNK_OVERHEAD_BYTES_MAX + CHUNK_OVERHEAD_PER_BYTE * self._body_bytes
        if self._wire_bytes - self._body_bytes > overhead_max:
            raise Refusal(400, "The chunks carry more framing than body.")

    def _stop(self, status: int, detail: str) -> NoReturn:
        # httptools wraps what its callbacks raise.
        self._refusal = Refusal(status, detail)
        raise self._refusal


def _size(headers: HeaderList) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers)
