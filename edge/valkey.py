"""Commands to Valkey over one connection, as many at once as there are (RESP 2).

Quota decisions are small and many: those of one turn of the loop leave in one write, and their
answers are told apart by order. A command is never repeated: one that was carried out and whose
answer was lost would be carried out twice. redis-py speaks to Valkey everywhere else.
"""

import asyncio
import ssl
from collections import deque
from typing import Any, cast

import hiredis
from redis.asyncio.connection import parse_url

# Commands without an answer yet; more than a healthy Valkey ever lets wait.
PENDING_MAX = 10_000
# A loop that was held up finds timers due before it has read what has come meanwhile.
READ_FIRST_S = 0.01


class ValkeyError(Exception):
    """Valkey answered with an error, or the connection to it is gone.

    Attributes:
        is_script_missing: the error is NOSCRIPT: nothing was carried out.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.is_script_missing = text.startswith("NOSCRIPT")


class ValkeyConnection:
    """A connection that is made at the first command, and again after it was lost.

    Args:
        url: redis://user:password@host:port/0, rediss:// for TLS, unix:///path for a socket.
        timeout_s: for connecting, and for each answer. An answer that takes longer ends the
            connection: everything behind it would be late, too.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._where: dict[str, Any] = dict(parse_url(url))
        self._is_tls = url.startswith("rediss://")
        self._timeout_s = timeout_s
        self._wire: _Wire | None = None
        self._connecting = asyncio.Lock()
        self._is_closed = False

    async def execute(self, *words: str | bytes) -> Any:  # noqa: ANN401 - whatever RESP holds
        """Carry out a command once.

        Raises:
            ValkeyError: it was refused, or the connection broke, perhaps after it had its effect;
                or this was closed.
            OSError: no connection could be made.
            TimeoutError: there is no connection, or no answer, within timeout_s.
        """
        return await self.send(encode(*words))

    async def send(self, command: bytes) -> Any:  # noqa: ANN401 - as above
        """See execute; for a command that `encode` made."""
        wire = self._wire
        if wire is None or wire.is_closed:
            wire = await self._connected()
        return await wire.send(command)

    def post(self, command: bytes) -> None:
        """Send a command whose answer, and whether it is carried out at all, does not matter."""
        if self._wire is not None and not self._wire.is_closed:
            self._wire.post(command)

    def close(self) -> None:
        """Close for good; what waits for an answer fails, and so does what is asked later."""
        self._is_closed = True
        if self._wire is not None:
            self._wire.end(ValkeyError("the connection was closed here"))

    async def _connected(self) -> "_Wire":
        async with asyncio.timeout(self._timeout_s), self._connecting:
            if self._wire is not None and not self._wire.is_closed:
                return self._wire
            self._require_open()
            wire = await self._open()
            try:
                await self._introduce(wire)
                self._require_open()  # it may have been closed meanwhile
            except BaseException:
                wire.end(ValkeyError("the connection was not accepted"))
                raise
            self._wire = wire
            return wire

    def _require_open(self) -> None:
        if self._is_closed:
            raise ValkeyError("the connection was closed here")

    async def _open(self) -> "_Wire":
        loop, where = asyncio.get_running_loop(), self._where
        if path := where.get("path"):
            _, wire = await loop.create_unix_connection(lambda: _Wire(self._timeout_s), path)
            return wire
        host, port = where.get("host", "localhost"), where.get("port", 6379)
        context = ssl.create_default_context() if self._is_tls else None
        _, wire = await loop.create_connection(
            lambda: _Wire(self._timeout_s), host, port, ssl=context
        )
        return wire

    async def _introduce(self, wire: "_Wire") -> None:
        where = self._where
        if "password" in where:
            names = [where["username"]] if "username" in where else []
            await wire.send(encode("AUTH", *names, where["password"]))
        if where.get("db"):
            await wire.send(encode("SELECT", str(where["db"])))


class _Wire(asyncio.Protocol):
    """One TCP connection: commands out, answers in, in the same order."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader()
        self._pending: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._unwritten: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None
        self._late: asyncio.Future[Any] | None = None
        self.is_closed = False

    def post(self, command: bytes) -> None:
        if len(self._pending) < PENDING_MAX:
            # Whatever becomes of it is looked at here, or it would be told as forgotten.
            self._sent(command).add_done_callback(lambda answer: answer.exception())

    async def send(self, command: bytes) -> Any:  # noqa: ANN401 - whatever RESP holds
        if self.is_closed or len(self._pending) >= PENDING_MAX:
            raise ValkeyError("the connection is gone, or too much waits on it")
        return await self._sent(command)

    def _sent(self, command: bytes) -> "asyncio.Future[Any]":
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._pending.append((answer, self._loop.time() + self._timeout_s))
        if not self._unwritten:
            self._loop.call_soon(self._flush)
        self._unwritten.append(command)
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._end_if_late)
        return answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.end(ValkeyError(f"the connection is gone: {exc or 'closed by Valkey'}"))

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._reader.feed(data)
        try:
            while self._pending:
                reply = self._reader.gets()
                if reply is False:
                    return
                answer, _ = self._pending.popleft()
                if answer.done():  # its caller was cancelled
                    continue
                if isinstance(reply, hiredis.ReplyError):
                    answer.set_exception(ValkeyError(str(reply)))
                else:
                    answer.set_result(reply)
            if self._reader.has_data():
                # It would be taken for the answer to the next command.
                self.end(ValkeyError("Valkey answered what nobody asked"))
        except hiredis.ProtocolError as error:
            self.end(ValkeyError(f"this is no RESP: {error}"))

    def end(self, error: Exception) -> None:
        """Close, once, and tell all who wait."""
        self.is_closed = True
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None:
            self._transport.abort()
        while self._pending:
            answer, _ = self._pending.popleft()
            if not answer.done():
                answer.set_exception(error)

    def _flush(self) -> None:
        commands = b"".join(self._unwritten)
        self._unwritten.clear()
        if self._transport is not None and not self.is_closed:
            self._transport.write(commands)

    def _end_if_late(self) -> None:
        """One timer for all: the oldest command is the first that is late."""
        self._watch = None
        if not self._pending:
            return
        oldest, due_s = self._pending[0]
        left_s = due_s - self._loop.time()
        if left_s <= 0 and self._late is oldest:
            self.end(TimeoutError("Valkey does not answer"))
            return
        self._late = oldest if left_s <= 0 else None
        self._watch = self._loop.call_later(max(left_s, READ_FIRST_S), self._end_if_late)


def encode(*words: str | bytes) -> bytes:
    """A command as RESP: an array of bulk strings."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        raw = word.encode() if isinstance(word, str) else word
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(parts)
