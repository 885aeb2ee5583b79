"""Which headers cross: of the request as metadata, of metadata as headers of the answer.

Nothing crosses that is not listed, by the contract for one method (`request_headers`,
`response_headers`) or by a setting for all. A listed header becomes metadata of its own name,
and back; on success only, since an error has its own headers. What the edge itself speaks to
services with, or what services believe, can not be listed: one that did would let any client
say who it is. The names are judged once, at start; a request's names are compared exactly, in
lower case, so that `x_user_id`, `X-User-Id-Bin` and whatever else looks alike is another name
and stays out. A header that comes twice crosses as one value, joined by a comma (RFC 9110
§5.3): no service ever sees two. One crosses by itself, both ways: what a client has seen of the
data (`shared/causal.py`), where the contracts have reads that take it. A raw binding lists its
own headers, under names of their own (`edge.raw`); what enters with every method enters with it
as well.
"""

import re
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edge.contracts import ContractError, MethodInfo
from edge.exchange import Exchange
from edge.http1_text import HeaderList
from edge.refusals import HeadersTooLarge
from shared import causal, log

# Services take 8 KiB of metadata (gRPC's default); the identity and the trace need their part.
ENTERING_BYTES_MAX = 4096

# Lower case without "_": CGI-like servers read x_y as x-y. gRPC allows no other sign but ".".
_NAME = re.compile(r"[a-z][a-z0-9-]{0,99}")


class _Kept(NamedTuple):
    """Names that do not cross: those listed, and all that begin with one of the prefixes."""

    why: str
    names: str
    prefixes: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        return name in self.names.split() or name.startswith(self.prefixes)


_KEPT = (
    # RFC 9110 §7.6.1, and what frames or names a message: each hop says these for itself.
    _Kept(
        "speaks of one connection, or of how one message is framed",
        "connection content-encoding content-length content-type date expect host http2-settings"
        " keep-alive server te trailer transfer-encoding upgrade user-agent via",
        ("proxy-",),
    ),
    _Kept(
        "is what the edge and services tell each other",
        f"{causal.KEY} idempotency-key idempotency-replayed traceparent tracestate x-request-id",
        ("grpc-", "http-", "tenfold-"),
    ),
    _Kept(
        "would let a client say who or where it is",
        "forwarded x-real-ip x-roles x-tenant-id x-user-id",
        ("x-forwarded-", "x-internal-"),
    ),
    _Kept("is a word of the Connect protocol", "", ("connect-", "trailer-")),
    # No service may come to rely on one: the edge does nothing against forged cross-site
    # requests but to read none.
    _Kept("is a credential that browsers send by themselves", "cookie set-cookie"),
)
_KEPT_FROM_ANSWERS = _Kept(
    "is written by the edge",
    "accept-encoding cache-control etag ratelimit ratelimit-policy referrer-policy retry-after vary"
    " www-authenticate x-accel-buffering x-content-type-options x-frame-options",
    ("access-control-",),
)

_log = log.get_logger("edge")


@dataclass(frozen=True)
class Crossing:
    """Which headers of one method cross; names in lower case.

    Attributes:
        entering: of the request.
        leaving: of the answer, as metadata spells them on the wire.
    """

    entering: tuple[str, ...] = ()
    leaving: tuple[bytes, ...] = ()


class Forwarding:
    """What crosses, by method.

    Args:
        methods: of the contracts.
        request_headers: which enter with every method, comma-separated.
        response_headers: which leave with every method, comma-separated.
        takes_credentials: whether the edge reads Authorization itself. If so it ends here:
            services get a short-lived identity, never a credential that could be used again.

    Raises:
        ContractError: a listed name may not cross; the message says which, where and why.
    """

    def __init__(
        self,
        methods: Iterable[MethodInfo] = (),
        *,
        request_headers: str = "",
        response_headers: str = "",
        takes_credentials: bool = True,
    ) -> None:
        entering = _listed(request_headers.split(","), "TENFOLD_EDGE_REQUEST_HEADERS")
        leaving = _listed(response_headers.split(","), "TENFOLD_EDGE_RESPONSE_HEADERS")
        self._takes_credentials = takes_credentials
        self._check(entering, leaving)
        methods = list(methods)
        if any(method.policy.causal_reads for method in methods):
            entering[causal.KEY] = leaving[causal.KEY] = "causal_reads"
        self._others = _crossing(entering, leaving)
        self._by_method: dict[str, Crossing] = {}
        for method in methods:
            options, where = method.options, method.full_name
            own_entering = _listed(options.request_headers, f"{where}: request_headers")
            own_leaving = _listed(options.response_headers, f"{where}: response_headers")
            if own_entering or own_leaving:
                self._check(own_entering, own_leaving)
                crossing = _crossing(own_entering | entering, own_leaving | leaving)
                self._by_method[method.full_name] = crossing

    @property
    def is_needed(self) -> bool:
        """Whether anything crosses at all."""
        return bool(self._by_method) or self._others != Crossing()

    def of(self, method: MethodInfo) -> Crossing:
        """What crosses with this method."""
        return self._by_method.get(method.full_name, self._others)

    def _check(self, entering: Mapping[str, str], leaving: Mapping[str, str]) -> None:
        for name, where in entering.items():
            _refuse(where, name, _why_not(name) or self._why_not_entering(name))
        for name, where in leaving.items():
            _refuse(where, name, _why_not(name) or _why_not_leaving(name))

    def _why_not_entering(self, name: str) -> str:
        if name == "authorization" and self._takes_credentials:
            return "is the edge's own to check; services get an identity instead"
        return ""


def metadata_of(exchange: Exchange, crossing: Crossing) -> list[tuple[str, str]]:
    """What of a request's headers enters.

    Raises:
        HttpRefusal: a listed header is not visible ASCII.
        HeadersTooLarge: together they are longer than ENTERING_BYTES_MAX.
    """
    found = [(name, exchange.header(name)) for name in crossing.entering]
    entering = [(name, value) for name, value in found if value]
    if sum(len(name) + len(value) for name, value in entering) > ENTERING_BYTES_MAX:
        names = ", ".join(name for name, _ in entering)
        raise HeadersTooLarge(f"These are longer than {ENTERING_BYTES_MAX} bytes: {names}.")
    return entering


def in_bytes(metadata: Mapping[str, str]) -> dict[bytes, bytes]:
    """Metadata as it is on the wire."""
    return {name.encode(): value.encode("latin-1", "replace") for name, value in metadata.items()}


def headers_of(crossing: Crossing, *metadata: Mapping[bytes, bytes]) -> HeaderList:
    """What of an answer's metadata leaves.

    Args:
        crossing: of the method.
        metadata: initial, then trailing; the last that has a name counts.
    """
    found = ChainMap(*map(dict, reversed(metadata)))
    headers = [(name, found[name]) for name in crossing.leaving if name in found]
    return [header for header in headers if _is_visible(*header)]


def _is_visible(name: bytes, value: bytes) -> bool:
    """Whether a value may be sent: a line end in it would begin another header."""
    is_visible = value.isascii() and value.decode("ascii").isprintable()
    if not is_visible:
        _log.warning("header not sent: it is not visible ASCII", header=name.decode())
    return is_visible


def _listed(names: Iterable[str], where: str) -> dict[str, str]:
    """The names in lower case, each with where it is listed."""
    return {name.strip().lower(): where for name in names if name.strip()}


def _crossing(entering: Iterable[str], leaving: Iterable[str]) -> Crossing:
    return Crossing(tuple(sorted(entering)), tuple(name.encode() for name in sorted(leaving)))


def _refuse(where: str, name: str, why: str) -> None:
    if why:
        raise ContractError(f"{where}: {name!r} {why}")


def _why_not(name: str) -> str:
    """Why a header may cross in neither direction; "" if it may."""
    if not _NAME.fullmatch(name):
        return "is no header name of letters, digits and hyphens"
    if name.endswith("-bin"):
        return "would be binary: gRPC decodes metadata that ends in -bin"
    return next((kept.why for kept in _KEPT if kept.has(name)), "")


def _why_not_leaving(name: str) -> str:
    return _KEPT_FROM_ANSWERS.why if _KEPT_FROM_ANSWERS.has(name) else ""
