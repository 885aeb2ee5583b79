"""How long RPCs take, by method and code: the names that OpenTelemetry gives them."""

import time

from shared.telemetry.metrics import Family, Histogram, Metrics

_LABELS = ("rpc_service", "rpc_method", "rpc_grpc_status_code")


class CallDurations:
    """Observes calls; each method's and code's child is looked up by name but once."""

    def __init__(self, family: Family[Histogram]) -> None:
        self._family = family
        self._children: dict[tuple[str, str], Histogram] = {}

    def note(self, path: str, code: str, started_s: float) -> None:
        """Observe a call that has ended.

        Args:
            path: "/package.Service/Method", of a contract.
            code: gRPC's name: "OK".
            started_s: time.monotonic() when it began.
        """
        child = self._children.get((path, code))
        if child is None:
            service, _, method = path[1:].rpartition("/")
            child = self._children[path, code] = self._family.of(service, method, code)
        child.observe(time.monotonic() - started_s)


def server_durations(metrics: Metrics) -> CallDurations | None:
    """Of the calls that a server has answered; None where nobody reads them."""
    return _durations(metrics, "rpc_server_duration_seconds", "How long calls took to answer.")


def client_durations(metrics: Metrics) -> CallDurations | None:
    """Of unary calls to others, retries and waiting included; None where nobody reads them."""
    text = "How long unary calls to others took, with their retries."
    return _durations(metrics, "rpc_client_duration_seconds", text)


def _durations(metrics: Metrics, name: str, text: str) -> CallDurations | None:
    return CallDurations(metrics.histogram(name, text, *_LABELS)) if metrics.is_served else None
