"""Server streams: to browsers and scripts as SSE and NDJSON, chosen by Accept; or bytes.

All framings keep one contract. A refusal before the first message is an ordinary problem
document with its status. After it, the stream says how it ended:

    framing  | message            | silence  | end               | error
    SSE      | id: CURSOR, data:  | : alive  | event: end        | event: error, data: PROBLEM
    NDJSON   | JSON and a newline | newline  | the body's end    | {"error": PROBLEM}, newline
    bytes    | its data alone     | nothing  | the body's end    | the connection is broken off

An error is the last thing of its stream, and PROBLEM the same document that a refusal is (RFC
9457). A body that ends before its last chunk is never whole, whatever the framing.

Bytes are those of google.api.HttpBody, as the answer or as its response_body; the content
type is the first message's, and Accept is not asked, since only the service knows what it
sends. Everything else is SSE or NDJSON, of the message or of its response_body, or 406. The
first of a second or two of silence is waited for, so that a refusal has its own status; from
then on there is a heartbeat wherever the framing has one.

A browser that was cut off comes back with Last-Event-ID, which fills the request's `cursor`
field, over what the URL says: EventSource repeats the URL of the first time. Messages are read
from the service only as fast as the client takes them. A client that leaves cancels the call.

A two-way method is the same, with the client's messages going up meanwhile (see
`edge.client_streams`). HTTP/1.1 allows that (RFC 9112 §9.3), but few clients read an answer
while they send: those that do not get it when they have sent everything. An answer that begins
before the request's end is the connection's last.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from edge.answer import content_type_of
from edge.exchange import Exchange
from edge.fields import AnyMessage
from edge.gzipped import GzipStream
from edge.http1_text import HeaderList
from edge.negotiation import choose_media_type
from edge.refusals import ClientLeft
from edge.shapes import CURSOR_FIELD
from shared.errors import QuotaExceeded, TenfoldError

# Proxies and NATs forget a silent connection after 30 to 60 s.
HEARTBEAT_S = 15.0
# How long the first message may keep the status line waiting, so that a refusal gets its
# own status; a stream that starts with silence is opened after it.
FIRST_MESSAGE_S = 2.0
# What EventSource waits before it comes back.
SSE_RETRY_MS = 1000
CANCEL_TIMEOUT_S = 1.0
METADATA_S = 0.05

_NO_STORE = (b"cache-control", b"no-store")

T = TypeVar("T")


class MessageStream(Protocol):
    """A running server-streaming call."""

    async def read(self) -> Message | None:
        """The next message; None after the last.

        Raises:
            TenfoldError: the service ended the stream with an error.
        """
        ...

    async def initial_metadata(self) -> Mapping[str, str]:
        """What the service sent before its first message; waits for it."""
        ...

    def cancel(self) -> None:
        """End the call; safe to repeat."""
        ...


class Framing(Protocol):
    """How messages, silence and the end are written."""

    content_type: bytes
    may_compress: bool

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
    may_compress = False

    def opening(self) -> bytes:
        """See Framing.opening."""
        return b"retry: %d\n\n" % SSE_RETRY_MS

    def message(self, cursor: str, document: bytes) -> bytes:
        """See Framing.message."""
        # An id may hold neither line ends nor NUL; such a cursor cannot be resumed from.
        # Nor could one of other letters come back: the header Last-Event-ID is ASCII here.
        is_line = bool(cursor) and cursor.isascii() and cursor.isprintable()
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
    may_compress = True

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


class StreamAnswer(Protocol):
    """How a stream is told to the client.

    Attributes:
        exchange: the request.
        first_message_s: how long the first message may keep the status line waiting; None
            waits for it.
        heartbeat_s: the longest silence; None is silent for as long as the service is.
    """

    exchange: Exchange
    first_message_s: float | None
    heartbeat_s: float | None

    async def open(self, first: "Message | Silence | None", headers: HeaderList) -> None:
        """Send status and headers; the first message itself is sent next."""
        ...

    async def send(self, message: "Message | Silence") -> None:
        """Send one message, or that there is none yet."""
        ...

    async def close(self, error: TenfoldError | None) -> None:
        """Say how the stream ended, and end the answer.

        Raises:
            TenfoldError: it cannot be said; the answer has to be broken off.
        """
        ...


@dataclass
class Answer:
    """See StreamAnswer. Messages in a framing.

    Attributes:
        framing: from `choose_framing`.
        encode: a message as JSON on one line.
        problem: an error as a problem document on one line.
        headers: of the answer, beside those of every stream.
        gzip: compresses what is sent, as the headers say; None sends it as it is.
    """

    exchange: Exchange
    framing: Framing
    encode: Callable[[Message], bytes]
    problem: Callable[[TenfoldError], bytes]
    heartbeat_s: float | None = HEARTBEAT_S
    first_message_s: float | None = FIRST_MESSAGE_S
    headers: HeaderList = field(default_factory=list)
    gzip: GzipStream | None = None

    async def open(self, first: "Message | Silence | None", headers: HeaderList) -> None:
        """See StreamAnswer.open."""
        await self.exchange.start(200, [*_stream_headers(self.framing), *self.headers, *headers])
        opening = self.framing.opening()
        if opening:
            await self._write(opening)

    async def send(self, message: "Message | Silence") -> None:
        """See StreamAnswer.send."""
        if isinstance(message, Silence):
            await self._write(self.framing.heartbeat())
            return
        cursor = str(getattr(message, CURSOR_FIELD, ""))
        await self._write(self.framing.message(cursor, self.encode(message)))

    async def close(self, error: TenfoldError | None) -> None:
        """See StreamAnswer.close."""
        last = self.framing.end() if error is None else self.framing.error(self.problem(error))
        if last:
            await self._write(last)
        if self.gzip is not None:
            await self.exchange.write(self.gzip.finish())
        await self.exchange.finish()

    async def _write(self, text: bytes) -> None:
        await self.exchange.write(text if self.gzip is None else self.gzip.pack(text))


@dataclass
class ByteAnswer:
    """See StreamAnswer. The bytes of HttpBody messages, with nothing between them.

    Attributes:
        body_of: the HttpBody of a message.
    """

    exchange: Exchange
    body_of: Callable[[Message], AnyMessage]
    heartbeat_s: float | None = None
    first_message_s: float | None = None

    async def open(self, first: "Message | Silence | None", headers: HeaderList) -> None:
        """See StreamAnswer.open."""
        content_type = self.body_of(first).content_type if isinstance(first, Message) else ""
        named = [(b"content-type", content_type_of(content_type)), _NO_STORE, *headers]
        await self.exchange.start(200, named)

    async def send(self, message: "Message | Silence") -> None:
        """See StreamAnswer.send."""
        if isinstance(message, Message) and (data := self.body_of(message).data):
            await self.exchange.write(data)

    async def close(self, error: TenfoldError | None) -> None:
        """See StreamAnswer.close. Bytes have no room for an error."""
        if error is not None:
            raise error
        await self.exchange.finish()


async def relay(
    answer: StreamAnswer,
    stream: MessageStream,
    *,
    ended: Awaitable[TenfoldError],
    send: Callable[[], Awaitable[bool]] | None = None,
    headers: Callable[[Mapping[str, str]], HeaderList] | None = None,
) -> None:
    """Send a stream's messages until it, the client or the edge ends it.

    Args:
        answer: how they are told.
        stream: the running call; cancelled before this returns, however it returns.
        ended: completes with the reason when the edge ends the stream.
        send: sends the client's own messages; see `client_side`.
        headers: what of the service's initial metadata are headers of the answer; None for
            nothing. Metadata that is not there when the answer begins is left out.

    Raises:
        TenfoldError: the service refused before anything was sent, or the answer was broken off.
        ClientLeft: the client closed the connection.
    """
    error = None
    try:
        await until(_pump(answer, stream, headers), client_side(answer.exchange, send), ended)
    except TenfoldError as reason:
        if not answer.exchange.is_answered:
            raise
        error = reason
    finally:
        stream.cancel()
    await answer.close(error)


async def client_side(
    exchange: Exchange, send: Callable[[], Awaitable[bool]] | None = None
) -> Exception:
    """Send what the client sends, then watch it.

    Args:
        exchange: whose client it is.
        send: sends all its messages; tells whether the service took them. None if the request
            has been read already.

    Returns:
        Why the call must end: the client left, or what it sends is broken. Does not return if
        the service takes no more: the call is over, and its reader says how.
    """
    try:
        if send is not None and not await send():
            await asyncio.Event().wait()
        await exchange.until_client_leaves()
    except (TenfoldError, ClientLeft) as error:
        return error
    return ClientLeft()


async def until(work: Coroutine[Any, Any, T], *endings: Awaitable[Exception]) -> T:
    """Do some work, unless something else ends it.

    Args:
        work: cancelled as soon as an ending is there.
        endings: each gives a reason; cancelled when the work is done.

    Raises:
        Exception: what the work raised, or the reason of an ending.
    """
    try:
        async with asyncio.TaskGroup() as group:
            working = group.create_task(work)
            waiting = [group.create_task(_result_of(ending)) for ending in endings]
            await asyncio.wait({working, *waiting}, return_when=asyncio.FIRST_COMPLETED)
            for task in (working, *waiting):
                task.cancel()
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    if not working.cancelled():
        return working.result()
    raise next(task.result() for task in waiting if not task.cancelled())


async def _pump(
    answer: StreamAnswer,
    stream: MessageStream,
    headers: Callable[[Mapping[str, str]], HeaderList] | None,
) -> None:
    reader = _Reader(stream)
    try:
        message = await reader.next(answer.first_message_s)  # a refusal leaves from here, unsent
        named = headers(await reader.metadata()) if headers is not None else []
        await answer.open(message, named)
        while message is not None:
            await answer.send(message)
            message = await reader.next(answer.heartbeat_s)
    finally:
        await reader.close()


class Silence:
    """Nothing came within the time."""


class _Reader:
    """Reads one message at a time, and lets a slow read go on over several waits.

    To cancel a read of grpc.aio is to cancel the call, so a heartbeat must not.
    """

    def __init__(self, stream: MessageStream) -> None:
        self._stream = stream
        self._read: asyncio.Task[Message | None] | None = None
        self._metadata: asyncio.Task[Mapping[str, str]] | None = None

    async def next(self, timeout_s: float | None) -> Message | Silence | None:
        if self._read is None:
            self._read = asyncio.create_task(self._stream.read())
        done, _ = await asyncio.wait({self._read}, timeout=timeout_s)
        if not done:
            return Silence()
        read, self._read = self._read, None
        return read.result()

    async def metadata(self) -> Mapping[str, str]:
        """The initial metadata; empty if it has not come yet."""
        self._metadata = asyncio.create_task(self._stream.initial_metadata())
        # After the first message it is there; this is for a stream that begins with silence.
        done, _ = await asyncio.wait({self._metadata}, timeout=METADATA_S)
        return self._metadata.result() if done else {}

    async def close(self) -> None:
        running = {task for task in (self._read, self._metadata) if task is not None}
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=CANCEL_TIMEOUT_S)


async def _result_of(ending: Awaitable[Exception]) -> Exception:
    return await ending


def _stream_headers(framing: Framing) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", framing.content_type),
        _NO_STORE,
        (b"x-accel-buffering", b"no"),  # nginx would hold events back
    ]


def _data(document: bytes) -> bytes:
    return b"data: " + document + b"\n\n"


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
