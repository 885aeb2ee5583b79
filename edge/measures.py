"""What the edge counts; shared/telemetry/README.md lists the names.

No label holds what a caller may choose: a path that matches no route has none of its own, and a
method that HTTP does not define is "_OTHER".
"""

import time
from collections.abc import Callable

from edge.exchange import Exchange
from edge.quota_store import Verdict
from edge.routes import Route
from shared.telemetry.metrics import Histogram, Metrics

# The label http_route of what no contract's route answers.
OWN, UNMATCHED = "own", "unmatched"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})


class Measures:
    """The numbers of one edge.

    Args:
        metrics: where they are read.
        is_own: whether the edge itself answers a path: health, documents.
    """

    def __init__(self, metrics: Metrics, is_own: Callable[[bytes], bool]) -> None:
        self._is_own = is_own
        self._times_requests = metrics.is_served
        self._durations = metrics.histogram(
            "http_server_request_duration_seconds",
            "How long requests took, from their headers to the end of the answer.",
            "http_route",
            "http_request_method",
            "http_response_status_code",
        )
        # Bound to the route itself: no text is hashed on the way of a request.
        self._known: dict[tuple[Route, str, int], Histogram] = {}
        self._refusals = metrics.counter(
            "tenfold_http_refusals_total",
            "Requests that were answered with an error, by the reason in their answer.",
            "reason",
            "http_response_status_code",
        )
        self._decisions = metrics.counter(
            "tenfold_quota_decisions_total",
            "Quota decisions; path: leased and known took no question, asked took one, local was "
            "by this edge alone.",
            "quota",
            "decision",
            "path",
        )

    def note_end(self, exchange: Exchange) -> None:
        """Time a request that has ended."""
        if not self._times_requests:
            return
        route, child = exchange.route, None
        if route is not None:
            child = self._known.get((route, exchange.method, exchange.status))
        if child is None:
            child = self._bound(exchange)
        child.observe(time.monotonic() - exchange.started_s)

    def note_refusal(self, reason: str, status: int) -> None:
        """Count an error that a caller was told."""
        self._refusals.of(reason, str(status)).value += 1

    def note_decision(self, quota: str, verdict: Verdict) -> None:
        """Count what a quota said."""
        decision = "allowed" if verdict.is_allowed else "refused"
        self._decisions.of(quota, decision, verdict.path).value += 1

    def _bound(self, exchange: Exchange) -> Histogram:
        route, method, status = exchange.route, exchange.method, exchange.status
        if route is not None:
            name = route.template.text
        else:
            name = OWN if self._is_own(exchange.raw_path) else UNMATCHED
        named = method if method in _METHODS else "_OTHER"
        child = self._durations.of(name, named, str(status))
        if route is not None:
            self._known[route, method, status] = child
        return child
