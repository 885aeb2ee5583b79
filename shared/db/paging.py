"""Opaque page tokens: a position that only its own list, caller and filter can use.

A token carries the position in clear and a MAC over it and its scope: the method, filter,
order, tenant and owner. It gives no authority; changing anything makes it invalid.
"""

import base64
import binascii
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import orjson

from shared.errors import InvalidRequest
from shared.identity import Principal, PrincipalKind

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000
# HMAC-SHA-256 cut to 128 bits (RFC 2104 §5 allows half).
_MAC_BYTES = 16
_INVALID = "is not a token of this list; start again without one"

Position = str | int


@dataclass(frozen=True)
class PageScope:
    """What a token is good for.

    Attributes:
        method: the full RPC method name.
        tenant: whose rows.
        owner: which caller's; "" for an operator's list.
        filters: parent, filter and order, as the request states them.
    """

    method: str
    tenant: str
    owner: str
    filters: tuple[str, ...] = ()

    @classmethod
    def of(cls, method: str, principal: Principal, *filters: str) -> "PageScope":
        """The scope of a list that this principal asks for."""
        owner = "" if principal.kind is PrincipalKind.ADMIN else principal.subject
        return cls(method, principal.tenant, owner, filters)

    def to_bytes(self) -> bytes:
        """One unambiguous text: JSON keeps the parts apart."""
        return orjson.dumps([self.method, self.tenant, self.owner, self.filters])


def page_size_of(asked: int) -> int:
    """The page size to use: 0 means the default, too many means the most.

    Raises:
        InvalidRequest: asked is negative.
    """
    if asked < 0:
        raise InvalidRequest.of_field("page_size", "must be 0 or more")
    return min(asked or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)


def seal_page_token(secret: bytes, scope: PageScope, *position: Position | UUID) -> str:
    """A token that leads to what comes after this position.

    Args:
        secret: the same on every replica.
        scope: what must be the same when it comes back.
        position: the sort key of the last row of the page.
    """
    parts = [str(part) if isinstance(part, UUID) else part for part in position]
    body = orjson.dumps(parts)
    return base64.urlsafe_b64encode(_mac(secret, scope, body) + body).rstrip(b"=").decode()


def open_page_token(secret: bytes, scope: PageScope, token: str) -> Sequence[Position]:
    """The position in a token; empty for an empty token.

    Raises:
        InvalidRequest: the token is forged, or of another list, filter or caller.
    """
    if not token:
        return ()
    try:
        content = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest.of_field("page_token", _INVALID) from error
    mac, body = content[:_MAC_BYTES], content[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(secret, scope, body)):
        raise InvalidRequest.of_field("page_token", _INVALID)
    position: list[Position] = orjson.loads(body)
    return position


def _mac(secret: bytes, scope: PageScope, body: bytes) -> bytes:
    key = hmac.digest(secret, b"tenfold page token", "sha256")
    return hmac.digest(key, scope.to_bytes() + b"\0" + body, "sha256")[:_MAC_BYTES]
