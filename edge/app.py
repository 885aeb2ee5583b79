"""The HTTP app: one request at a time through one ordered list of steps.

No step knows a service. What a method needs is in its contract.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from edge import charges as charging
from edge.auth import Authenticator, authorize
from edge.calls import Calls
from edge.charges import Charge, Charges
from edge.connect import refusal_of
from edge.connect_calls import ConnectCalls
from edge.cors import Cors, is_preflight
from edge.deadlines import asked_s, connect_timeout_of, timeout_of
from edge.exchange import Exchange, address_block
from edge.health import Readiness
from edge.http1_request import Http1Request
from edge.http1_text import HeaderList, Refusal
from edge.measures import Measures
from edge.problem import ErrorTeller, problem_of, status_of
from edge.quota_store import LocalQuotaStore, Verdict
from edge.refusals import (
    ABNORMAL_USAGE,
    ClientLeft,
    MethodNotAllowed,
)
from edge.routes import Match, RouteTable
from edge.slots import Slots
from edge.streams import OpenStreams
from edge.upstream import Upstream
from shared import log
from shared.errors import (
    Internal,
    NotFound,
    Overloaded,
    QuotaExceeded,
    TenfoldError,
    Unavailable,
)
from shared.quota.gcra import Quota
from shared.telemetry.metrics import Metrics

# What nginx logs for a client that closed before the answer; it is never sent.
CLIENT_LEFT_STATUS = 499
OVERLOADED_RETRY_AFTER_S = 0.5
READY_POLL_S = 0.05
HEALTH_PATH, READY_PATH = b"/healthz", b"/readyz"
HEALTH_PATHS = frozenset({HEALTH_PATH, READY_PATH})

_log = log.get_logger("edge")

# The header with the client's deadline, and what reads it.
_TIMEOUT = ("grpc-timeout", timeout_of)
REQUEST_TIMEOUT = b"x-request-timeout"
_CONNECT_TIMEOUT = ("connect-timeout-ms", connect_timeout_of)

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
    """How much is let in.

    Attributes:
        requests_max: in flight at once, streams included.
        address: what one address block may do; counted in this process only.
    """

    requests_max: int
    address: Quota


@dataclass(frozen=True)
class Parts:
    """What the app is made of.

    Attributes:
        routes: which method answers what.
        upstream: the services.
        calls: makes those of REST.
        connect_calls: makes those in the Connect protocol.
        authenticator: None where the upstream knows no identities.
        documents: by path: the OpenAPI document, the reference and its files.
        tell: tells of an error.
        trusted_hops: how many proxies in front append to X-Forwarded-For.
        metrics: where the edge counts what it does.
    """

    routes: RouteTable
    upstream: Upstream
    calls: Calls
    connect_calls: ConnectCalls
    charges: Charges
    slots: Slots
    addresses: LocalQuotaStore
    limits: Limits
    cors: Cors
    readiness: Readiness
    open_streams: OpenStreams
    documents: Mapping[bytes, Document]
    authenticator: Authenticator | None = None
    tell: ErrorTeller = problem_of
    trusted_hops: int = 0
    metrics: Metrics = field(default_factory=Metrics)


class EdgeApp:
    """Answers requests, each with the parts that were in force when it came.

    Args:
        parts: what it begins with.

    Attributes:
        ask_reload: asks for a look at the contracts; set by whoever keeps them up to date.
    """

    def __init__(self, parts: Parts) -> None:
        self._traffic = _Traffic()
        self._steps = _Steps(parts, self._traffic)
        self.ask_reload: Callable[[], None] = lambda: None
        active = parts.metrics.gauge(
            "http_server_active_requests", "Requests in flight, streams included."
        )
        parts.metrics.watch(active, lambda: self._traffic.in_flight)

    def serve(self, request: Http1Request) -> Coroutine[Any, Any, None]:
        """Answer one request."""
        return self._steps.serve(request)

    def change(self, parts: Parts) -> None:
        """Answer with these parts from now on; requests in flight keep theirs."""
        self._steps = _Steps(parts, self._traffic)

    def drain(self) -> None:
        """Say "not ready" from now on, and end open streams; requests in flight go on."""
        self._traffic.is_draining = True
        self._steps.parts.open_streams.end_all(
            Unavailable("This edge is restarting; connect again.", retry_after_s=1)
        )

    async def until_ready(self, timeout_s: float) -> None:
        """Wait for everything that requests need, but no longer than this."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            if not await self._steps.parts.readiness.missing():
                return
            await asyncio.sleep(READY_POLL_S)

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Tell how many connections are open, at each scrape."""
        text = "Connections that clients have open."
        metrics = self._steps.parts.metrics
        metrics.watch(metrics.gauge("tenfold_http_connections", text), count)

    def note_refusal(self, refusal: Refusal) -> None:
        """Log and count what the HTTP server has refused before it was a request."""
        self._steps.measures.note_refusal(refusal.reason, refusal.status)
        if log.writes_requests():
            log.write_request_line(
                {
                    "level": "info",
                    "component": "edge",
                    "event": "refused",
                    "request_id": refusal.request_id,
                    "status": refusal.status,
                    "reason": refusal.reason,
                    "detail": refusal.detail,
                }
            )


@dataclass
class _Traffic:
    """What is the same whatever the parts are."""

    in_flight: int = 0
    is_draining: bool = False


class _Steps:
    """The steps of a request, with one set of parts."""

    def __init__(self, parts: Parts, traffic: _Traffic) -> None:
        self._parts = self.parts = parts
        self._traffic = traffic
        self.measures = Measures(parts.metrics, self._is_own)

    async def serve(self, request: Http1Request) -> None:
        """Answer one request."""
        exchange = Exchange.of(request, trusted_hops=self._parts.trusted_hops)
        log.set_request_id(exchange.request_id)
        self._traffic.in_flight += 1
        try:
            await self._serve(exchange)
        finally:
            self._traffic.in_flight -= 1
            self.measures.note_end(exchange)
            if log.writes_requests():
                _write_line(exchange)
        charge = exchange.charge
        if charge is not None and charge.refund_points:
            self._parts.charges.settle(charge)

    async def _serve(self, exchange: Exchange) -> None:
        """The boundary: whatever happens inside, the client gets one answer."""
        try:
            await self._answer(exchange)
        except ClientLeft:
            exchange.status = CLIENT_LEFT_STATUS
        except asyncio.CancelledError:
            if exchange.request.has_left:
                exchange.status = CLIENT_LEFT_STATUS
            raise
        except TenfoldError as error:
            await self._refuse(exchange, error)
        except Exception:
            _log.exception("request failed")
            await self._refuse(exchange, Internal("unexpected"))

    async def _refuse(self, exchange: Exchange, error: TenfoldError) -> None:
        if exchange.is_answered:  # too late to say so; the client sees a broken answer
            exchange.request.abort()
            _log.warning("answer broken off", reason=error.error_reason, detail=error.message)
            return
        if exchange.charge is not None:
            charging.note_error(exchange.charge, error)
        self.measures.note_refusal(error.error_reason, status_of(error))
        route = exchange.route
        told = (
            refusal_of(error, exchange)
            if route is not None and route.is_connect
            else self._parts.tell(error, request_id=exchange.request_id, route=route)
        )
        headers = [(k.encode(), v.encode("latin-1")) for k, v in told.headers.items()]
        headers.append((b"cache-control", b"no-store"))
        try:
            exchange.answer_headers = self._parts.cors.answer_headers(exchange)
            await exchange.respond(told.status, headers, told.body)
        except ClientLeft:
            exchange.status = CLIENT_LEFT_STATUS

    async def _answer(self, exchange: Exchange) -> None:
        """The path of a request: the steps, in their order. A step refuses by raising."""
        self._admit(exchange)
        if self._is_own(exchange.raw_path):
            await self._serve_own(exchange)
        elif not self._find_route(exchange):
            await self._answer_options(exchange)
        else:
            self._shed(exchange)
            self._bound_time(exchange)
            await self._authenticate(exchange)
            self._authorize(exchange)
            if not self._charge_now(exchange):
                await self._charge(exchange)
            await self._call(exchange)

    # The steps, in their order
    def _admit(self, exchange: Exchange) -> None:
        """Refuse what is too much before anything is spent on it."""
        if self._traffic.in_flight > self._parts.limits.requests_max:
            raise Overloaded("The edge is full.", retry_after_s=OVERLOADED_RETRY_AFTER_S)
        block, quota = address_block(exchange.address), self._parts.limits.address
        wait_s = self._parts.addresses.wait_s(block, quota)
        if wait_s > 0:
            self.measures.note_decision(quota.name, Verdict(False, wait_s))
            message = "Too many requests come from this address."
            metadata = {"quota": quota.name, "subject": "address"}
            raise QuotaExceeded(
                message, metadata=metadata, retry_after_s=wait_s, reason=ABNORMAL_USAGE
            )

    def _is_own(self, path: bytes) -> bool:
        return path in self._parts.documents or path in HEALTH_PATHS

    async def _serve_own(self, exchange: Exchange) -> None:
        """Health, the OpenAPI document and the reference; nothing of a service."""
        path = exchange.raw_path
        _require_get(exchange)
        if path == HEALTH_PATH:
            await exchange.respond(200, _text(b"no-store"), b"ok\n")
        elif path == READY_PATH:
            await self._serve_readiness(exchange)
        else:
            document = self._parts.documents[path]
            await exchange.respond(200, document.headers, document.body)

    async def _serve_readiness(self, exchange: Exchange) -> None:
        missing = ["edge (draining)"] if self._traffic.is_draining else []
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

    def _find_route(self, exchange: Exchange) -> bool:
        """Which method answers; False for OPTIONS, which the table itself answers."""
        method = exchange.method
        if method == "OPTIONS" and is_preflight(exchange):
            return False
        found = self._parts.routes.match(method, exchange.raw_path)
        if isinstance(found, Match):
            route = found.route
            if method == "HEAD" != route.http_method and route.method.server_streaming:
                raise _not_allowed(("GET",))
            exchange.route, exchange.captures = route, found.captures
            exchange.answer_headers = self._parts.cors.answer_headers(exchange)
            return True
        if not found.allowed_methods:
            raise NotFound("Nothing is served at this path.", reason="ROUTE_NOT_FOUND")
        if method == "OPTIONS":
            exchange.answer_headers = [(b"allow", _allow(found.allowed_methods).encode())]
            return False
        raise _not_allowed(found.allowed_methods)

    async def _answer_options(self, exchange: Exchange) -> None:
        """What a page's browser may ask for, or which methods there are."""
        if is_preflight(exchange):
            await self._answer_preflight(exchange)
        else:
            await exchange.respond(204, [])

    async def _answer_preflight(self, exchange: Exchange) -> None:
        headers = self._parts.cors.preflight_headers(exchange)
        if headers is None:
            await exchange.respond(403, [(b"vary", b"origin")])
        else:
            await exchange.respond(204, headers)

    def _shed(self, exchange: Exchange) -> None:
        """Refuse what its service could not take anyway, before it costs anything."""
        self._parts.upstream.guard(exchange.call.method).check()

    def _bound_time(self, exchange: Exchange) -> None:
        """The deadline runs from the first byte of the request."""
        route = exchange.call
        policy = route.method.policy
        name, read = _CONNECT_TIMEOUT if route.is_connect else _TIMEOUT
        timeout_s = read(
            exchange.header(name),
            default_s=policy.deadline_default_s,
            max_s=policy.deadline_max_s,
        )
        if REQUEST_TIMEOUT in exchange.headers:
            most_s = timeout_s if name.encode() in exchange.headers else policy.deadline_max_s
            timeout_s = min(asked_s(exchange.header("x-request-timeout")), most_s)
        exchange.deadline_s = exchange.started_s + timeout_s

    async def _authenticate(self, exchange: Exchange) -> None:
        """A bad credential is refused even where none is needed."""
        if self._parts.authenticator is not None:
            exchange.principal = await self._parts.authenticator.principal_of(exchange)

    def _authorize(self, exchange: Exchange) -> None:
        authorize(exchange.call.method.policy, exchange.principal)

    def _charge_now(self, exchange: Exchange) -> bool:
        """Charge the call without waiting, which is how most are; False if that cannot be."""
        block = address_block(exchange.address)
        charge = self._parts.charges.charge_now(exchange.call, exchange.principal, block)
        if charge is None:
            return False
        self._note(exchange, charge)
        return True

    async def _charge(self, exchange: Exchange) -> None:
        block = address_block(exchange.address)
        charge = await self._parts.charges.charge(exchange.call, exchange.principal, block)
        self._note(exchange, charge)

    def _note(self, exchange: Exchange, charge: Charge) -> None:
        exchange.charge = charge
        self.measures.note_decision(charge.price.bucket, charge.verdict)
        if not charge.verdict.is_allowed:
            raise charging.refuse(charge)

    async def _call(self, exchange: Exchange) -> None:
        parts, charge = self._parts, exchange.charge
        calls = parts.connect_calls if exchange.call.is_connect else parts.calls
        slot = charge.price.slot if charge is not None else None
        if charge is None or slot is None:
            await calls.make(exchange)
            return
        async with parts.slots.taken(slot, charge.account.own.key):
            await calls.make(exchange)


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
