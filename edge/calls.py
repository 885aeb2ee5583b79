"""The kinds of call: a unary method, a server stream, a client stream, a raw binding.

A request gets here when every other step has let it pass.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from edge import charges as charging
from edge import raw, streams
from edge.answer import NOT_MODIFIED, Answers, answers_of
from edge.auth import Authenticator
from edge.client_streams import Requests, StreamLimits, collect
from edge.compression import VARY, coded, codings_for, decoded, headers_of_coding, may_gain
from edge.etags import Condition
from edge.exchange import Exchange, address_block, spent_in_request, too_large
from edge.fields import AnyMessage
from edge.forwarding import Forwarding, headers_of, in_bytes, metadata_of
from edge.gzipped import GzipStream
from edge.http1_text import HeaderList
from edge.idempotency import key_of, require_key
from edge.json_text import Wrong
from edge.negotiation import NO_CODINGS, Codings, require_media_type
from edge.problem import ErrorTeller, problem_of
from edge.query import set_leaf
from edge.shapes import shape_of
from edge.transcode import (
    JSON,
    http_body_of,
    plan_of,
    request_message,
    response_json,
    set_request_id,
)
from edge.upstream import Caller, Reply, Upstream
from shared.errors import InvalidRequest, TenfoldError
from shared.rpc.policy import Idempotency

# What W3C Trace Context §3.3.1.5 asks to carry at least; longer ones are dropped.
TRACE_STATE_CHARACTERS_MAX = 512
_TRACE_STATE = b"tracestate"


@dataclass(frozen=True)
class CallLimits:
    """What one call may take.

    Attributes:
        body_bytes_max: of a JSON body, or a raw one whose contract says nothing.
        body_timeout_s: for a whole JSON body; for raw ones and streams, the longest pause.
        line_bytes_max: of one line of a client stream.
        stream_bytes_max: of the whole body of a client stream.
        heartbeat_s: the longest silence in a stream.
    """

    body_bytes_max: int
    body_timeout_s: float
    line_bytes_max: int
    stream_bytes_max: int
    heartbeat_s: float = streams.HEARTBEAT_S


class Calls:
    """Makes calls to the services, and answers with what they say.

    Args:
        upstream: the services.
        open_streams: counts streams, and ends them from outside.
        limits: what one call may take.
        forwarding: which headers cross.
        authenticator: None where the upstream knows no identities.
        public_url: scheme and host that clients use, or "" to take them from requests.
        tell: tells of an error that ends a stream.
    """

    def __init__(
        self,
        upstream: Upstream,
        open_streams: streams.OpenStreams,
        limits: CallLimits,
        forwarding: Forwarding,
        *,
        authenticator: Authenticator | None = None,
        public_url: str = "",
        tell: ErrorTeller = problem_of,
    ) -> None:
        self._upstream = upstream
        self._open_streams = open_streams
        self._limits = limits
        self._forwarding = forwarding
        self._forwards = forwarding.is_needed
        self._authenticator = authenticator
        self._public_url = public_url
        self._tell = tell

    async def make(self, exchange: Exchange) -> None:
        """Call the method of a request that was let in, and answer.

        Raises:
            TenfoldError: nothing was answered yet, and this is why it was refused.
            ClientLeft: the client closed the connection.
        """
        method = exchange.call.method
        if exchange.call.raw is not None:
            await self._call_raw(exchange)
        elif method.client_streaming:
            await self._call_client_stream(exchange)
        elif method.server_streaming:
            await self._call_stream(exchange)
        else:
            await self._call_unary(exchange)

    async def _call_unary(self, exchange: Exchange) -> None:
        route, answers = exchange.call, answers_of(exchange.call)
        answers.require_acceptable(exchange.header("accept"))
        codings = NO_CODINGS
        if b"accept-encoding" in exchange.headers:
            codings = codings_for(exchange, may_compress=shape_of(route).may_compress)
        request = await self._request(exchange)
        condition = _condition(exchange, request, answers)
        if route.method.policy.idempotency is Idempotency.SAFE:
            exchange.cancel_when_client_leaves()  # an effect goes on: the client may only be gone
        try:
            reply = await self._upstream.unary(route.method, request, self.caller_of(exchange))
        except TenfoldError as error:
            failure = condition.failure_of(error) if condition is not None else None
            if failure is None:
                raise
            raise failure from error
        await self._respond(exchange, reply, codings, condition)

    async def _respond(
        self,
        exchange: Exchange,
        reply: Reply,
        codings: Codings,
        condition: Condition | None = None,
    ) -> None:
        route = exchange.call
        answer = answers_of(route).of(reply.message, condition)
        if reply.is_replayed:
            if exchange.charge is not None:
                charging.note_replay(exchange.charge)
            answer.headers.append((b"idempotency-replayed", b"true"))
        if self._forwards:
            leaving = headers_of(self._forwarding.of(route.method), reply.initial, reply.trailing)
            own = {name for name, _ in answer.headers}  # such as Location: the edge knows its paths
            answer.headers.extend(header for header in leaving if header[0] not in own)
        if may_gain(answer.body, codings) and shape_of(route).may_compress:
            answer = await coded(answer, codings)
        elif answer.status == NOT_MODIFIED and shape_of(route).may_compress:
            answer.headers.append(VARY)  # as the whole answer would have it (RFC 9110 §15.4.5)
        await exchange.respond(answer.status, answer.headers, answer.body)

    async def _call_stream(self, exchange: Exchange) -> None:
        answer = self._stream_answer(exchange)
        request = await self._request(exchange)
        _resume(exchange, request)
        with self.opened(exchange) as ended:
            stream = self._upstream.stream(exchange.call.method, request, self.caller_of(exchange))
            leaving = self._leaving_stream(exchange)
            await streams.relay(answer, stream, ended=ended, headers=leaving)

    async def _call_client_stream(self, exchange: Exchange) -> None:
        method, limits = exchange.call.method, self._limits
        if method.server_streaming:
            answer = self._stream_answer(exchange)
        else:
            answers_of(exchange.call).require_acceptable(exchange.header("accept"))
            codings = codings_for(exchange, may_compress=shape_of(exchange.call).may_compress)
        requests = Requests(
            exchange,
            StreamLimits(limits.line_bytes_max, limits.stream_bytes_max, limits.body_timeout_s),
        )
        caller = self.caller_of(exchange, _key_of_stream(exchange))
        with self.opened(exchange) as ended:
            call = self._upstream.bidirectional(method, caller)
            if method.server_streaming:
                send, leaving = partial(requests.send, call), self._leaving_stream(exchange)
                await streams.relay(answer, call, ended=ended, send=send, headers=leaving)
            else:
                reply = await collect(exchange, requests, call, ended=ended)
                await self._respond(exchange, reply, codings)

    def _stream_answer(self, exchange: Exchange) -> streams.StreamAnswer:
        route, shape = exchange.call, shape_of(exchange.call)
        if shape.answers_bytes:
            codings_for(exchange, may_compress=False)
            return streams.ByteAnswer(exchange, partial(http_body_of, route))
        framing = streams.choose_framing(exchange.header("accept"))
        heartbeat_s = self._limits.heartbeat_s
        may_compress = framing.may_compress and shape.may_compress
        codings = codings_for(exchange, may_compress=may_compress)
        return streams.Answer(
            exchange,
            framing,
            encode=lambda message: response_json(route, message),
            problem=lambda error: (
                self._tell(error, request_id=exchange.request_id, route=route).line
            ),
            heartbeat_s=heartbeat_s,
            first_message_s=min(streams.FIRST_MESSAGE_S, heartbeat_s),
            headers=headers_of_coding(codings) if may_compress else [],
            gzip=GzipStream() if may_compress and codings.likes_gzip else None,
        )

    async def _call_raw(self, exchange: Exchange) -> None:
        route, limits = exchange.call, self._limits
        assert route.raw is not None
        body_bytes_max = route.raw.body_bytes_max or limits.body_bytes_max
        _refuse_large(exchange, body_bytes_max)
        extra = raw.raw_metadata(exchange, public_url=self._public_url)
        with self.opened(exchange) as ended:
            call = self._upstream.bidirectional(route.method, self.caller_of(exchange, extra))
            await raw.relay(
                exchange,
                call,
                body_bytes_max=body_bytes_max,
                body_idle_s=limits.body_timeout_s,
                ended=ended,
            )

    @contextmanager
    def opened(self, exchange: Exchange) -> Iterator["asyncio.Future[TenfoldError]"]:
        """See OpenStreams.opened; a credential that has been revoked opens nothing."""
        credential = exchange.principal.credential
        with self._open_streams.opened(credential or address_block(exchange.address)) as ended:
            # A log-out between the check of the credential and here found nothing to end.
            if self._authenticator is not None:
                self._authenticator.require_valid(exchange.principal)
            yield ended

    # Headers that cross
    def caller_of(self, exchange: Exchange, extra: Sequence[tuple[str, str]] = ()) -> Caller:
        """What travels beside the message.

        Args:
            exchange: the request.
            extra: what travels beside its listed headers.

        Raises:
            DeadlineExceeded: nothing is left of the time.
            HttpRefusal: a listed header cannot be sent on.
        """
        timeout_s = exchange.remaining_s()
        if timeout_s <= 0:
            raise spent_in_request()
        if self._forwards:
            crossing = self._forwarding.of(exchange.call.method)
            extra = [*extra, *metadata_of(exchange, crossing)]
        if exchange.traceparent and _TRACE_STATE in exchange.headers:
            extra = [*extra, *_trace_state(exchange.headers[_TRACE_STATE])]
        return Caller(
            exchange.principal, timeout_s, exchange.request_id, exchange.traceparent, extra
        )

    def _leaving_stream(
        self, exchange: Exchange
    ) -> Callable[[Mapping[str, str]], HeaderList] | None:
        """What of a stream's initial metadata are headers of the answer; see `streams.relay`."""
        crossing = self._forwarding.of(exchange.call.method)
        if not crossing.leaving:
            return None
        return lambda metadata: headers_of(crossing, in_bytes(metadata))

    # Requests
    async def _request(self, exchange: Exchange) -> Any:  # noqa: ANN401 - a message made at run time
        route, limits = exchange.call, self._limits
        body = await exchange.read_body(
            bytes_max=limits.body_bytes_max, timeout_s=limits.body_timeout_s
        )
        content_type = exchange.header("content-type")
        if body:
            if not plan_of(route).takes_any_body:
                # Not application/merge-patch+json, even where a mask is made from the body: RFC
                # 7396 would merge maps key by key, and a mask replaces them.
                require_media_type(content_type, (JSON,))
            if b"content-encoding" in exchange.headers:
                coding = exchange.header("content-encoding")
                body = decoded(body, coding, bytes_max=limits.body_bytes_max)
        message = request_message(
            route, exchange.captures, exchange.query, body, content_type=content_type
        )
        fill_request_id(exchange, message)
        return message


def fill_request_id(exchange: Exchange, message: AnyMessage) -> None:
    """Put the Idempotency-Key header into the request.

    Raises:
        InvalidRequest: the header is no key, or differs from the request's own; or there is
            neither, and the contract needs one.
    """
    key = key_of(exchange)
    if not exchange.call.takes_request_id:
        return
    if key:
        set_request_id(message, key)
    if not message.request_id:
        require_key(exchange)


def _key_of_stream(exchange: Exchange) -> list[tuple[str, str]]:
    """The Idempotency-Key as metadata: it names the call, and each message is only a part of it."""
    key = key_of(exchange)
    if not key:
        require_key(exchange)
    return [("idempotency-key", key)] if key else []


def _resume(exchange: Exchange, request: AnyMessage) -> None:
    """Put Last-Event-ID into the request, over what the URL says."""
    cursor, leaf = exchange.header("last-event-id"), shape_of(exchange.call).cursor
    if not cursor or leaf is None:
        return
    try:
        set_leaf(request, leaf, [cursor])
    except Wrong as wrong:
        raise InvalidRequest.of_field("Last-Event-ID", wrong.description) from None


def _trace_state(value: bytes) -> list[tuple[str, str]]:
    """The vendors' part of the trace context; a malformed one is dropped, as W3C asks."""
    text = value.decode("latin-1")
    is_sound = len(text) <= TRACE_STATE_CHARACTERS_MAX and text.isascii() and text.isprintable()
    return [("tracestate", text)] if is_sound else []


def _condition(exchange: Exchange, request: AnyMessage, answers: Answers) -> Condition | None:
    if b"if-match" not in exchange.headers and b"if-none-match" not in exchange.headers:
        return None
    if_match, if_none_match = exchange.header("if-match"), exchange.header("if-none-match")
    return answers.etags.condition(request, if_match, if_none_match)


def _refuse_large(exchange: Exchange, bytes_max: int) -> None:
    if int(exchange.headers.get(b"content-length", b"0")) > bytes_max:
        raise too_large(bytes_max)
