"""One HTTP request and its answer, as the steps of `edge.app` see them."""

import asyncio
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from edge.charges import Charge
from edge.refusals import BodyTooLarge, ClientLeft, HttpRefusal, RequestTimeout
from edge.routes import Route
from shared.identity import PUBLIC, Principal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]

# A client that reads nothing for this long has left without saying so.
WRITE_TIMEOUT_S = 30.0
# After an early answer, what is still read of the body so that the client sees the answer
# and not a reset (RFC 9112 §9.6).
LINGER_BYTES_MAX = 16 * 1024 * 1024
LINGER_S = 2.0

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~-]{1,128}")
_TRACEPARENT = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_SECURITY_HEADERS: HeaderList = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


@dataclass
class Exchange:
    """One request, what the steps have learnt about it, and the way to answer.

    Attributes:
        method: the HTTP method, upper case.
        raw_path: the undecoded target without its query.
        query: the undecoded query.
        headers: lower-case name -> value; where a name came twice, joined by a comma, so
            that a check of the value sees both.
        address: the client's address; behind proxies, what the last trusted one saw.
        request_id: the client's, if it is well formed, else a new one.
        traceparent: the client's W3C trace context, if it is well formed, else "".
        deadline_s: time.monotonic() by which the answer must be there; set by a step.
        answer_headers: what the steps add to whatever is answered.
    """

    scope: Scope
    receive: Receive
    send: Send
    address: str
    headers: dict[bytes, bytes]
    started_s: float = field(default_factory=time.monotonic)
    request_id: str = ""
    traceparent: str = ""
    route: Route | None = None
    captures: dict[str, str] = field(default_factory=dict)
    principal: Principal = PUBLIC
    charge: Charge | None = None
    deadline_s: float = 0.0
    answer_headers: HeaderList = field(default_factory=list)
    status: int = 0
    is_answered: bool = False
    body_is_read: bool = False

    @classmethod
    def of(cls, scope: Scope, receive: Receive, send: Send, *, trusted_hops: int) -> "Exchange":
        """The exchange of an ASGI call."""
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers[name] = headers[name] + b", " + value if name in headers else value
        exchange = cls(scope, receive, send, _address(scope, headers, trusted_hops), headers)
        exchange.request_id = _well_formed(_REQUEST_ID, headers.get(b"x-request-id")) or uuid4().hex
        exchange.traceparent = _well_formed(_TRACEPARENT, headers.get(b"traceparent"))
        return exchange

    @property
    def method(self) -> str:
        """The HTTP method, upper case."""
        return str(self.scope["method"])

    @property
    def raw_path(self) -> bytes:
        """The undecoded target without its query."""
        return bytes(self.scope["raw_path"])

    @property
    def query(self) -> bytes:
        """The undecoded query."""
        return bytes(self.scope["query_string"])

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
        value = self.headers.get(name.encode(), b"")
        if not value.isascii() or not value.decode("ascii").isprintable():
            raise HttpRefusal(f"The header {name} must be visible ASCII.")
        return value.decode("ascii")

    # The body
    async def read_body(self, *, bytes_max: int, timeout_s: float) -> bytes:
        """The whole body.

        Raises:
            BodyTooLarge: it is longer than bytes_max; no more than that was read.
            RequestTimeout: it took longer than timeout_s.
            ClientLeft: the client closed before it was whole.
        """
        chunks = BodyChunks(self, bytes_max=bytes_max, idle_s=timeout_s)
        body = bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                while chunk := await chunks.next():
                    body += chunk
        except TimeoutError as error:
            raise RequestTimeout(f"The body took longer than {timeout_s:g} s.") from error
        return bytes(body)

    # The answer
    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Send status and headers; the security headers and the request id are added."""
        assert not self.is_answered
        self.is_answered = True
        self.status = status
        named = [*headers, *self.answer_headers, *_SECURITY_HEADERS]
        if self.charge is not None:
            named += self.charge.headers()
        named.append((b"x-request-id", self.request_id.encode("ascii")))
        if not self.body_is_read and self.has_body:
            named.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": named})

    async def write(self, chunk: bytes) -> None:
        """Send a part of the body; waits while the client is slow.

        Raises:
            ClientLeft: the client read nothing for WRITE_TIMEOUT_S.
        """
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self) -> None:
        """End the answer; what is left of an unread body is read for a moment first."""
        if not self.body_is_read and self.has_body:
            await self._linger()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def respond(
        self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes = b""
    ) -> None:
        """Send a whole answer."""
        lengths = [] if status in (204, 304) else [(b"content-length", b"%d" % len(body))]
        await self.start(status, [*headers, *lengths])
        if self.has_body and not self.body_is_read:
            await self.write(body)
            await self.finish()
        else:
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    @property
    def has_body(self) -> bool:
        """Whether the request announced a body."""
        length = self.headers.get(b"content-length", b"0")
        return b"transfer-encoding" in self.headers or length.strip(b" \t0") != b""

    async def until_client_leaves(self) -> None:
        """Return when the connection is closed; only after the body is read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self.send(message)
        except TimeoutError as error:
            raise ClientLeft from error

    async def _linger(self) -> None:
        left_bytes = LINGER_BYTES_MAX
        try:
            async with asyncio.timeout(LINGER_S):
                while left_bytes > 0 and not self.body_is_read:
                    message = await self.receive()
                    left_bytes -= len(message.get("body", b""))
                    self.body_is_read = not message.get("more_body", False)
        except TimeoutError:
            return


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
            raise self._too_large()

    async def next(self) -> bytes:
        """The next chunk, not empty; b"" after the last.

        Raises:
            BodyTooLarge: there is more than bytes_max.
            RequestTimeout: nothing came for idle_s.
            ClientLeft: the client closed before the end.
        """
        while not self._exchange.body_is_read:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            self._exchange.body_is_read = not message.get("more_body", False)
            chunk = bytes(message.get("body", b""))
            self._read_bytes += len(chunk)
            if self._read_bytes > self._bytes_max:
                raise self._too_large()
            if chunk:
                return chunk
        return b""

    async def _receive(self) -> Message:
        try:
            async with asyncio.timeout(self._idle_s):
                return await self._exchange.receive()
        except TimeoutError as error:
            raise RequestTimeout(f"The body stopped for {self._idle_s:g} s.") from error

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is longer than {self._bytes_max} bytes.")


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


def _address(scope: Scope, headers: dict[bytes, bytes], trusted_hops: int) -> str:
    """The peer, or what the farthest trusted proxy saw; the client's own claims are ignored."""
    peer = scope["client"][0] if scope.get("client") else ""
    if trusted_hops == 0:
        return peer
    hops = headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",")
    return hops[-trusted_hops].strip() if len(hops) >= trusted_hops and hops[0] else peer


def _well_formed(pattern: re.Pattern[bytes], value: bytes | None) -> str:
    return value.decode("ascii") if value and pattern.fullmatch(value) else ""
