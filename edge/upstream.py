"""Calls to the services, by descriptor: no stub of any service is imported.

Every call carries a deadline, the caller's signed identity, the request id and the trace.
Nothing else of the request crosses: headers from outside are never metadata, except what a
contract, a setting or a raw binding lists.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from google.protobuf.message import DecodeError, Message

from edge.contracts import MethodInfo
from edge.guards import Guards, MethodGuard
from edge.raw import RETRY_AFTER_S, STATUS_KEY
from shared.errors import DeadlineExceeded, Internal, TenfoldError, Unavailable
from shared.identity import IDENTITY_METADATA_KEY, Principal
from shared.rpc.context import REPLAYED_METADATA, REQUEST_ID_KEY
from shared.rpc.header_block import Headers
from shared.rpc.unary import Answer, UnaryChannel

TRACE_KEY = "traceparent"
_REPLAYED_NAME, _REPLAYED_VALUE = (part.encode() for part in REPLAYED_METADATA)

# A write that meets the end of its call makes grpc.aio report INTERNAL until the service's
# own status is there, a moment later (grpc/aio/_call.py, _write).
STATUS_PAUSES_S = (0.001, 0.01, 0.05, 0.2)


class Signer(Protocol):
    """Turns a principal into the token that services verify."""

    def token_for(self, principal: Principal) -> str:
        """A signed token, valid for about a minute."""
        ...


class ChannelSource(Protocol):
    """Where channels come from: see shared.rpc.client.Channels, whose calls raise our errors."""

    def channel(self, service: str) -> Any:  # noqa: ANN401 - as grpc's own multi-callables
        """The channel to whoever serves this service, by its full name."""
        ...

    def unary_channel(self, service: str) -> UnaryChannel:
        """The same for unary calls alone."""
        ...


class Caller(NamedTuple):
    """What travels beside the message.

    Attributes:
        principal: who asks.
        timeout_s: what is left of the deadline, more than 0.
        request_id: for logs and error answers of every hop.
        traceparent: the W3C trace context, or "".
        extra: more metadata: what of the request's headers enters.
    """

    principal: Principal
    timeout_s: float
    request_id: str
    traceparent: str = ""
    extra: Sequence[tuple[str, str]] = ()


class Reply(NamedTuple):
    """A unary answer.

    Attributes:
        message: what the service answered.
        is_replayed: the effect was not repeated; an earlier answer was.
        initial, trailing: metadata.
    """

    message: Message
    is_replayed: bool
    initial: Headers
    trailing: Headers

    @classmethod
    def of(cls, message: Message, initial: Headers, trailing: Headers) -> "Reply":
        """The answer with what its metadata say."""
        is_replayed = trailing.get(_REPLAYED_NAME) == _REPLAYED_VALUE
        return cls(message, is_replayed, initial, trailing)


class Upstream:
    """The services behind this edge.

    Args:
        channels: one channel per process behind it.
        signer: makes identity tokens; None sends none, for servers that know none.
        guards: refuse what would be too much for a service.
    """

    def __init__(self, channels: ChannelSource, signer: Signer | None, guards: Guards) -> None:
        self._channels = channels
        self._signer = signer
        self._guards = guards
        self._guard_of: dict[str, MethodGuard] = {}
        self._starts: dict[str, Any] = {}

    def guard(self, method: MethodInfo) -> MethodGuard:
        """What counts the calls of a method, and may refuse them."""
        guard = self._guard_of.get(method.full_name)
        if guard is None:
            guard = self._guard_of[method.full_name] = self._guards.of(method)
        return guard

    async def unary(self, method: MethodInfo, request: Message, caller: Caller) -> Reply:
        """Call a unary method.

        Raises:
            TenfoldError: what the service, or the way there, refused.
        """
        guard, payload = self.guard(method), request.SerializeToString()
        if not guard.try_enter():
            await guard.wait()
        try:
            answer = await self._guarded(guard, method, payload, caller)
        finally:
            guard.leave()
        try:
            message = method.output.FromString(answer.message)
        except DecodeError as error:
            raise Internal(f"{method.full_name} answered with another message") from error
        return Reply.of(message, answer.initial, answer.trailing)

    async def _guarded(
        self, guard: MethodGuard, method: MethodInfo, payload: bytes, caller: Caller
    ) -> Answer:
        rounds, began_s = guard.pass_breakers(), time.monotonic()
        try:
            answer = await self._channels.unary_channel(method.service).call(
                method.full_name,
                payload,
                metadata=self._metadata(caller),
                timeout_s=caller.timeout_s,
            )
        except TenfoldError as error:
            guard.note_error(error, rounds, began_s, caller.timeout_s)
            _say_where(error)
            raise
        except BaseException:
            guard.note_nothing(rounds)
            raise
        guard.note_answer(rounds, began_s)
        return answer

    def stream(self, method: MethodInfo, request: Message, caller: Caller) -> "UpstreamStream":
        """Start a server-streaming call; whoever starts it cancels it in the end."""
        opening = _Opening(self.guard(method))
        call = self._start(method)(
            request, timeout=caller.timeout_s, metadata=self._metadata(caller)
        )
        return UpstreamStream(call, opening)

    def bidirectional(self, method: MethodInfo, caller: Caller) -> "UpstreamRawCall":
        """Start a call with a client stream; whoever starts it cancels it in the end.

        One answer and a stream of one look the same on the wire.
        """
        opening = _Opening(self.guard(method))
        call = self._start(method)(timeout=caller.timeout_s, metadata=self._metadata(caller))
        return UpstreamRawCall(call, opening)

    def _metadata(self, caller: Caller) -> list[tuple[str, str]]:
        metadata = [(REQUEST_ID_KEY, caller.request_id), *caller.extra]
        if caller.traceparent:
            metadata.append((TRACE_KEY, caller.traceparent))
        if self._signer is not None:
            metadata.append((IDENTITY_METADATA_KEY, self._signer.token_for(caller.principal)))
        return metadata

    def _start(self, method: MethodInfo) -> Any:  # noqa: ANN401 - grpc's own multi-callable
        start = self._starts.get(method.full_name)
        if start is None:
            channel = self._channels.channel(method.service)
            kinds = {
                (False, True): channel.unary_stream,
                (True, True): channel.stream_stream,
                (True, False): channel.stream_stream,
            }
            start = kinds[method.client_streaming, method.server_streaming](
                method.full_name,
                request_serializer=method.input.SerializeToString,
                response_deserializer=method.output.FromString,
            )
            self._starts[method.full_name] = start
        return start


class _Opening:
    """Tells the guard of a stream, once, whether anybody answered it.

    Raises:
        Unavailable: a breaker is open.
    """

    def __init__(self, guard: MethodGuard) -> None:
        self._guard = guard
        self._rounds: tuple[int, int] | None = guard.pass_breakers()

    def succeed(self) -> None:
        if self._rounds is not None:
            self._guard.note_life(self._rounds)
            self._rounds = None

    def fail(self, error: TenfoldError) -> None:
        if self._rounds is not None:
            self._guard.note_stream_error(error, self._rounds)
            self._rounds = None

    def leave(self) -> None:
        if self._rounds is not None:
            self._guard.note_nothing(self._rounds)
            self._rounds = None


class UpstreamStream:
    """See streams.MessageStream."""

    def __init__(self, call: Any, opening: _Opening) -> None:  # noqa: ANN401 - grpc's own call
        self._call = call
        self._opening = opening

    async def read(self) -> Message | None:
        """See streams.MessageStream.read."""
        try:
            message = await self._call.read()
        except TenfoldError as error:
            self._opening.fail(error)
            _say_where(error)
            raise
        self._opening.succeed()
        return message if isinstance(message, Message) else None  # else it is grpc.aio.EOF

    async def initial_metadata(self) -> Mapping[str, str]:
        """See streams.MessageStream.initial_metadata."""
        return _texts(await self._call.initial_metadata())

    async def trailing_metadata(self) -> Mapping[str, str]:
        """What the service sent after its last message; waits for it."""
        return _texts(await self._call.trailing_metadata())

    def cancel(self) -> None:
        """See streams.MessageStream.cancel."""
        self._opening.leave()
        self._call.cancel()


class UpstreamRawCall(UpstreamStream):
    """See raw.RawCall."""

    def __init__(self, call: Any, opening: _Opening) -> None:  # noqa: ANN401 - grpc's own call
        super().__init__(call, opening)
        self._write_has_failed = False

    async def read(self) -> Message | None:
        """See raw.RawCall.read."""
        for pause_s in STATUS_PAUSES_S:
            try:
                return await super().read()
            except Internal:
                if not self._write_has_failed:
                    raise
                await asyncio.sleep(pause_s)
        # The failed write came after the status and has replaced it for good. A service that
        # has begun its answer has ended it, too; else the service went away in the middle.
        if STATUS_KEY in await self.initial_metadata():
            return None
        raise Unavailable("the service went away in the middle", retry_after_s=RETRY_AFTER_S)

    async def write(self, message: Message) -> bool:
        """See raw.RawCall.write."""
        # grpc.aio cancels the call when a write is cancelled, but the answer to an early end
        # of the body is still to be read: the shield keeps the two apart.
        return await asyncio.shield(self._write(message))

    async def _write(self, message: Message) -> bool:
        try:
            await self._call.write(message)
        except TenfoldError:
            self._write_has_failed = True
            return False  # the call is over; `read` says how
        return True

    async def done_writing(self) -> None:
        """See raw.RawCall.done_writing."""
        try:
            await self._call.done_writing()
        except TenfoldError:
            self._write_has_failed = True  # as above


def _say_where(error: TenfoldError) -> None:
    """A client whose time is over learns that the service had it."""
    if isinstance(error, DeadlineExceeded):
        error.metadata.setdefault("where", "service")


def _texts(metadata: Mapping[str, str | bytes]) -> Mapping[str, str]:
    return {name: value for name, value in metadata.items() if isinstance(value, str)}
