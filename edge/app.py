"""The HTTP app: one request at a time through one ordered list of steps.

No step knows a service. What a method needs is in its contract.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from edge import charges as charging
from edge import raw, streams
from edge.auth import Authenticator, authorize
from edge.charges import Charges
from edge.cors import Cors, is_preflight
from edge.deadlines import timeout_of
from edge.exchange import Exchange, HeaderList, Receive, Scope, Send, address_block
from edge.fields import AnyMessage, descriptor_of
from edge.health import Readiness
from edge.problem import Problem, http_problem, problem_of
from edge.quota import Quota
from edge.quota_store import LocalQuotaStore
from edge.refusals import (
    BodyTooLarge,
    ClientLeft,
    HttpRefusal,
    MethodNotAllowed,
    UnsupportedMediaType,
)
from edge.routes import Match, Route, RouteTable
from edge.transcode import (
    HTTP_BODY,
    http_body_of,
    request_message,
    response_json,
    set_request_id,
)
from edge.upstream import Caller, Upstream
from shared import log
from shared.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    QuotaExceeded,
    TenfoldError,
    Unavailable,
    Unimplemented,
)
from shared.rpc.policy import Access, Idempotency
from shared.rpc.status import code_of

JSON = b"application/json"
IDEMPOTENCY_KEY_CHARACTERS_MAX = 255
# What nginx logs for a client that closed before the answer; it is never sent.
CLIENT_LEFT_STATUS = 499
OVERLOADED_RETRY_AFTER_S = 0.5

_CHARSET = re.compile(r'\s*charset\s*=\s*"?utf-?8"?\s*', re.IGNORECASE)
_log = log.get_logger("edge")

Step = Callable[[Exchange], Awaitable[None]]


@dataclass(frozen=True)
class Document:
    """A page that the edge itself serves.

    Attributes:
        headers: content-type and what else it needs.
        body: its bytes.
    """

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        body_bytes_max: of a JSON body, or a raw one whose contract says nothing.
        body_timeout_s: for a whole JSON body; for raw ones, the longest pause.
        requests_max: in flight at once, streams included.
        address: what one address block may do; counted in this process only.
        heartbeat_s: the longest silence in a stream.
    """

    body_bytes_max: int
    body_timeout_s: float
    requests_max: int
    address: Quota
    heartbeat_s: float = streams.HEARTBEAT_S


@dataclass(frozen=True)
class Parts:
    """What the app is made of.

    Attributes:
        routes: which method answers what.
        authenticator: None where the upstream knows no identities.
        public_url: scheme and host that clients use, or "" to take them from requests.
        documents: by path: the OpenAPI document, the reference and its files.
        trusted_hops: how many proxies in front append to X-Forwarded-For.
    """

    routes: RouteTable
    upstream: Upstream
    charges: Charges
    addresses: LocalQuotaStore
    limits: Limits
    cors: Cors
    readiness: Readiness
    open_streams: streams.OpenStreams
    documents: Mapping[bytes, Document]
    authenticator: Authenticator | None = None
    public_url: str = ""
    trusted_hops: int = 0


class EdgeApp:
    """The ASGI application."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._in_flight = 0
        self._is_draining = False
        # The path of a request, in order. A step refuses by raising, and ends the path by
        # answering.
        self._steps: tuple[Step, ...] = (
            self._admit,
            self._serve_own,
            self._find_route,
            self._bound_time,
            self._authenticate,
            self._authorize,
            self._charge,
            self._call,
        )

    def drain(self) -> None:
        """Say "not ready" from now on, and end open streams; requests in flight go on."""
        self._is_draining = True
        self._parts.open_streams.end_all(
            Unavailable("This edge is restarting; connect again.", retry_after_s=1)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI call."""
        if scope["type"] != "http":
            raise ValueError(f"this app serves http, not {scope['type']}")
        exchange = Exchange.of(scope, receive, send, trusted_hops=self._parts.trusted_hops)
        log.set_request_id(exchange.request_id)
        self._in_flight += 1
        try:
            await self._serve(exchange)
        finally:
            self._in_flight -= 1
            _write_line(exchange)
        if exchange.charge is not None:
            await self._parts.charges.settle(exchange.charge)

    async def _serve(self, exchange: Exchange) -> None:
        """The boundary: whatever happens inside, the client gets one answer."""
        try:
            for step in self._steps:
                await step(exchange)
                if exchange.is_answered:
                    return
        except ClientLeft:
            exchange.status = CLIENT_LEFT_STATUS
        except TenfoldError as error:
            await self._refuse(exchange, error)
        except Exception:
            _log.exception("request failed")
            await self._refuse(exchange, Internal("unexpected"))

    async def _refuse(self, exchange: Exchange, error: TenfoldError) -> None:
        if exchange.is_answered:  # too late to say so; the unfinished answer ends the connection
            _log.warning("answer broken off", reason=error.error_reason, detail=error.message)
            return
        if exchange.charge is not None:
            charging.note_error(exchange.charge, error)
        document = self._problem(exchange, error)
        headers = [(k.encode(), v.encode("latin-1")) for k, v in document.headers.items()]
        headers.append((b"cache-control", b"no-store"))
        try:
            exchange.answer_headers = self._parts.cors.answer_headers(exchange)
            await exchange.respond(document.status, headers, document.body)
        except ClientLeft:
            exchange.status = CLIENT_LEFT_STATUS

    def _problem(self, exchange: Exchange, error: TenfoldError) -> Problem:
        if isinstance(error, HttpRefusal):
            return http_problem(
                error.http_status,
                code=code_of(error).name,
                reason=error.error_reason,
                detail=error.message,
                request_id=exchange.request_id,
                headers=error.headers,
            )
        return problem_of(error, request_id=exchange.request_id, route=exchange.route)

    # The steps, in their order
    async def _admit(self, exchange: Exchange) -> None:
        """Refuse what is too much before anything is spent on it."""
        if self._in_flight > self._parts.limits.requests_max:
            raise Overloaded("The edge is full.", retry_after_s=OVERLOADED_RETRY_AFTER_S)
        block, quota = address_block(exchange.address), self._parts.limits.address
        verdict = self._parts.addresses.spend_now(block, quota, 1)
        if not verdict.is_allowed:
            message = "Too many requests come from this address."
            raise QuotaExceeded(
                message, retry_after_s=verdict.retry_after_s, metadata={"quota": quota.name}
            )

    async def _serve_own(self, exchange: Exchange) -> None:
        """Health, the OpenAPI document and the reference; nothing of a service."""
        path = exchange.raw_path
        if path == b"/healthz":
            _require_get(exchange)
            await exchange.respond(200, _text(b"no-store"), b"ok\n")
        elif path == b"/readyz":
            _require_get(exchange)
            await self._serve_readiness(exchange)
        elif path in self._parts.documents:
            _require_get(exchange)
            document = self._parts.documents[path]
            await exchange.respond(200, document.headers, document.body)

    async def _serve_readiness(self, exchange: Exchange) -> None:
        missing = ["edge (draining)"] if self._is_draining else []
        missing += await self._parts.readiness.missing()
        if not missing:
            await exchange.respond(200, _text(b"no-store"), b"ready\n")
            return
        raise Unavailable(
            f"Not ready: {', '.join(missing)}.",
            metadata={"missing": ", ".join(missing)},
            retry_after_s=1,
            reason="NOT_READY",
        )

    async def _find_route(self, exchange: Exchange) -> None:
        """Which method answers; preflights, OPTIONS and HEAD come from the table, too."""
        if is_preflight(exchange):
            await self._answer_preflight(exchange)
            return
        method, path = exchange.method, exchange.raw_path
        found = self._parts.routes.match(method, path)
        if not isinstance(found, Match) and method == "HEAD" and "GET" in found.allowed_methods:
            found = self._parts.routes.match("GET", path)
            if isinstance(found, Match) and found.route.method.server_streaming:
                raise _not_allowed(("GET",))
        if isinstance(found, Match):
            exchange.route, exchange.captures = found.route, found.captures
            exchange.answer_headers = self._parts.cors.answer_headers(exchange)
        elif not found.allowed_methods:
            raise NotFound("Nothing is served at this path.", reason="ROUTE_NOT_FOUND")
        elif method == "OPTIONS":
            allowed = _allow(found.allowed_methods).encode()
            await exchange.respond(204, [(b"allow", allowed)])
        else:
            raise _not_allowed(found.allowed_methods)

    async def _answer_preflight(self, exchange: Exchange) -> None:
        headers = self._parts.cors.preflight_headers(exchange)
        if headers is None:
            await exchange.respond(403, [(b"vary", b"origin")])
        else:
            await exchange.respond(204, headers)

    async def _bound_time(self, exchange: Exchange) -> None:
        """The deadline runs from the first byte of the request."""
        policy = exchange.call.method.policy
        timeout_s = timeout_of(
            exchange.header("grpc-timeout"),
            default_s=policy.deadline_default_s,
            max_s=policy.deadline_max_s,
        )
        exchange.deadline_s = exchange.started_s + timeout_s

    async def _authenticate(self, exchange: Exchange) -> None:
        """A bad credential is refused even where none is needed."""
        if self._parts.authenticator is not None:
            exchange.principal = await self._parts.authenticator.principal_of(exchange)

    async def _authorize(self, exchange: Exchange) -> None:
        if self._parts.authenticator is not None:
            authorize(exchange.call.method.policy, exchange.principal)

    async def _charge(self, exchange: Exchange) -> None:
        block = address_block(exchange.address)
        charge = await self._parts.charges.charge(exchange.call, exchange.principal, block)
        exchange.charge = charge
        if not charge.verdict.is_allowed:
            raise charging.refuse(charge)

    async def _call(self, exchange: Exchange) -> None:
        method = exchange.call.method
        if exchange.call.raw is not None:
            await self._call_raw(exchange)
        elif method.client_streaming:
            raise Unimplemented("Client streams are not served over REST.")
        elif method.server_streaming:
            await self._call_stream(exchange)
        else:
            await self._call_unary(exchange)

    # The three kinds of call
    async def _call_unary(self, exchange: Exchange) -> None:
        route = exchange.call
        streams.choose_media_type(exchange.header("accept"), _offers(route))
        request = await self._request(exchange)
        reply = await self._parts.upstream.unary(route.method, request, _caller(exchange))
        if reply.is_replayed and exchange.charge is not None:
            charging.note_replay(exchange.charge)
        content_type, body = JSON, b""
        http_body = http_body_of(route, reply.message)
        if http_body is None:
            body = response_json(route, reply.message)
        else:
            content_type, body = http_body[0].encode("ascii", "replace"), http_body[1]
        headers = [(b"content-type", content_type), (b"cache-control", _cache_control(route))]
        if reply.is_replayed:
            headers.append((b"idempotency-replayed", b"true"))
        await exchange.respond(200, headers, body)

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
            problem=lambda error: self._problem(exchange, error).body,
            heartbeat_s=self._parts.limits.heartbeat_s,
        )
        with self._opened(exchange) as ended:
            stream = self._parts.upstream.stream(route.method, request, _caller(exchange))
            await streams.relay(answer, stream, ended=ended)

    async def _call_raw(self, exchange: Exchange) -> None:
        route, limits = exchange.call, self._parts.limits
        assert route.raw is not None
        body_bytes_max = route.raw.body_bytes_max or limits.body_bytes_max
        _refuse_large(exchange, body_bytes_max)
        extra = raw.raw_metadata(exchange, public_url=self._parts.public_url)
        with self._opened(exchange) as ended:
            call = self._parts.upstream.bidirectional(route.method, _caller(exchange, extra))
            await raw.relay(
                exchange,
                call,
                body_bytes_max=body_bytes_max,
                body_idle_s=limits.body_timeout_s,
                ended=ended,
            )

    @contextmanager
    def _opened(self, exchange: Exchange) -> Iterator["asyncio.Future[TenfoldError]"]:
        credential = exchange.principal.credential
        with self._parts.open_streams.opened(
            credential or address_block(exchange.address)
        ) as ended:
            # A log-out between the check of the credential and here found nothing to end.
            if self._parts.authenticator is not None:
                self._parts.authenticator.require_valid(exchange.principal)
            yield ended

    # Requests
    async def _request(self, exchange: Exchange) -> Any:  # noqa: ANN401 - a message made at run time
        route, limits = exchange.call, self._parts.limits
        body = await exchange.read_body(
            bytes_max=limits.body_bytes_max, timeout_s=limits.body_timeout_s
        )
        content_type = exchange.header("content-type")
        if body and not _takes_any_body(route):
            _require_json(exchange, content_type)
        message = request_message(
            route, exchange.captures, exchange.query, body, content_type=content_type
        )
        self._set_request_id(exchange, message)
        return message

    def _set_request_id(self, exchange: Exchange, message: AnyMessage) -> None:
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


def _caller(exchange: Exchange, extra: list[tuple[str, str]] | None = None) -> Caller:
    timeout_s = exchange.remaining_s()
    if timeout_s <= 0:
        raise DeadlineExceeded("The time was spent before the call began.")
    return Caller(
        exchange.principal, timeout_s, exchange.request_id, exchange.traceparent, extra or ()
    )


def _offers(route: Route) -> list[str]:
    is_json = descriptor_of(route.method.output).full_name != HTTP_BODY and not route.response_body
    return ["application/json"] if is_json else ["application/json", "*/*"]


def _takes_any_body(route: Route) -> bool:
    request = descriptor_of(route.method.input)
    has_field = route.body not in {"", "*"}
    target = request.fields_by_name[route.body].message_type if has_field else request
    return target is not None and target.full_name == HTTP_BODY


def _require_json(exchange: Exchange, content_type: str) -> None:
    media_type, _, parameters = content_type.partition(";")
    if media_type.strip().lower() != "application/json":
        raise UnsupportedMediaType("Send the body as application/json.")
    if parameters and not _CHARSET.fullmatch(parameters):
        raise UnsupportedMediaType("The only charset taken is utf-8.")
    if exchange.header("content-encoding") not in {"", "identity"}:
        raise UnsupportedMediaType("Compressed bodies are not taken.")


def _refuse_large(exchange: Exchange, bytes_max: int) -> None:
    if int(exchange.headers.get(b"content-length", b"0")) > bytes_max:
        raise BodyTooLarge(f"The body is longer than {bytes_max} bytes.")


def _cache_control(route: Route) -> bytes:
    seconds = route.method.options.cache_max_age.seconds
    if not seconds:
        return b"no-store"
    who = "public" if route.method.policy.access is Access.PUBLIC else "private"
    return f"{who}, max-age={seconds}".encode()


def _text(cache_control: bytes) -> HeaderList:
    return [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"cache-control", cache_control),
    ]


def _require_get(exchange: Exchange) -> None:
    if exchange.method not in {"GET", "HEAD"}:
        raise _not_allowed(("GET",))


def _not_allowed(methods: tuple[str, ...]) -> MethodNotAllowed:
    allow = _allow(methods)
    return MethodNotAllowed(f"This path answers {allow}.", headers={"allow": allow})


def _allow(methods: tuple[str, ...]) -> str:
    also = {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    return ", ".join(sorted({*methods, *also}))


def _write_line(exchange: Exchange) -> None:
    route = exchange.route
    log.write_request_line(
        {
            "level": "info",
            "component": "edge",
            "event": "request",
            "request_id": exchange.request_id,
            "http_method": exchange.method,
            "route": route.template.text if route else "",
            "method": route.method.full_name if route else "",
            "status": exchange.status,
            "duration_ms": round((time.monotonic() - exchange.started_s) * 1000, 2),
            "tenant": exchange.principal.tenant,
        }
    )
