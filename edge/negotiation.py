"""What a client takes: media types by Accept, codings by Accept-Encoding (RFC 9110 §12.5)."""

import re
from dataclasses import dataclass
from functools import lru_cache

from edge.refusals import NotAcceptable, UnsupportedMediaType

# Real clients send a handful of different values; made-up ones only push each other out.
_CODINGS_KEPT_MAX = 256
_CHARSET = re.compile(r'\s*charset\s*=\s*"?utf-?8"?\s*', re.IGNORECASE)


def choose_media_type(accept: str, offers: list[str]) -> str:
    """The offer that an Accept header likes best; the first of equals (RFC 9110 §12.5.1).

    Raises:
        NotAcceptable: it likes none of them.
    """
    if not accept or accept == "*/*" or accept == offers[0]:
        return offers[0]
    ranges = [_weighted(part) for part in accept.split(",")]
    best = max(offers, key=lambda offer: _quality(offer, ranges))
    if _quality(best, ranges) <= 0:
        raise NotAcceptable(f"This route answers with {' or '.join(offers)}.")
    return best


def require_media_type(content_type: str, taken: tuple[str, ...]) -> None:
    """Refuse a body that is of none of these types, or in another charset than UTF-8.

    Raises:
        UnsupportedMediaType: it is.
    """
    media_type, _, parameters = content_type.partition(";")
    if media_type.strip().lower() not in taken:
        raise UnsupportedMediaType(
            f"Send the body as {' or '.join(taken)}.", headers={"accept": ", ".join(taken)}
        )
    if parameters and not _CHARSET.fullmatch(parameters):
        raise UnsupportedMediaType("The only charset taken is utf-8.")


@dataclass(frozen=True)
class Codings:
    """Which codings of an answer a client takes.

    Attributes:
        likes_gzip: it takes gzip, and not less gladly than an answer as it is.
        takes_identity: it takes an answer as it is; false only if it says so.
    """

    likes_gzip: bool
    takes_identity: bool


NO_CODINGS = Codings(likes_gzip=False, takes_identity=True)


@lru_cache(maxsize=_CODINGS_KEPT_MAX)
def codings_of(accept_encoding: bytes) -> Codings:
    """What an Accept-Encoding header takes (RFC 9110 §12.5.3).

    Raises:
        NotAcceptable: neither gzip nor the answer as it is.
    """
    weights = dict(_weighted(part) for part in accept_encoding.decode("latin-1").split(","))
    rest = weights.get("*", 0.0)
    gzip = weights.get("gzip", weights.get("x-gzip", rest))
    identity = weights.get("identity")
    takes_identity = identity > 0 if identity is not None else "*" not in weights or rest > 0
    if gzip <= 0 and not takes_identity:
        raise NotAcceptable("Answers are sent as they are, or with the coding gzip.")
    return Codings(gzip > 0 and gzip >= (identity or 0.0), takes_identity)


def _weighted(text: str) -> tuple[str, float]:
    """A name of a list, and its weight: "gzip;q=0.5" is ("gzip", 0.5)."""
    name, _, parameters = text.strip().lower().partition(";")
    for parameter in parameters.split(";"):
        key, _, value = parameter.strip().partition("=")
        if key == "q":
            return name.strip(), _weight(value)
    return name.strip(), 1.0


def _weight(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0


def _quality(offer: str, ranges: list[tuple[str, float]]) -> float:
    """The weight of the most specific range that covers the offer; 0 if none does."""
    kind = offer.partition("/")[0]
    for name in (offer, f"{kind}/*", "*/*"):
        weights = [weight for media, weight in ranges if media == name]
        if weights:
            return max(weights)
    return 0.0
