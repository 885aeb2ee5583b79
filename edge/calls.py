"""The three kinds of call: a unary method, a server stream, a raw binding.

A request gets here when every other step has let it pass.
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from edge import charges as charging
from edge import raw, streams
from edge.answer import Answers, answers_of
from edge.auth import Authenticator
from edge.etags import Condition
from edge.exchange import Exchange, address_block, too_large
from edge.fields import AnyMessage, descriptor_of
from edge.problem import ErrorTeller, problem_of
from edge.refusals import UnsupportedMediaType
from edge.transcode import JSON, plan_of, request_message, response_json, set_request_id
from edge.upstream import Caller, Upstream
from shared.errors import DeadlineExceeded, InvalidRequest, TenfoldError, Unimplemented
from shared.rpc.policy import Idempotency

IDEMPOTENCY_KEY_CHARACTERS_MAX = 255
_CHARSET = re.compile(r'\s*charset\s*=\s*"?utf-?8"?\s*', re.IGNORECASE)


@dataclass(frozen=True)
class CallLimits:
    """What one call may take.

    Attributes:
        body_bytes_max: of a JSON body, or a raw one whose contract says nothing.
        body_timeout_s: for a whole JSON body; for raw ones, the longest pause.
        heartbeat_s: the longest silence in a stream.
    """

    body_bytes_max: int
    body_timeout_s: float
    heartbeat_s: float = streams.HEARTBEAT_S


class Calls:
    """Makes calls to the services, and answers with what they say.

    Args:
        upstream: the services.
        open_streams: counts streams, and ends them from outside.
        limits: what one call may take.
        authenticator: None where the upstream knows no identities.
        public_url: scheme and host that clients use, or "" to take them from requests.
        tell: tells of an error that ends a stream.
    """

    def __init__(
        self,
        upstream: Upstream,
        open_streams: streams.OpenStreams,
        limits: CallLimits,
        *,
        authenticator: Authenticator | None = None,
        public_url: str = "",
        tell: ErrorTeller = problem_of,
    ) -> None:
        self._upstream = upstream
        self._open_streams = open_streams
        self._limits = limits
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
            raise Unimplemented("Client streams are not served over REST.")
        elif method.server_streaming:
            await self._call_stream(exchange)
        else:
            await self._call_unary(exchange)

    async def _call_unary(self, exchange: Exchange) -> None:
        route, answers = exchange.call, answers_of(exchange.call)
        answers.require_acceptable(exchange.header("accept"))
        request = await self._request(exchange)
        condition = _condition(exchange, request, answers)
        if route.method.policy.idempotency is Idempotency.SAFE:
            exchange.cancel_when_client_leaves()  # an effect goes on: the client may only be gone
        try:
            reply = await self._upstream.unary(route.method, request, caller_of(exchange))
        except TenfoldError as error:
            failure = condition.failure_of(error) if condition is not None else None
            if failure is None:
                raise
            raise failure from error
        if reply.is_replayed and exchange.charge is not None:
            charging.note_replay(exchange.charge)
        answer = answers.of(reply.message, condition)
        if reply.is_replayed:
            answer.headers.append((b"idempotency-replayed", b"true"))
        await exchange.respond(answer.status, answer.headers, answer.body)

    async def _call_stream(self, exchange: Exchange) -> None:
        route = exchange.call
        framing = streams.choose_framing(exchange.header("accept"))
        request = await self._request(exchange)
        cursor = exchange.header("last-event-id")
        if cursor and streams.CURSOR_FIELD in descriptor_of(route.method.input).fields_by_name:
            cast("AnyMessage", request).cursor = cursor
        answer = streams.Answer(
            exchange,
            framing,
            encode=lambda message: response_json(route, message),
            problem=lambda error: (
                self._tell(error, request_id=exchange.request_id, route=route).line
            ),
            heartbeat_s=self._limits.heartbeat_s,
        )
        with self.opened(exchange) as ended:
            stream = self._upstream.stream(route.method, request, caller_of(exchange))
            await streams.relay(answer, stream, ended=ended)

    async def _call_raw(self, exchange: Exchange) -> None:
        route, limits = exchange.call, self._limits
        assert route.raw is not None
        body_bytes_max = route.raw.body_bytes_max or limits.body_bytes_max
        _refuse_large(exchange, body_bytes_max)
        extra = raw.raw_metadata(exchange, public_url=self._public_url)
        with self.opened(exchange) as ended:
            call = self._upstream.bidirectional(route.method, caller_of(exchange, extra))
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

    # Requests
    async def _request(self, exchange: Exchange) -> Any:  # noqa: ANN401 - a message made at run time
        route, limits = exchange.call, self._limits
        body = await exchange.read_body(
            bytes_max=limits.body_bytes_max, timeout_s=limits.body_timeout_s
        )
        content_type = exchange.header("content-type")
        if body and not plan_of(route).takes_any_body:
            _require_json(exchange, content_type)
        message = request_message(
            route, exchange.captures, exchange.query, body, content_type=content_type
        )
        fill_request_id(exchange, message)
        return message


def fill_request_id(exchange: Exchange, message: AnyMessage) -> None:
    """Put the Idempotency-Key header into the request.

    Raises:
        InvalidRequest: the header is too long, or differs from the request's own; or there is
            neither, and the contract needs one.
    """
    key = exchange.header("idempotency-key")
    if len(key) > IDEMPOTENCY_KEY_CHARACTERS_MAX:
        most = IDEMPOTENCY_KEY_CHARACTERS_MAX
        raise InvalidRequest.of_field("Idempotency-Key", f"must be at most {most} characters")
    if not exchange.call.takes_request_id:
        return
    if key:
        set_request_id(message, key)
    is_keyed = exchange.call.method.policy.idempotency is Idempotency.KEYED
    if is_keyed and not message.request_id:
        raise InvalidRequest.of_field(
            "Idempotency-Key", "this header is needed: a key of your own for each new effect"
        )


def caller_of(exchange: Exchange, extra: list[tuple[str, str]] | None = None) -> Caller:
    """What travels beside the message.

    Raises:
        DeadlineExceeded: nothing is left of the time.
    """
    timeout_s = exchange.remaining_s()
    if timeout_s <= 0:
        raise DeadlineExceeded("The time was spent before the call began.")
    return Caller(
        exchange.principal, timeout_s, exchange.request_id, exchange.traceparent, extra or ()
    )


def _condition(exchange: Exchange, request: AnyMessage, answers: Answers) -> Condition | None:
    if b"if-match" not in exchange.headers and b"if-none-match" not in exchange.headers:
        return None
    if_match, if_none_match = exchange.header("if-match"), exchange.header("if-none-match")
    return answers.etags.condition(request, if_match, if_none_match)


def _require_json(exchange: Exchange, content_type: str) -> None:
    # Not application/merge-patch+json, even where a mask is made from the body: RFC 7396 would
    # merge maps key by key, and a mask replaces them.
    media_type, _, parameters = content_type.partition(";")
    if media_type.strip().lower() != JSON:
        raise UnsupportedMediaType(f"Send the body as {JSON}.", headers={"accept": JSON})
    if parameters and not _CHARSET.fullmatch(parameters):
        raise UnsupportedMediaType("The only charset taken is utf-8.")
    if exchange.header("content-encoding") not in {"", "identity"}:
        raise UnsupportedMediaType("Compressed bodies are not taken.")


def _refuse_large(exchange: Exchange, bytes_max: int) -> None:
    if int(exchange.headers.get(b"content-length", b"0")) > bytes_max:
        raise too_large(bytes_max)
