"""Server streams to browsers and scripts: SSE and NDJSON, chosen by Accept.

Both framings keep one contract. A refusal before the first message is an ordinary problem
document with its status. After it, the last thing in the stream says how it ended: SSE sends
`event: error` with the problem or `event: end`; NDJSON sends `{"error": problem}` or just
ends. A browser that was cut off comes back with Last-Event-ID, which fills the request's
`cursor` field. Messages are read from the service only as fast as the client takes them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import Message

from edge.exchange import Exchange
from edge.refusals import ClientLeft, NotAcceptable
from shared.errors import QuotaExceeded, TenfoldError

# Proxies and NATs forget a silent connection after 30 to 60 s.
HEARTBEAT_S = 15.0
# How long the first message may keep the status line waiting, so that a refusal gets its
# own status; a stream that starts with silence is opened after it.
FIRST_MESSAGE_S = 2.0
# What EventSource waits before it comes back.
SSE_RETRY_MS = 1000
CANCEL_TIMEOUT_S = 1.0

CURSOR_FIELD = "cursor"


class MessageStream(Protocol):
    """A running server-streaming call."""

    async def read(self) -> Message | None:
        """The next message; None after the last.

        Raises:
            TenfoldError: the service ended the stream with an error.
        """
        ...

    def cancel(self) -> None:
        """End the call; safe to repeat."""
        ...


class Framing(Protocol):
    """How messages, silence and the end are written."""

    content_type: bytes

    def opening(self) -> bytes:
        """What comes first."""
        ...

    def message(self, cursor: str, document: bytes) -> bytes:
        """One message; document is what the answer's `encode` made of it."""
        ...

    def heartbeat(self) -> bytes:
        """What shows that the connection lives; b"" where nothing can."""
        ...

    def error(self, problem: bytes) -> bytes:
        """The last thing of a stream that failed; problem is JSON on one line."""
        ...

    def end(self) -> bytes:
        """The last thing of a stream that is over."""
        ...


class Sse:
    """See Framing. Server-sent events (WHATWG HTML §9.2)."""

    content_type = b"text/event-stream; charset=utf-8"

    def opening(self) -> bytes:
        """See Framing.opening."""
        return b"retry: %d\n\n" % SSE_RETRY_MS

    def message(self, cursor: str, document: bytes) -> bytes:
        """See Framing.message."""
        # An id may hold neither line ends nor NUL; such a cursor cannot be resumed from.
        is_line = cursor.isprintable() and bool(cursor)
        return (b"id: " + cursor.encode() + b"\n" if is_line else b"") + _data(document)

    def heartbeat(self) -> bytes:
        """See Framing.heartbeat."""
        return b": alive\n\n"

    def error(self, problem: bytes) -> bytes:
        """See Framing.error."""
        return b"event: error\n" + _data(problem)

    def end(self) -> bytes:
        """See Framing.end."""
        return b"event: end\n" + _data(b"{}")


class Ndjson:
    """See Framing. One JSON value a line; an empty line is a heartbeat."""

    content_type = b"application/x-ndjson; charset=utf-8"

    def opening(self) -> bytes:
        """See Framing.opening."""
        return b""

    def message(self, cursor: str, document: bytes) -> bytes:
        """See Framing.message."""
        return document + b"\n"

    def heartbeat(self) -> bytes:
        """See Framing.heartbeat."""
        return b"\n"

    def error(self, problem: bytes) -> bytes:
        """See Framing.error."""
        return b'{"error":' + problem + b"}\n"

    def end(self) -> bytes:
        """See Framing.end."""
        return b""


def choose_framing(accept: str) -> Framing:
    """SSE if the client prefers it, else NDJSON.

    Raises:
        NotAcceptable: the client takes neither.
    """
    offers = ["application/x-ndjson", "application/json", "text/event-stream"]
    chosen = choose_media_type(accept, offers)
    return Sse() if chosen == "text/event-stream" else Ndjson()


def choose_media_type(accept: str, offers: list[str]) -> str:
    """The offer that an Accept header likes best; the first of equals (RFC 9110 §12.5.1).

    Raises:
        NotAcceptable: it likes none of them.
    """
    if not accept or accept == "*/*" or accept == offers[0]:
        return offers[0]
    ranges = [_media_range(part) for part in accept.split(",")]
    best = max(offers, key=lambda offer: _quality(offer, ranges))
    if _quality(best, ranges) <= 0:
        raise NotAcceptable(f"This route answers with {' or '.join(offers)}.")
    return best


@dataclass(frozen=True)
class Answer:
    """How a stream is told to the client.

    Attributes:
        exchange: the request, its body already read.
        framing: from `choose_framing`.
        encode: a message as JSON on one line.
        problem: an error as a problem document on one line.
        heartbeat_s: the longest silence.
    """

    exchange: Exchange
    framing: Framing
    encode: Callable[[Message], bytes]
    problem: Callable[[TenfoldError], bytes]
    heartbeat_s: float = HEARTBEAT_S

    async def open(self) -> None:
        """Send status, headers and what comes first."""
        await self.exchange.start(200, _stream_headers(self.framing))
        await self.exchange.write(self.framing.opening())

    async def send(self, message: "Message | _Silence") -> None:
        """Send one message, or that there is none yet."""
        if isinstance(message, _Silence):
            await self.exchange.write(self.framing.heartbeat())
            return
        cursor = str(getattr(message, CURSOR_FIELD, ""))
        await self.exchange.write(self.framing.message(cursor, self.encode(message)))

    async def close(self, error: TenfoldError | None) -> None:
        """Say how the stream ended, and end the answer."""
        last = self.framing.end() if error is None else self.framing.error(self.problem(error))
        if last:
            await self.exchange.write(last)
        await self.exchange.finish()


async def relay(answer: Answer, stream: MessageStream, *, ended: Awaitable[TenfoldError]) -> None:
    """Send a stream's messages until it, the client or the edge ends it.

    Args:
        answer: how they are told.
        stream: the running call; cancelled before this returns, however it returns.
        ended: completes with the reason when the edge ends the stream.

    Raises:
        TenfoldError: the service refused before anything was sent.
        ClientLeft: the client closed the connection.
    """
    try:
        async with asyncio.TaskGroup() as group:
            pump = group.create_task(_pump(answer, stream))
            client = group.create_task(answer.exchange.until_client_leaves())
            closing = group.create_task(_result_of(ended))
            await asyncio.wait({pump, client, closing}, return_when=asyncio.FIRST_COMPLETED)
            for task in (pump, client, closing):
                task.cancel()
        if not pump.cancelled():
            return
        if closing.cancelled():
            raise ClientLeft
        if not answer.exchange.is_answered:
            raise closing.result()
        await answer.close(closing.result())
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    finally:
        stream.cancel()


async def _pump(answer: Answer, stream: MessageStream) -> None:
    reader = _Reader(stream)
    try:
        message = await reader.next(FIRST_MESSAGE_S)  # a refusal leaves from here, unsent
        await answer.open()
        try:
            while message is not None:
                await answer.send(message)
                message = await reader.next(answer.heartbeat_s)
        except TenfoldError as error:
            await answer.close(error)
        else:
            await answer.close(None)
    finally:
        await reader.close()


class _Silence:
    """Nothing came within the time."""


class _Reader:
    """Reads one message at a time, and lets a slow read go on over several waits.

    To cancel a read of grpc.aio is to cancel the call, so a heartbeat must not.
    """

    def __init__(self, stream: MessageStream) -> None:
        self._stream = stream
        self._read: asyncio.Task[Message | None] | None = None

    async def next(self, timeout_s: float) -> Message | _Silence | None:
        if self._read is None:
            self._read = asyncio.create_task(self._stream.read())
        done, _ = await asyncio.wait({self._read}, timeout=timeout_s)
        if not done:
            return _Silence()
        read, self._read = self._read, None
        return read.result()

    async def close(self) -> None:
        if self._read is not None:
            self._read.cancel()
            await asyncio.wait({self._read}, timeout=CANCEL_TIMEOUT_S)


async def _result_of(ended: Awaitable[TenfoldError]) -> TenfoldError:
    return await ended


def _stream_headers(framing: Framing) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", framing.content_type),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # nginx would hold events back
    ]


def _data(document: bytes) -> bytes:
    return b"data: " + document + b"\n\n"


def _media_range(text: str) -> tuple[str, float]:
    name, _, parameters = text.strip().lower().partition(";")
    for parameter in parameters.split(";"):
        key, _, value = parameter.strip().partition("=")
        if key == "q":
            return name.strip(), _weight(value)
    return name.strip(), 1.0


def _weight(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0


def _quality(offer: str, ranges: list[tuple[str, float]]) -> float:
    """The weight of the most specific range that covers the offer; 0 if none does."""
    kind = offer.partition("/")[0]
    for name in (offer, f"{kind}/*", "*/*"):
        weights = [weight for media, weight in ranges if media == name]
        if weights:
            return max(weights)
    return 0.0


class OpenStreams:
    """The streams that are open now, by who opened them; each can be ended from outside.

    Args:
        per_caller_max: how many one caller may hold.
    """

    def __init__(self, per_caller_max: int) -> None:
        self._per_caller_max = per_caller_max
        self._open: dict[str, set[asyncio.Future[TenfoldError]]] = {}

    @contextmanager
    def opened(self, caller: str) -> Iterator[asyncio.Future[TenfoldError]]:
        """Count a stream; the future completes when it must end.

        Raises:
            QuotaExceeded: the caller holds too many.
        """
        mine = self._open.setdefault(caller, set())
        if len(mine) >= self._per_caller_max:
            message = f"At most {self._per_caller_max} streams may be open at once."
            raise QuotaExceeded(message, retry_after_s=1, reason="STREAMS_EXCEEDED")
        ended: asyncio.Future[TenfoldError] = asyncio.get_running_loop().create_future()
        mine.add(ended)
        try:
            yield ended
        finally:
            ended.cancel()
            mine.discard(ended)
            if not mine:
                self._open.pop(caller, None)

    def end(self, caller: str, error: TenfoldError) -> None:
        """End all that this caller has open."""
        for ended in tuple(self._open.get(caller, ())):
            if not ended.done():
                ended.set_result(error)

    def end_all(self, error: TenfoldError) -> None:
        """End every stream."""
        for caller in tuple(self._open):
            self.end(caller, error)
