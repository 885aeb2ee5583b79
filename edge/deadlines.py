"""How long a call may take: the contract's default, or what the client asks for, capped.

A client may ask in the words of its protocol (grpc-timeout, connect-timeout-ms), or in seconds by
X-Request-Timeout, as plain HTTP clients and proxies do; of both, the shorter counts. Nothing that
a client says goes beyond the contract's cap.
"""

import re

from edge.refusals import HttpRefusal

# gRPC over HTTP/2: TimeoutValue is at most eight digits.
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
# Connect: a positive integer of at most ten digits; 0 is taken, and is over at once.
_TIMEOUT_MS = re.compile(r"[0-9]{1,10}")
# Seconds, with a fraction if need be.
_SECONDS = re.compile(r"[0-9]{1,8}(?:\.[0-9]{1,6})?")


def asked_s(header: str) -> float:
    """The seconds that X-Request-Timeout asks for: "2", "0.5".

    Raises:
        HttpRefusal: the header is malformed.
    """
    if _SECONDS.fullmatch(header) is None:
        raise HttpRefusal('X-Request-Timeout is a number of seconds: "2.5".')
    return float(header)


def timeout_of(header: str, *, default_s: float, max_s: float) -> float:
    """Seconds that a call may take.

    Args:
        header: the value of grpc-timeout, "" if absent: "500m", "10S".
        default_s: without a header.
        max_s: the contract's cap.

    Raises:
        HttpRefusal: the header is malformed.
    """
    if not header:
        return min(default_s, max_s)
    match = _TIMEOUT.fullmatch(header)
    if match is None:
        raise HttpRefusal('grpc-timeout is digits and one of H, M, S, m, u, n: "500m".')
    return min(int(match.group(1)) * _UNIT_S[match.group(2)], max_s)


def connect_timeout_of(header: str, *, default_s: float, max_s: float) -> float:
    """See timeout_of; header is the value of connect-timeout-ms: "500"."""
    if not header:
        return min(default_s, max_s)
    if _TIMEOUT_MS.fullmatch(header) is None:
        raise HttpRefusal('connect-timeout-ms is a whole number of milliseconds: "500".')
    return min(int(header) / 1000, max_s)
