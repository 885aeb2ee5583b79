"""Credential -> Principal: who asks, for which tenant.

Both kinds of credential come as `Authorization: Bearer`, never in the query: access tokens,
verified here with auth's published keys, and API keys ("tf_..."), resolved by auth and kept
for KEY_CACHE_S. Neither is believed once auth's feed says that it was revoked. An edge that
has not heard from the feed for `revocations_stale_s` believes no credential at all: that is
the longest time for which a log-out elsewhere may go unnoticed here.
"""

import asyncio
import hashlib
import hmac
import re
import string
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from edge.exchange import Exchange
from edge.refusals import HttpRefusal
from shared import log
from shared.clock import Clock
from shared.errors import PermissionDenied, TenfoldError, Unauthenticated, Unavailable
from shared.identity import (
    PUBLIC,
    AccessTokenVerifier,
    CredentialRevoked,
    Principal,
    PrincipalKind,
    RevocationList,
    UnknownSigningKey,
)
from shared.rpc.policy import Access, MethodPolicy

API_KEY_PREFIX = "tf_"
KEY_CHECKSUM_CHARACTERS = 6
# A revoked key is refused by the feed at once; this bounds a changed role or scope.
KEY_CACHE_S = 30.0
# Short, because a key may be used by another edge's client right after it was made here.
REFUSED_KEY_CACHE_S = 2.0
KEYS_CACHED_MAX = 10_000
# An attacker's unknown "kid" must not make us ask auth again and again.
JWKS_REFRESH_MIN_S = 60.0
JWKS_REFRESH_S = 300.0
JWKS_RETRY_S = 0.2

# RFC 6750 §2.1.
_BEARER = re.compile(r"Bearer ([A-Za-z0-9\-._~+/]+=*)", re.IGNORECASE)
_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_KEY_LOCKS = 64

_log = log.get_logger("edge.auth")


@dataclass(frozen=True)
class ResolvedKey:
    """Whose API key it is, and until when.

    Attributes:
        principal: as whom the key acts.
        expires_at_s: seconds since 1970.
    """

    principal: Principal
    expires_at_s: float


class AuthClient(Protocol):
    """What the edge asks of auth."""

    async def jwks(self) -> list[dict[str, Any]]:
        """The public keys that verify access tokens, as RFC 7517 JSON members.

        Raises:
            TenfoldError: auth does not answer.
        """
        ...

    async def resolve_api_key(self, secret: str) -> ResolvedKey:
        """Whose key this is.

        Raises:
            Unauthenticated: nobody's.
            TenfoldError: auth does not answer.
        """
        ...


class Authenticator:
    """Turns a request's credential into a principal.

    Args:
        tokens: verifies access tokens and knows what is revoked.
        signing_keys: fetches what `tokens` does not know yet.
        api_keys: resolves API keys.
        revocations: what the feed has told.
        revocations_stale_s: how long the feed may be silent.
    """

    def __init__(
        self,
        *,
        tokens: AccessTokenVerifier,
        signing_keys: "SigningKeys",
        api_keys: "ApiKeys",
        revocations: RevocationList,
        revocations_stale_s: float,
    ) -> None:
        self._tokens = tokens
        self._signing_keys = signing_keys
        self._api_keys = api_keys
        self._revocations = revocations
        self._stale_s = revocations_stale_s

    def require_valid(self, principal: Principal) -> None:
        """Refuse a principal whose credential was revoked since it was believed.

        Raises:
            CredentialRevoked: it was.
        """
        if principal.credential and self._revocations.is_revoked(principal.credential):
            raise CredentialRevoked("the credential has been revoked")

    async def principal_of(self, exchange: Exchange) -> Principal:
        """Who asks; PUBLIC without a credential.

        Raises:
            HttpRefusal: more than one credential, or a malformed one.
            Unauthenticated: the credential is not valid.
            Unavailable: it cannot be checked at the moment.
        """
        credential = bearer_of(exchange)
        if not credential:
            return PUBLIC
        self._refuse_if_feed_is_lost()
        if credential.startswith(API_KEY_PREFIX):
            return await self._api_keys.principal_of(credential)
        try:
            return self._tokens.verify(credential)
        except UnknownSigningKey:
            await self._signing_keys.refresh_if_due()
            return self._tokens.verify(credential)

    @property
    def is_ready(self) -> bool:
        """Whether credentials can be checked."""
        age_s = self._revocations.age_s()
        return age_s is not None and age_s <= self._stale_s and self._signing_keys.is_loaded

    def _refuse_if_feed_is_lost(self) -> None:
        age_s = self._revocations.age_s()
        if age_s is None or age_s > self._stale_s:
            message = "Credentials cannot be checked at the moment."
            raise Unavailable(message, retry_after_s=1, reason="CREDENTIALS_UNCHECKED")


class SigningKeys:
    """Auth's public keys; those once fetched serve while auth is away.

    Args:
        client: where they come from.
        tokens: where they go.
        clock: measures the least time between two fetches.
    """

    def __init__(self, client: AuthClient, tokens: AccessTokenVerifier, clock: Clock) -> None:
        self._client = client
        self._tokens = tokens
        self._clock = clock
        self._lock = asyncio.Lock()
        self._fetched_at_s: float | None = None
        self.is_loaded = False

    async def run(self) -> None:
        """Keep the keys fresh until cancelled."""
        while True:
            try:
                await self._fetch()
            except TenfoldError as error:
                _log.info("signing keys not fetched", reason=error.error_reason)
            await asyncio.sleep(JWKS_REFRESH_S if self.is_loaded else JWKS_RETRY_S)

    async def refresh_if_due(self) -> None:
        """Fetch, unless that was done within JWKS_REFRESH_MIN_S.

        Raises:
            Unavailable: no keys have ever been fetched, and auth does not answer.
        """
        async with self._lock:
            now_s = self._clock.monotonic_s()
            if self._fetched_at_s is not None and now_s < self._fetched_at_s + JWKS_REFRESH_MIN_S:
                return
            try:
                await self._fetch()
            except TenfoldError as error:
                if not self.is_loaded:
                    message = "Access tokens cannot be checked at the moment."
                    raise Unavailable(message, retry_after_s=1) from error
                self._fetched_at_s = now_s

    async def _fetch(self) -> None:
        self._tokens.replace_keys(await self._client.jwks())
        self._fetched_at_s = self._clock.monotonic_s()
        self.is_loaded = True


@dataclass(frozen=True)
class _Known:
    """What auth said of a key; principal None if it is nobody's."""

    principal: Principal | None
    believed_until_s: float


class ApiKeys:
    """API keys, resolved by auth and remembered for a short while by their hash.

    Args:
        resolve: see AuthClient.resolve_api_key.
        has_valid_checksum: tells a mistyped or made-up key without asking anybody.
        revocations: what the feed has told.
        clock: where time comes from.
    """

    def __init__(
        self,
        resolve: Callable[[str], Awaitable[ResolvedKey]],
        *,
        has_valid_checksum: Callable[[str], bool],
        revocations: RevocationList,
        clock: Clock,
    ) -> None:
        self._resolve = resolve
        self._has_valid_checksum = has_valid_checksum
        self._revocations = revocations
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        # One question to auth per key at a time; a few keys share a lock.
        self._locks = [asyncio.Lock() for _ in range(_KEY_LOCKS)]

    async def principal_of(self, secret: str) -> Principal:
        """As whom the key acts.

        Raises:
            Unauthenticated: nobody's key, or one that was revoked.
            TenfoldError: auth does not answer.
        """
        if not self._has_valid_checksum(secret):
            raise _refused()
        digest = hashlib.sha256(secret.encode()).digest()
        known = self._fresh(digest)
        if known is None:
            async with self._locks[digest[0] % _KEY_LOCKS]:
                known = self._fresh(digest) or await self._ask(secret, digest)
        if known.principal is None:
            raise _refused()
        if self._revocations.is_revoked(known.principal.credential):
            raise CredentialRevoked("The API key has ended.")
        return known.principal

    def _fresh(self, digest: bytes) -> _Known | None:
        known = self._known.get(digest)
        if known is None or self._clock.now().timestamp() >= known.believed_until_s:
            return None
        return known

    async def _ask(self, secret: str, digest: bytes) -> _Known:
        now_s = self._clock.now().timestamp()
        try:
            resolved = await self._resolve(secret)
        except Unauthenticated:
            known = _Known(None, now_s + REFUSED_KEY_CACHE_S)
        else:
            believed_until_s = min(now_s + KEY_CACHE_S, resolved.expires_at_s)
            known = _Known(resolved.principal, believed_until_s)
        self._known[digest] = known
        self._known.move_to_end(digest)
        if len(self._known) > KEYS_CACHED_MAX:
            self._known.popitem(last=False)
        return known


def has_valid_checksum(secret: str) -> bool:
    """Whether an API key is whole: its last six characters are the CRC-32 of the rest.

    The format is GitHub's, base 62 with digits first: junk is refused without asking auth.
    """
    body, checksum = secret[:-KEY_CHECKSUM_CHARACTERS], secret[-KEY_CHECKSUM_CHARACTERS:]
    value, expected = zlib.crc32(body.encode()), ""
    for _ in range(KEY_CHECKSUM_CHARACTERS):
        value, digit = divmod(value, len(_BASE62))
        expected = _BASE62[digit] + expected
    return hmac.compare_digest(checksum.encode(), expected.encode())


def bearer_of(exchange: Exchange) -> str:
    """The one credential of a request; "" if it brings none.

    Raises:
        HttpRefusal: it brings several, or something else than a bearer credential.
    """
    values = [value for name, value in exchange.request.headers if name == b"authorization"]
    if not values:
        return ""
    match = _BEARER.fullmatch(values[0].decode("latin-1"))
    if len(values) > 1 or match is None:
        raise HttpRefusal('Send one credential as "Authorization: Bearer <token>".')
    return match.group(1)


def authorize(policy: MethodPolicy, principal: Principal) -> None:
    """Refuse what the contract does not allow this caller; the service checks again.

    Raises:
        Unauthenticated: the method needs a credential and there is none.
        PermissionDenied: the caller is known and may not do this.
    """
    if policy.access is Access.PUBLIC:
        return
    if principal.kind is PrincipalKind.PUBLIC:
        raise Unauthenticated("This method needs a credential.", reason="CREDENTIAL_MISSING")
    if principal.kind not in _ALLOWED_KINDS.get(policy.access, ()):
        raise PermissionDenied("This method is not for this kind of caller.")
    missing = sorted(policy.scopes - principal.scopes)
    if missing:
        message = f"The credential lacks the scope {missing[0]}."
        raise PermissionDenied(message, metadata={"scope": missing[0]}, reason="SCOPE_MISSING")


_ALLOWED_KINDS = {
    # An operator may do what a user may, within its scopes.
    Access.USER: (PrincipalKind.USER, PrincipalKind.ADMIN),
    Access.ADMIN: (PrincipalKind.ADMIN,),
}


def _refused() -> Unauthenticated:
    return Unauthenticated("The API key is not valid.", reason="CREDENTIALS_REJECTED")
