"""Which web pages may call: an allow-list of origins, empty by default.

No credentials mode: the edge reads bearer credentials only, which a page must add itself,
so there is no cookie that another site could make a browser send.
"""

from collections.abc import Iterable

from edge.exchange import Exchange
from edge.forwarding import Forwarding
from edge.http1_text import HeaderList
from edge.routes import Match, NoMatch, Route, RouteTable

PREFLIGHT_MAX_AGE_S = 600
ALLOWED_HEADERS = (
    "authorization",
    "content-type",
    "grpc-timeout",
    "idempotency-key",
    "x-request-timeout",
    "if-match",
    "if-none-match",
    "last-event-id",
    "traceparent",
    "tracestate",
    "x-request-id",
)
# Beside those, what a Connect client sends.
CONNECT_HEADERS = (
    "connect-accept-encoding",
    "connect-content-encoding",
    "connect-protocol-version",
    "connect-timeout-ms",
    "content-encoding",
)
EXPOSED_HEADERS = (
    "etag",
    "idempotency-replayed",
    "location",
    "ratelimit",
    "ratelimit-policy",
    "retry-after",
    "x-request-id",
)


class Cors:
    """Answers preflights from the route table.

    Args:
        origins: exact origins, "https://app.example.com"; nothing else is ever allowed.
        routes: what exists.
        forwarding: which headers beside those of every method a page may send and read.
    """

    def __init__(self, origins: frozenset[str], routes: RouteTable, forwarding: Forwarding) -> None:
        self._origins = origins
        self._routes = routes
        self._forwarding = forwarding

    def answer_headers(self, exchange: Exchange) -> HeaderList:
        """What an ordinary answer to this origin carries."""
        if not self._origins:
            return []
        origin = self._allowed_origin(exchange)
        vary = (b"vary", b"origin")
        if origin is None:
            return [vary]
        exposed = [*EXPOSED_HEADERS, *self._leaving(exchange.route)]
        return [
            vary,
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", ", ".join(exposed).encode()),
        ]

    def preflight_headers(self, exchange: Exchange) -> HeaderList | None:
        """What a preflight is answered with; None if its origin or its path is not allowed."""
        method = exchange.header("access-control-request-method").upper()
        origin = self._allowed_origin(exchange)
        found = self._routes.match(method, exchange.raw_path)
        if origin is None or isinstance(found, NoMatch):
            return None
        assert isinstance(found, Match)
        allowed = [*ALLOWED_HEADERS, *self._entering(found.route)]
        if found.route.is_connect:
            allowed += CONNECT_HEADERS
        return [
            (b"vary", b"origin"),
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-methods", method.encode()),
            (b"access-control-allow-headers", ", ".join(allowed).encode()),
            (b"access-control-max-age", b"%d" % PREFLIGHT_MAX_AGE_S),
        ]

    def _entering(self, route: Route) -> Iterable[str]:
        raw = route.raw.request_headers if route.raw is not None else ()
        return *raw, *self._forwarding.of(route.method).entering

    def _leaving(self, route: Route | None) -> Iterable[str]:
        if route is None:
            return ()
        raw = route.raw.response_headers if route.raw is not None else ()
        leaving = [name.decode() for name in self._forwarding.of(route.method).leaving]
        trailers = (f"trailer-{name}" for name in leaving) if route.is_connect else ()
        return *raw, *leaving, *trailers

    def _allowed_origin(self, exchange: Exchange) -> bytes | None:
        origin = exchange.headers.get(b"origin", b"")
        return origin if origin.decode("latin-1") in self._origins else None


def is_preflight(exchange: Exchange) -> bool:
    """Whether a browser asks if it may ask (Fetch §4.8)."""
    headers = exchange.headers
    return (
        exchange.method == "OPTIONS"
        and b"origin" in headers
        and b"access-control-request-method" in headers
    )
