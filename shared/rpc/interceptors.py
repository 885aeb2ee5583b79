"""The chain around every handler, fused into one wrapper per method for speed.

Outermost first: the log line, the error boundary, the deadline, identity, authorization, the
request message (read, parsed, validated), the concurrency limit, the handler.

The wrapper replaces the RpcMethodHandler of each method, so a path that the contracts do not
name never reaches any of our code (UNIMPLEMENTED), and a named one is matched exactly. The
engine hands over raw bytes: identity and permission are checked before a byte is parsed
(AIP-211), and a message that never comes is waited for only so long.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from random import getrandbits
from typing import Any, NoReturn, TypeAlias, cast

import grpc
from google.protobuf.message import Message

from shared import causal, deadline, log
from shared.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    RaceLost,
    TenfoldError,
    Unauthenticated,
    Unavailable,
)
from shared.identity import (
    IDENTITY_METADATA_KEY,
    IdentityVerifier,
    Principal,
    PrincipalKind,
    TokenRefused,
)
from shared.rpc.context import REPLAYED_METADATA, REQUEST_ID_KEY, Context, current_call
from shared.rpc.engine import Metadata, RpcMethod
from shared.rpc.expiry import Expiry
from shared.rpc.policy import REQUEST_ID_FIELD, Access, Idempotency, MethodPolicy
from shared.rpc.status import status_of
from shared.rpc.validation import RequestReader
from shared.telemetry.calls import server_durations
from shared.telemetry.metrics import Metrics

REQUEST_ID_CHARACTERS_MAX = 128
IDEMPOTENCY_KEY = "idempotency-key"
# Two more tries: the transaction that lost has been undone whole, and the winner has gone on.
RACE_PAUSES_S = (0.01, 0.05)
_REPEATABLE = frozenset({Idempotency.SAFE, Idempotency.REPEATABLE, Idempotency.KEYED})
IDEMPOTENCY_KEY_CHARACTERS_MAX = 255
METADATA_BYTES_MAX = 16 * 1024
# Long enough for any message over a slow link; short enough to free what an attacker holds.
READ_TIMEOUT_S = 10.0
STREAM_IDLE_S = 60.0
# A client's stream may have so many messages beyond one for each 256 bytes: an upload in pieces
# as small as a packet goes on for ever, a flood of one-byte messages does not (S85).
SMALL_MESSAGES_MAX = 10_000
SMALL_MESSAGE_BYTES = 256
CANCEL_ARRIVES_S = 0.002
CALLS_MAX = 1000
STREAMS_MAX = 2000
OVERLOADED_RETRY_AFTER_S = 0.5

_logger = log.get_logger("rpc")

# Which callers each access admits; beside this, all scopes are needed.
_ADMITTED: Mapping[Access, frozenset[PrincipalKind]] = {
    Access.NOBODY: frozenset(),
    Access.PUBLIC: frozenset(PrincipalKind),
    Access.USER: frozenset({PrincipalKind.USER, PrincipalKind.ADMIN}),
    Access.SERVICE: frozenset({PrincipalKind.SERVICE}),
    Access.ADMIN: frozenset({PrincipalKind.ADMIN}),
}

# Quoted: at run time the class takes no parameters.
MethodHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behaviour = Callable[[Any, Context], Any]


@dataclass
class Limiter:
    """Counts what runs; refuses at once what would be too much (spec P8)."""

    limit: int
    running: int = 0

    def enter(self) -> None:
        """Take a place, which the caller gives back with leave.

        Raises:
            Overloaded: all are taken.
        """
        if self.running >= self.limit:
            raise Overloaded(
                "the server is full; try again shortly", retry_after_s=OVERLOADED_RETRY_AFTER_S
            )
        self.running += 1

    def leave(self) -> None:
        """Give the place back."""
        self.running -= 1


@dataclass
class Chain:
    """What the wrappers of one server share.

    Attributes:
        verifier: believes or refuses identity tokens.
        policies: what may be called by whom, by path.
        calls, streams: how many may run at once.
        metadata_bytes_max: of one call.
        read_timeout_s: how long the first request message may take to come.
        stream_idle_s: how long each further message of a client's stream may take.
        small_messages_max: how many of them may be small; see SMALL_MESSAGE_BYTES.
        logs_requests: whether each call leaves a line.
        metrics: where calls are counted and timed.
    """

    verifier: IdentityVerifier
    policies: Mapping[str, MethodPolicy]
    calls: Limiter = field(default_factory=lambda: Limiter(CALLS_MAX))
    streams: Limiter = field(default_factory=lambda: Limiter(STREAMS_MAX))
    metadata_bytes_max: int = METADATA_BYTES_MAX
    read_timeout_s: float = READ_TIMEOUT_S
    stream_idle_s: float = STREAM_IDLE_S
    small_messages_max: int = SMALL_MESSAGES_MAX
    logs_requests: bool = True
    open_streams: set[Context] = field(default_factory=set)
    expiry: Expiry = field(default_factory=Expiry)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        """Bind what is measured."""
        self.durations = server_durations(self.metrics)
        running = self.metrics.gauge(
            "rpc_server_active_requests", "Calls and streams that are being answered.", "kind"
        )
        self.metrics.watch(running, lambda: self.calls.running, "call")
        self.metrics.watch(running, lambda: self.streams.running, "stream")

    def wrap(self, path: str, handler: MethodHandler) -> RpcMethod:
        """The handler with the chain around it, to be registered under the same path."""
        policy = self.policies.get(path)
        if policy is None:  # nobody: it answers PERMISSION_DENIED
            shape = handler.request_streaming, handler.response_streaming
            policy = MethodPolicy(path, client_streaming=shape[0], server_streaming=shape[1])
        guarded = _Guarded(self, policy, handler)
        serve = guarded.serve_stream if handler.response_streaming else guarded.serve_unary
        return RpcMethod(serve, handler.request_streaming, handler.response_streaming)

    def end_streams(self) -> None:
        """Answer every open stream with UNAVAILABLE now: a stop must not wait for them."""
        for call in list(self.open_streams):
            call.has_ended_by_server = True
            if call.task is not None:
                call.task.cancel()


class _Guarded:
    """One method behind the chain."""

    def __init__(self, chain: Chain, policy: MethodPolicy, handler: MethodHandler) -> None:
        self._chain = chain
        self._policy = policy
        self._limiter = chain.streams if policy.is_stream else chain.calls
        self._behaviour = _behaviour_of(handler)
        assert handler.request_deserializer is not None  # generated code has one
        self._reader = RequestReader(handler.request_deserializer)
        self._serialize: Callable[[Any], bytes] = handler.response_serializer or _no_codec
        self._needs_key = policy.idempotency is Idempotency.KEYED
        may_repeat = policy.idempotency in _REPEATABLE and not policy.client_streaming
        self._race_pauses_s = RACE_PAUSES_S if may_repeat else ()
        self._admitted = _ADMITTED[policy.access]

    async def serve_unary(self, _requests: object, rpc: Any) -> bytes:  # noqa: ANN401
        """One answer; see RpcMethod.serve."""
        call, tokens, metadata_bytes = _call_of(self._policy.path, rpc)
        try:
            self._require_small(metadata_bytes)
            self._admit(call, rpc, tokens)
            raw = await self._first_message(call, rpc)
            # Only now: a call whose message never comes holds no place (spec d.1, S76).
            self._limiter.enter()
            try:
                answer = await self._answer(self._request_of(raw, call, rpc), call)
            finally:
                self._limiter.leave()
            result = self._serialize(answer)
            call.tell_written()
        except BaseException as error:
            await self._refuse(call, rpc, error)
        self._chain.expiry.forget(call)
        self._note_end(call, "OK")
        return result

    async def _answer(self, request: Any, call: Context) -> Any:  # noqa: ANN401
        """Run the method; what lost a race in the database is run again, if it may be repeated."""
        for pause_s in self._race_pauses_s:
            try:
                return await self._behaviour(request, call)
            except RaceLost:
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
        return await self._behaviour(request, call)

    async def serve_stream(self, _requests: object, rpc: Any) -> None:  # noqa: ANN401
        """A stream of answers; see RpcMethod.serve."""
        call, tokens, metadata_bytes = _call_of(self._policy.path, rpc)
        self._chain.open_streams.add(call)
        try:
            self._require_small(metadata_bytes)
            self._admit(call, rpc, tokens)
            await self._answer_stream(call, rpc)
            call.tell_written()
        except BaseException as error:
            await self._refuse(call, rpc, error)
        finally:
            self._chain.expiry.forget(call)
            self._chain.open_streams.remove(call)
        self._note_end(call, "OK")

    async def _answer_stream(self, call: Context, rpc: Any) -> None:  # noqa: ANN401
        raw = await self._first_message(call, rpc)
        self._limiter.enter()
        try:
            request = self._request_of(raw, call, rpc)
            async with aclosing(self._behaviour(request, call)) as answers:
                async for answer in answers:
                    await rpc.write(self._serialize(answer))
        finally:
            self._limiter.leave()

    def _require_small(self, metadata_bytes: int) -> None:
        # grpcio tells its peers of a limit, and takes whatever comes from those who do not listen.
        if metadata_bytes > self._chain.metadata_bytes_max:
            raise InvalidRequest(
                f"the metadata is larger than {self._chain.metadata_bytes_max} bytes"
            )

    def _admit(self, call: Context, rpc: Any, tokens: Sequence[str]) -> None:  # noqa: ANN401
        """Everything that stands before the request message."""
        self._set_deadline(call, rpc)
        if tokens:
            self._identify(call, tokens)
        self._authorize(call.principal)
        token = call.metadata.get(causal.KEY, "")
        call.seen = causal.Seen.of_token(token, may_lag=self._policy.causal_reads)
        causal.begin(call.seen)
        current_call.set(call)

    def _set_deadline(self, call: Context, rpc: Any) -> None:  # noqa: ANN401
        policy, asked_s = self._policy, rpc.time_remaining()
        if asked_s is not None and asked_s <= 0:
            raise DeadlineExceeded("the time for this call was spent before it began")
        left_s = policy.deadline_default_s if asked_s is None else asked_s
        left_s = min(left_s, policy.deadline_max_s)
        now_s = time.monotonic()
        call.deadline_s = now_s + left_s
        deadline.set_deadline(call.deadline_s)
        # For both: the deadline, and the time by which the message must have come.
        self._chain.expiry.watch(call, now_s + min(left_s, self._chain.read_timeout_s))

    def _identify(self, call: Context, tokens: Sequence[str]) -> None:
        if len(tokens) > 1:
            raise TokenRefused("more than one identity was given")
        call.principal = self._chain.verifier.verify(tokens[0])
        call.identity_token = tokens[0]

    def _authorize(self, principal: Principal) -> None:
        policy = self._policy
        if principal.kind not in self._admitted:
            if principal.kind is PrincipalKind.PUBLIC and self._admitted:
                raise Unauthenticated("this method needs a credential")
            raise PermissionDenied("this caller may not use this method")
        if not policy.scopes <= principal.scopes:
            missing = min(policy.scopes - principal.scopes)
            raise PermissionDenied(
                f"the credential lacks the scope {missing}", metadata={"scope": missing}
            )

    async def _first_message(self, call: Context, rpc: Any) -> bytes:  # noqa: ANN401
        """The request message; nothing yet of a method whose requests are a stream."""
        if self._policy.client_streaming:
            return b""
        call.awaits_message = True
        raw: Any = await rpc.read()
        if raw is grpc.aio.EOF:
            raise InvalidRequest("the request message is missing")
        call.awaits_message = False
        return cast("bytes", raw)

    async def _requests(self, rpc: Any) -> AsyncIterator[Message]:  # noqa: ANN401
        small_left = float(self._chain.small_messages_max)
        while small_left > 0:
            try:
                async with asyncio.timeout(self._chain.stream_idle_s):
                    raw = await rpc.read()
            except TimeoutError as error:
                raise DeadlineExceeded("the stream's next message did not come") from error
            if raw is grpc.aio.EOF:
                await _until_cancelled(rpc)
                return
            small_left -= 1 - len(raw) / SMALL_MESSAGE_BYTES
            yield self._reader.read(raw)
        raise InvalidRequest("the stream has too many small messages: send larger ones")

    def _request_of(self, raw: bytes, call: Context, rpc: Any) -> Any:  # noqa: ANN401
        """What the handler is given: one message, or an iterator of them."""
        if self._policy.client_streaming:
            call.idempotency_key = self._key_of(None, call)
            call.reached_handler = True
            return self._requests(rpc)
        request = self._reader.read(raw)
        call.idempotency_key = self._key_of(request, call)
        for name, scope in self._policy.principal_fields:
            value = getattr(request, name)
            if value and value != call.principal.subject and not call.principal.may(scope):
                raise PermissionDenied(f"{name} must name the caller")
        call.reached_handler = True
        return request

    def _key_of(self, request: Message | None, call: Context) -> str:
        # A client stream is asked for its key before its first message is there.
        has_field = request is not None and self._policy.has_request_id
        given = getattr(request, REQUEST_ID_FIELD) if has_field else ""
        key: str = given or call.metadata.get(IDEMPOTENCY_KEY, "")
        if not key:
            if self._needs_key:
                raise InvalidRequest.of_field(
                    REQUEST_ID_FIELD,
                    "is required: the same value on every try of the same request"
                    " (over REST: the header Idempotency-Key)",
                )
        elif len(key) > IDEMPOTENCY_KEY_CHARACTERS_MAX or not key.isprintable():
            raise InvalidRequest.of_field(REQUEST_ID_FIELD, "must be 1 to 255 printable characters")
        return key

    async def _refuse(self, call: Context, rpc: Any, error: BaseException) -> NoReturn:  # noqa: ANN401
        self._chain.expiry.forget(call)
        try:
            refusal = _refusal_of(error, call)
        except BaseException:  # the caller left: nobody waits for an answer
            self._note_end(call, "CANCELLED")
            raise
        status = status_of(refusal, request_id=call.request_id)
        self._note_end(call, status.code.name, reason=refusal.error_reason)
        trailing: Metadata = status.trailing_metadata
        if call.is_replayed:
            trailing = (*trailing, REPLAYED_METADATA)
        await rpc.abort(status.code, status.message, trailing)
        raise AssertionError("abort raises")

    def _note_end(self, call: Context, code: str, *, reason: str = "") -> None:
        if self._chain.durations is not None:
            self._chain.durations.note(call.method, code, call.started_s)
        if not self._chain.logs_requests:
            return
        fields = {
            "level": "info",
            "event": "call",
            "method": call.method,
            "code": code,
            "duration_ms": round((time.monotonic() - call.started_s) * 1000, 2),
            "request_id": call.request_id,
            "principal": call.principal.kind,
            "tenant": call.principal.tenant,
            "handled": call.reached_handler,
        }
        if reason:
            fields["reason"] = reason
        log.write_request_line(fields)


def _no_codec(value: Any) -> Any:  # noqa: ANN401
    return value


def _behaviour_of(handler: MethodHandler) -> Behaviour:
    behaviour: Any = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    return cast("Behaviour", behaviour)


async def _until_cancelled(rpc: Any) -> None:  # noqa: ANN401
    """Return if a stream of requests has ended; if its caller has left, be cancelled here.

    grpc.aio tells both alike, and cancels the call some turns of the loop later: half of the
    uploads that were cut short were taken for whole. A second read comes back after that.
    """
    await rpc.read()
    await asyncio.sleep(CANCEL_ARRIVES_S)


def _call_of(path: str, rpc: Any) -> tuple[Context, Sequence[str], int]:  # noqa: ANN401
    """The call as its metadata describes it, the identities in it, unread, and its size.

    The size is what RFC 9113 §6.5.2 counts.
    """
    started_s, metadata, tokens, size = time.monotonic(), {}, [], 0
    for key, value in rpc.invocation_metadata():
        size += len(key) + len(value) + 32
        if key == IDENTITY_METADATA_KEY:
            tokens.append(value)
        elif isinstance(value, str):
            metadata[key] = value
    request_id = metadata.get(REQUEST_ID_KEY, "")
    if not is_request_id(request_id):
        request_id = f"{getrandbits(128):032x}"  # tells calls apart; protects nothing
    log.set_request_id(request_id)
    call = Context(method=path, request_id=request_id, metadata=metadata, rpc=rpc)
    call.started_s, call.task = started_s, asyncio.current_task()
    return call, tokens, size


def is_request_id(text: str) -> bool:
    """Whether a correlation id from outside may be used: 1 to 128 printable ASCII characters."""
    return 0 < len(text) <= REQUEST_ID_CHARACTERS_MAX and text.isascii() and text.isprintable()


def _refusal_of(error: BaseException, call: Context) -> TenfoldError:
    """What the caller is told of an error; nothing of an unexpected one but the request id."""
    if isinstance(error, TenfoldError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return _refusal_of_cancel(error, call)
    if isinstance(error, TimeoutError):
        if call.remaining_s() <= 0:
            return DeadlineExceeded("the time for this call is spent")
        _logger.warning("a step timed out", method=call.method, exc_info=error)
        return Unavailable("a part that is needed did not answer in time")
    if not isinstance(error, Exception):
        raise error
    _logger.error("unexpected error", method=call.method, exc_info=error)
    return Internal(f"an internal error occurred; quote the request id {call.request_id}")


def _refusal_of_cancel(error: asyncio.CancelledError, call: Context) -> TenfoldError:
    task = asyncio.current_task()
    assert task is not None
    if call.has_ended_by_server:
        task.uncancel()
        return Unavailable("the server is stopping", retry_after_s=OVERLOADED_RETRY_AFTER_S)
    if call.has_expired and task.uncancel() == 0:
        if call.awaits_message:
            return DeadlineExceeded("the request message did not come in time")
        return DeadlineExceeded("the time for this call is spent")
    if task.cancelling():  # the caller left, or its deadline passed: nobody waits for an answer
        raise error
    # A handler raised it by itself; unanswered, the caller would hang until its deadline.
    _logger.error("a cancellation escaped from a handler", method=call.method, exc_info=error)
    return Unavailable("the call was cut short; the outcome is unknown")
