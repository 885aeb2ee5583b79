"""The Idempotency-Key header: the client's own name for one effect.

Source: draft-ietf-httpapi-idempotency-key-header-07, section 2.1: a string of structured fields
(RFC 9651 §3.3.3), "8e03978e-40d5". Most clients send it without the quotes, so that is taken, too,
and names the same effect. What could be two keys, or only a part of one, is refused: a wrong
guess would repeat an effect, or drop one.
"""

import re

from edge.exchange import Exchange
from shared.errors import InvalidRequest
from shared.rpc.policy import Idempotency

HEADER = "Idempotency-Key"
KEY_CHARACTERS_MAX = 255

# As regular expressions of ECMAScript and of Python; in quotes, and visible ASCII but for what
# quotes a string, separates two of them, or begins a parameter.
QUOTED_KEY = r'"(?:[ !#-\[\]-~]|\\["\\])+"'
BARE_KEY = r"[!#-+\--:<-\[\]-~]+"
_QUOTED, _BARE = re.compile(QUOTED_KEY), re.compile(BARE_KEY)
_ESCAPED = re.compile(r'\\(["\\])')


def key_of(exchange: Exchange) -> str:
    """The key of a request; "" if it has none.

    Raises:
        InvalidRequest: the header is no key: it names the header.
    """
    if b"idempotency-key" not in exchange.headers:
        return ""
    text = exchange.header("idempotency-key")
    if _QUOTED.fullmatch(text):
        key = _ESCAPED.sub(r"\1", text[1:-1])
    elif not text or _BARE.fullmatch(text):
        key = text
    else:
        what = 'must be one key, as in "8e03978e-40d5": with a space, comma or ";" only in quotes'
        raise InvalidRequest.of_field(HEADER, what)
    if len(key) > KEY_CHARACTERS_MAX:
        raise InvalidRequest.of_field(HEADER, f"must be at most {KEY_CHARACTERS_MAX} characters")
    return key


def require_key(exchange: Exchange) -> None:
    """Refuse a request without a key, if its contract needs one.

    Raises:
        InvalidRequest: naming the header.
    """
    if exchange.call.method.policy.idempotency is Idempotency.KEYED:
        raise InvalidRequest.of_field(
            HEADER, "this header is needed: a key of your own for each new effect"
        )
