"""One HTTP request and its answer, as the steps of `edge.app` see them."""

import asyncio
import ipaddress
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from edge.charges import Charge
from edge.http1_request import Http1Request
from edge.http1_text import HeaderList
from edge.refusals import BodyTooLarge, ClientLeft, HttpRefusal, RequestTimeout
from edge.request_ids import request_id_of
from edge.routes import Route
from shared.errors import DeadlineExceeded
from shared.identity import PUBLIC, Principal

# Blocks of addresses that were seen last; to work one out costs more than to route a request.
ADDRESSES_KEPT_MAX = 4096

_TRACEPARENT = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_SECURITY_HEADERS = (
    b"x-content-type-options: nosniff\r\nreferrer-policy: no-referrer\r\nx-frame-options: DENY\r\n"
)


@dataclass(slots=True)
class Exchange:
    """One request, what the steps have learnt about it, and the way to answer.

    Attributes:
        request: as it came, and the way to answer.
        headers: lower-case name -> value; where a name came twice, joined by a comma, so
            that a check of the value sees both.
        address: the client's address; behind proxies, what the last trusted one saw.
        request_id: the client's, if it is well formed, else a new one.
        traceparent: the client's W3C trace context, if it is well formed, else "".
        deadline_s: time.monotonic() by which the answer must be there; set by a step.
        answer_headers: what the steps add to whatever is answered.
    """

    request: Http1Request
    address: str
    headers: dict[bytes, bytes]
    request_id: str
    started_s: float = field(default_factory=time.monotonic)
    traceparent: str = ""
    route: Route | None = None
    captures: dict[str, str] = field(default_factory=dict)
    principal: Principal = PUBLIC
    charge: Charge | None = None
    deadline_s: float = 0.0
    answer_headers: HeaderList = field(default_factory=list)
    status: int = 0
    _head: bytes = b""  # of an answer whose first part is not written yet

    @classmethod
    def of(cls, request: Http1Request, *, trusted_hops: int) -> "Exchange":
        """The exchange that answers a request."""
        headers = dict(request.headers)
        if len(headers) < len(request.headers):
            headers = _joined(request.headers)
        address = _address(request.address, headers, trusted_hops) if trusted_hops else None
        exchange = cls(
            request,
            request.address if address is None else address,
            headers,
            request_id_of(headers),
        )
        if b"traceparent" in headers:
            exchange.traceparent = _well_formed(_TRACEPARENT, headers[b"traceparent"])
        return exchange

    @property
    def method(self) -> str:
        """The HTTP method, upper case."""
        return self.request.method

    @property
    def raw_path(self) -> bytes:
        """The undecoded target without its query."""
        return self.request.raw_path

    @property
    def query(self) -> bytes:
        """The undecoded query."""
        return self.request.query

    @property
    def is_answered(self) -> bool:
        """Whether an answer has begun."""
        return self.request.is_answered

    @property
    def body_is_read(self) -> bool:
        """Whether nothing of the request's body is left to come."""
        return self.request.body_is_read

    @property
    def call(self) -> Route:
        """The route that a step has found."""
        assert self.route is not None
        return self.route

    def remaining_s(self) -> float:
        """Seconds until the deadline; negative when it has passed."""
        return self.deadline_s - time.monotonic()

    def header(self, name: str) -> str:
        """A request header's text; "" if absent.

        Raises:
            HttpRefusal: it is not visible ASCII.
        """
        value = self.headers.get(name.encode())
        if not value:
            return ""
        if not value.isascii() or not value.decode("ascii").isprintable():
            raise HttpRefusal(f"The header {name} must be visible ASCII.")
        return value.decode("ascii")

    # The body
    async def read_body(self, *, bytes_max: int, timeout_s: float) -> bytes:
        """The whole body.

        Raises:
            BodyTooLarge: it is longer than bytes_max; no more than that was read.
            RequestTimeout: it took longer than timeout_s.
            DeadlineExceeded: the request's own deadline came first.
            ClientLeft: the client closed before it was whole.
        """
        chunks = BodyChunks(self, bytes_max=bytes_max, idle_s=timeout_s)
        if self.request.is_whole:
            return self._buffered_body(bytes_max)
        body = bytearray()
        left_s = self.remaining_s()
        try:
            async with asyncio.timeout(min(timeout_s, left_s)):
                while chunk := await chunks.next():
                    body += chunk
        except TimeoutError as error:
            if left_s < timeout_s:
                raise spent_in_request() from error
            raise RequestTimeout(f"The body took longer than {timeout_s:g} s.") from error
        return bytes(body)

    def _buffered_body(self, bytes_max: int) -> bytes:
        """The usual body: it came with its head."""
        body = self.request.take_rest()
        if len(body) > bytes_max:
            raise too_large(bytes_max)
        return body

    # The answer
    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin an answer; the security headers and the request id are added.

        The head goes out with the first part of the body.
        """
        self._head = self._begin(status, headers)

    async def write(self, chunk: bytes) -> None:
        """Send a part of the body; waits while the client is slow.

        Raises:
            ClientLeft: the client is gone, or read nothing for a long while.
        """
        head, self._head = self._head, b""
        self.request.write(head, chunk, is_last=False)
        await self.request.drained()

    async def finish(self) -> None:
        """End the answer."""
        head, self._head = self._head, b""
        self.request.write(head, b"", is_last=True)
        if not self.request.has_left:
            await self.request.drained()

    async def respond(
        self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes = b""
    ) -> None:
        """Send a whole answer."""
        lengths = [] if status in (204, 304) else [(b"content-length", b"%d" % len(body))]
        head = self._begin(status, [*headers, *lengths])
        self.request.write(head, body, is_last=True)

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        assert not self.is_answered
        self.status = status
        named = [*headers, *self.answer_headers]
        if self.charge is not None:
            named += self.charge.headers()
        named.append((b"x-request-id", self.request_id.encode("ascii")))
        if not self.body_is_read and self.has_body:
            self.request.keeps_alive = False
        return self.request.begin(status, named, _SECURITY_HEADERS)

    @property
    def has_body(self) -> bool:
        """Whether the request announced a body."""
        length = self.headers.get(b"content-length", b"0")
        return b"transfer-encoding" in self.headers or length.strip(b" \t0") != b""

    def cancel_when_client_leaves(self) -> None:
        """Cancel the current task when the connection is closed: what it reads, nobody reads.

        Raises:
            ClientLeft: it is closed already.
        """
        if self.request.has_left:
            raise ClientLeft
        task = asyncio.current_task()
        assert task is not None
        self.request.on_left = task.cancel

    async def until_client_leaves(self) -> None:
        """Return when the connection is closed; only after the body is read."""
        await self.request.until_left()


class BodyChunks:
    """A request body as it arrives: reading slower makes the client send slower.

    Args:
        exchange: whose body.
        bytes_max: what it may hold in all.
        idle_s: how long the client may send nothing.

    Raises:
        BodyTooLarge: at once, if Content-Length already says so.
    """

    def __init__(self, exchange: Exchange, *, bytes_max: int, idle_s: float) -> None:
        self._exchange = exchange
        self._bytes_max = bytes_max
        self._idle_s = idle_s
        self._read_bytes = 0
        if int(exchange.headers.get(b"content-length", b"0")) > bytes_max:
            raise too_large(self._bytes_max)

    async def next(self) -> bytes:
        """The next chunk, not empty; b"" after the last.

        Raises:
            BodyTooLarge: there is more than bytes_max.
            RequestTimeout: nothing came for idle_s.
            ClientLeft: the client closed before the end.
        """
        if self._exchange.body_is_read:
            return b""
        chunk = await self._receive()
        self._read_bytes += len(chunk)
        if self._read_bytes > self._bytes_max:
            raise too_large(self._bytes_max)
        return chunk

    async def _receive(self) -> bytes:
        try:
            async with asyncio.timeout(self._idle_s):
                return await self._exchange.request.next_chunk()
        except TimeoutError as error:
            raise RequestTimeout(f"The body stopped for {self._idle_s:g} s.") from error


def spent_in_request() -> DeadlineExceeded:
    """The refusal of a request whose time was over before its call could begin."""
    return DeadlineExceeded(
        "The time was spent before the call began.", metadata={"where": "request"}
    )


def too_large(bytes_max: int) -> BodyTooLarge:
    """The refusal of a body that is longer than it may be."""
    return BodyTooLarge(f"The body is longer than {bytes_max} bytes.")


@lru_cache(maxsize=ADDRESSES_KEPT_MAX)
def address_block(address: str) -> str:
    """What one subscriber usually holds: the /24 of an IPv4 address, the /64 of an IPv6 one."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    prefix = 24 if parsed.version == 4 else 64
    return str(ipaddress.ip_network((parsed, prefix), strict=False))


def _address(peer: str, headers: dict[bytes, bytes], trusted_hops: int) -> str:
    """What the farthest trusted proxy saw; the client's own claims are ignored."""
    hops = headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",")
    return hops[-trusted_hops].strip() if len(hops) >= trusted_hops and hops[0] else peer


def _joined(pairs: HeaderList) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for name, value in pairs:
        headers[name] = headers[name] + b", " + value if name in headers else value
    return headers


def _well_formed(pattern: re.Pattern[bytes], value: bytes | None) -> str:
    return value.decode("ascii") if value and pattern.fullmatch(value) else ""
