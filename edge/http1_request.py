"""One HTTP/1.1 request as it arrives, and its answer as it leaves."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from edge.http1_text import CONTINUE, HeaderList, date_line, status_line
from edge.refusals import ClientLeft

# Of a body that the app has not read yet; beyond it the socket is read no further.
BODY_BUFFER_BYTES_MAX = 64 * 1024

_BODILESS = frozenset({204, 304})


class Connection(Protocol):
    """What a request needs of the connection that it came on: see http1.Http1Connection."""

    address: str

    @property
    def is_stopping(self) -> bool:
        """Whether the server takes no more requests."""
        ...

    def write(self, data: bytes) -> None:
        """Send bytes."""
        ...

    async def drained(self) -> None:
        """Wait while the client reads slower than bytes are sent."""
        ...

    def resume_body(self) -> None:
        """There is room for more of a body."""
        ...

    def finish(self, request: "Http1Request") -> None:
        """The answer is whole."""
        ...

    def abort(self) -> None:
        """The answer is broken off."""
        ...


class Http1Request:
    """One request, and the way to answer it.

    Attributes:
        method: upper case.
        raw_path, query: of the undecoded target; the query without "?".
        headers: names in lower case, in the order of the request.
        address: the peer's.
        body_is_read: nothing of the body is left to come or to be read.
        has_left: the connection is gone.
    """

    __slots__ = (
        "_buffered_bytes",
        "_chunks",
        "_connection",
        "_expects_continue",
        "_is_bodiless",
        "_is_chunked",
        "_is_complete",
        "_waiter",
        "address",
        "has_left",
        "headers",
        "is_answered",
        "keeps_alive",
        "method",
        "on_left",
        "query",
        "raw_path",
        "version",
    )

    def __init__(
        self, connection: Connection, method: str, target: bytes, headers: HeaderList
    ) -> None:
        self._connection = connection
        self.address = connection.address
        self.method = method
        self.raw_path, _, self.query = target.partition(b"?")
        self.headers = headers
        self.version = "1.1"
        self.keeps_alive = True
        self.has_left = False
        self.is_answered = False
        self.on_left: Callable[[], object] | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._is_complete = False
        self._expects_continue = False
        self._is_chunked = False
        self._is_bodiless = method == "HEAD"
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the whole body has come; it may still be to be read."""
        return self._is_complete

    @property
    def minds_leaving(self) -> bool:
        """Whether something would end if the client were known to have left."""
        return self.on_left is not None or self._waiter is not None

    @property
    def body_is_read(self) -> bool:
        """Whether nothing of the body is left to come or to be read."""
        return self._is_complete and not self._chunks

    # The body
    async def next_chunk(self) -> bytes:
        """The next part of the body as it arrives; b"" after the last.

        Raises:
            ClientLeft: the client closed before the end.
        """
        while not self._chunks:
            if self._is_complete:
                return b""
            if self.has_left:
                raise ClientLeft
            if self._expects_continue:
                self._expects_continue = False
                self._connection.write(CONTINUE)
            await self._wait()
        chunk = self._chunks.popleft()
        self._buffered_bytes -= len(chunk)
        if self._buffered_bytes <= BODY_BUFFER_BYTES_MAX:
            self._connection.resume_body()
        return chunk

    def take_rest(self) -> bytes:
        """All that is left of a body that has come whole."""
        rest = b"".join(self._chunks)
        self._chunks.clear()
        self._buffered_bytes = 0
        self._connection.resume_body()
        return rest

    async def until_left(self) -> None:
        """Return when the connection is closed."""
        while not self.has_left:
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # The answer
    def begin(self, status: int, headers: HeaderList, constant: bytes) -> bytes:
        """The head of the answer as bytes, to be written with what follows it.

        Args:
            status: of the answer.
            headers: names in lower case; with a content-length, or the body is sent in chunks.
            constant: more headers, encoded.
        """
        self.is_answered = True
        self._expects_continue = False  # no word of waiting may follow the answer
        parts, has_length = [], False
        if status in _BODILESS:
            has_length = self._is_bodiless = True  # whatever a service sends along
        for name, value in headers:
            parts.append(name + b": " + value)
            has_length = has_length or name == b"content-length"
        if not has_length:
            if self.version == "1.1":
                self._is_chunked = True
                parts.append(b"transfer-encoding: chunked")
            else:
                self.keeps_alive = False
        if not self.keeps_alive or self._connection.is_stopping:
            self.keeps_alive = False
            parts.append(b"connection: close")
        elif self.version == "1.0":
            parts.append(b"connection: keep-alive")
        block = b"\r\n".join(parts)
        if block.count(b"\n") != len(parts) - 1 or block.count(b"\r") != len(parts) - 1:
            block = b"\r\n".join([part.translate(None, b"\r\n\0") for part in parts])
        return b"".join((status_line(status), date_line(), constant, block, b"\r\n\r\n"))

    def write(self, head: bytes, chunk: bytes, *, is_last: bool) -> None:
        """Send a part of the answer.

        Args:
            head: from `begin`; b"" after the first part.
            chunk: of the body; may be empty.
            is_last: whether the answer is whole with it.
        """
        if self._is_bodiless or not chunk:
            body = b""
        elif self._is_chunked:
            body = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        else:
            body = chunk
        if is_last and self._is_chunked and not self._is_bodiless:
            body += b"0\r\n\r\n"
        if head or body:
            self._connection.write(head + body)
        if is_last:
            self._connection.finish(self)

    async def drained(self) -> None:
        """Wait while the client reads slower than the answer is written.

        Raises:
            ClientLeft: it is gone; who reads nothing for http1.WRITE_TIMEOUT_S is held to be.
        """
        if self.has_left:
            raise ClientLeft
        await self._connection.drained()

    def abort(self) -> None:
        """Break the answer off, so that the client can see that it is not whole."""
        self._connection.abort()

    # What the connection tells
    def feed(self, chunk: bytes) -> bool:
        """Take a part of the body; False if reading should pause."""
        self._chunks.append(chunk)
        self._buffered_bytes += len(chunk)
        self._wake()
        return self._buffered_bytes <= BODY_BUFFER_BYTES_MAX

    def complete(self) -> None:
        """The body is whole."""
        self._is_complete = True
        self._expects_continue = False
        self._wake()

    def leave(self) -> None:
        """The connection is gone."""
        self.has_left = True
        self._wake()
        if self.on_left is not None:
            self.on_left()

    def expect_continue(self) -> None:
        """The client waits for a word before it sends the body."""
        self._expects_continue = True

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
