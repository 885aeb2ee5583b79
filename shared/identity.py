"""Principal: who asks, for which tenant; the signed token between hops.

The edge turns any credential into a short-lived token signed with its own key;
a service that calls another signs one of its own or passes on the caller's.
Every service verifies the token itself: nothing is trusted because of where it
came from.

Two tokens live here, both compact JWS (RFC 7515) with one algorithm bound to each key:

- the identity token between hops: EdDSA, `kid` is the issuer's name, 60 s of life;
- the access token that auth gives to users (RFC 9068): RS256, `kid` is the key's
  RFC 7638 thumbprint. The edge verifies it with AccessTokenVerifier.
"""

import base64
import binascii
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from shared.clock import Clock, SystemClock
from shared.errors import Unauthenticated, Unavailable

DEFAULT_TENANT = "default"

# Between hops.
IDENTITY_METADATA_KEY = "tenfold-identity"
EDGE_ISSUER = "edge"
IDENTITY_TYPE = "tenfold-identity+jwt"
IDENTITY_AUDIENCE = "tenfold-mesh"
IDENTITY_LIFE_S = 60

# What auth signs and the edge verifies (RFC 9068).
ACCESS_TOKEN_ISSUER = "tenfold-auth"  # noqa: S105  a name, not a secret
ACCESS_TOKEN_AUDIENCE = "tenfold"  # noqa: S105
ACCESS_TOKEN_TYPE = "at+jwt"  # noqa: S105
ACCESS_TOKEN_LIFE_S = 600

# Clocks of two machines may differ by this much (spec F39: leeway of 30 to 60 s).
LEEWAY_S = 30
# A token beyond this is refused before any work (S45).
TOKEN_CHARACTERS_MAX = 8192
# Verified tokens kept; with a minute or ten of life each, a full cache turns over by itself.
CACHED_TOKENS_MAX = 20_000
# Revocations kept. Each lives as long as an access token, so this is 300 log-outs a second.
REVOCATIONS_MAX = 200_000
RSA_BITS_MIN = 2048


class PrincipalKind(StrEnum):
    """What sort of caller this is."""

    PUBLIC = "public"
    USER = "user"
    SERVICE = "service"
    ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """Who asks.

    Attributes:
        kind: decides, with scopes, which methods may be called.
        subject: the user's id, the service account's id, or a service's name as text;
            "" for PUBLIC.
        tenant: whose data may be seen.
        scopes: what the credential allows, already cut to what the subject holds.
        credential: id of the session or API key, for revocation; "" for none.
    """

    kind: PrincipalKind
    subject: str
    tenant: str = DEFAULT_TENANT
    scopes: frozenset[str] = frozenset()
    credential: str = ""

    @property
    def owner(self) -> UUID:
        """The id that owns what this principal makes; only users and service accounts have one."""
        return UUID(self.subject)

    @property
    def scope(self) -> tuple[str, UUID]:
        """(tenant, owner): the filter of every statement about own resources."""
        return self.tenant, self.owner

    def may(self, scope: str) -> bool:
        """Whether the credential carries this scope."""
        return scope in self.scopes


PUBLIC = Principal(PrincipalKind.PUBLIC, "")


class TokenRefused(Unauthenticated):
    """The token is not one that we signed for this use, or its time is over."""

    reason = "TOKEN_REFUSED"


class UnknownSigningKey(TokenRefused):
    """The token names a key that is not in the set: perhaps a newer set has it."""

    reason = "TOKEN_REFUSED"


class CredentialRevoked(Unauthenticated):
    """The session or key behind the token has ended."""

    reason = "CREDENTIAL_REVOKED"


class RevocationList:
    """The credentials that are refused although their tokens have not expired.

    Memory is bounded: an entry goes when every token of its credential has expired. Should
    REVOCATIONS_MAX live entries ever be exceeded, entries are given up and, so that no access
    widens, every credential is refused as Unavailable until those would have been forgotten.
    """

    def __init__(self, *, clock: Clock | None = None, entries_max: int = REVOCATIONS_MAX) -> None:
        self._clock = clock or SystemClock()
        self._entries_max = entries_max
        self._forget_at_s: dict[str, float] = {}
        self._order: list[tuple[float, str]] = []
        self._refuse_all_until_s = 0.0
        self._current_at_s: float | None = None

    def __len__(self) -> int:
        """How many credentials are remembered."""
        return len(self._forget_at_s)

    def revoke(self, credential: str, forget_at_s: float) -> None:
        """Refuse this credential from now on.

        Args:
            credential: the session's or API key's id.
            forget_at_s: seconds since 1970; every token of it has expired by then.
        """
        known = self._forget_at_s.get(credential)
        if known is not None and known >= forget_at_s:
            return
        self._forget_at_s[credential] = forget_at_s
        heapq.heappush(self._order, (forget_at_s, credential))
        self._prune()

    def is_revoked(self, credential: str) -> bool:
        """Whether tokens of this credential are refused.

        Raises:
            Unavailable: too much was revoked to remember it all.
        """
        if self._refuse_all_until_s and self._now_s() < self._refuse_all_until_s:
            raise Unavailable("revocations cannot be checked at the moment", retry_after_s=5)
        return credential in self._forget_at_s

    def mark_current(self) -> None:
        """The feed is connected, and has told everything it knew."""
        self._current_at_s = self._now_s()

    def age_s(self) -> float | None:
        """Seconds since the feed was last known to be complete; None before the first time."""
        return None if self._current_at_s is None else self._now_s() - self._current_at_s

    def _now_s(self) -> float:
        return self._clock.now().timestamp()

    def _prune(self) -> None:
        now_s = self._now_s() - LEEWAY_S  # tokens live that much longer than they say
        while self._order and self._order[0][0] < now_s:
            self._forget_first()
        while len(self._forget_at_s) > self._entries_max:
            dropped_s = self._forget_first() + LEEWAY_S
            self._refuse_all_until_s = max(self._refuse_all_until_s, dropped_s)

    def _forget_first(self) -> float:
        forget_at_s, credential = heapq.heappop(self._order)
        # An entry that was prolonged is in the heap twice; its later one decides.
        if self._forget_at_s.get(credential) == forget_at_s:
            del self._forget_at_s[credential]
        return forget_at_s


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _encode_json(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    return _encode(text.encode())


def _decode(part: str) -> bytes:
    data = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    if _encode(data) != part:  # one spelling per value: no padding, no stray bits
        raise ValueError("not canonical base64url")
    return data


def _split(token: str) -> tuple[str, str, str]:
    if len(token) > TOKEN_CHARACTERS_MAX:
        raise TokenRefused("the token is too long")
    parts = token.split(".")
    if len(parts) != 3 or not token.isascii():
        raise TokenRefused("the token is malformed")
    return parts[0], parts[1], parts[2]


def _object_of(part: str) -> dict[str, Any]:
    try:
        value = json.loads(_decode(part))
    except (ValueError, binascii.Error, RecursionError) as error:
        raise TokenRefused("the token is malformed") from error
    if not isinstance(value, dict):
        raise TokenRefused("the token is malformed")
    return value


def _signature_of(part: str) -> bytes:
    try:
        return _decode(part)
    except (ValueError, binascii.Error) as error:
        raise TokenRefused("the token is malformed") from error


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str):
        raise TokenRefused(f"the token lacks the claim {name}")
    return value


def _moment_s(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TokenRefused(f"the token lacks the claim {name}")
    return float(value)


def _expiry_s(claims: Mapping[str, Any], *, now_s: float, life_s_max: float) -> float:
    """The moment after which the token is refused, the leeway included."""
    issued_s, expires_s = _moment_s(claims, "iat"), _moment_s(claims, "exp")
    if issued_s > now_s + LEEWAY_S:
        raise TokenRefused("the token is from the future")
    if "nbf" in claims and _moment_s(claims, "nbf") > now_s + LEEWAY_S:
        raise TokenRefused("the token is not valid yet")
    if expires_s - issued_s > life_s_max:
        raise TokenRefused("the token lives too long")
    if now_s >= expires_s + LEEWAY_S:
        raise TokenRefused("the token has expired")
    return expires_s + LEEWAY_S


@dataclass(frozen=True)
class _Verified:
    principal: Principal
    refused_from_s: float


class _VerifiedTokens:
    """Tokens whose signature has been checked; each use still checks time and revocation."""

    def __init__(self, clock: Clock, revocations: RevocationList | None) -> None:
        self._clock = clock
        self._revocations = revocations
        self._entries: dict[str, _Verified] = {}

    def get(self, token: str) -> Principal | None:
        entry = self._entries.get(token)
        return None if entry is None else self._admitted(token, entry)

    def add(self, token: str, entry: _Verified) -> Principal:
        if len(self._entries) >= CACHED_TOKENS_MAX:
            del self._entries[next(iter(self._entries))]
        self._entries[token] = entry
        return self._admitted(token, entry)

    def clear(self) -> None:
        self._entries.clear()

    def _admitted(self, token: str, entry: _Verified) -> Principal:
        if self._clock.now().timestamp() >= entry.refused_from_s:
            self._entries.pop(token, None)
            raise TokenRefused("the token has expired")
        credential, revocations = entry.principal.credential, self._revocations
        if credential and revocations is not None and revocations.is_revoked(credential):
            raise CredentialRevoked("the session or key behind this token has ended")
        return entry.principal


def _identity_header(issuer: str) -> str:
    return _encode_json({"alg": "EdDSA", "kid": issuer, "typ": IDENTITY_TYPE})


class IdentitySigner:
    """Signs what this process says about who asks.

    Args:
        issuer: the name under which the verifiers know the key: "edge", "services".
        private_key_pem: an unencrypted PKCS #8 Ed25519 key.
        clock: where time comes from.
    """

    def __init__(self, issuer: str, private_key_pem: bytes, *, clock: Clock | None = None) -> None:
        key = load_pem_private_key(private_key_pem, password=None)
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise ValueError(f"the identity key of {issuer} is not an Ed25519 key")
        self.issuer = issuer
        self._key = key
        self._clock = clock or SystemClock()
        self._header = _identity_header(issuer)
        self._tokens: dict[Principal, tuple[str, float]] = {}

    @property
    def own(self) -> Principal:
        """This process as a caller."""
        return Principal(PrincipalKind.SERVICE, self.issuer)

    def token_for(self, principal: Principal) -> str:
        """A token for this principal with at least half of its life left."""
        now_s = self._clock.now().timestamp()
        known = self._tokens.get(principal)
        if known is not None and now_s < known[1]:
            return known[0]
        token = self._sign(principal, int(now_s))
        if len(self._tokens) >= CACHED_TOKENS_MAX:
            del self._tokens[next(iter(self._tokens))]
        self._tokens[principal] = (token, now_s + IDENTITY_LIFE_S / 2)
        return token

    def _sign(self, principal: Principal, now_s: int) -> str:
        claims = {
            "iss": self.issuer,
            "aud": IDENTITY_AUDIENCE,
            "sub": principal.subject,
            "kind": principal.kind.value,
            "tenant": principal.tenant,
            "scope": " ".join(sorted(principal.scopes)),
            "cred": principal.credential,
            "iat": now_s,
            "exp": now_s + IDENTITY_LIFE_S,
        }
        signed = f"{self._header}.{_encode_json(claims)}"
        return f"{signed}.{_encode(self._key.sign(signed.encode()))}"


class IdentityVerifier:
    """Believes tokens of the trusted issuers, each within what it may assert.

    The issuer "edge" speaks for the public, users, admins and itself; any other issuer only
    for itself, as a service.

    Args:
        trust: the Ed25519 public key (PEM) of each issuer.
        revocations: checked at every use; None where nothing can be revoked.
        clock: where time comes from.
    """

    def __init__(
        self,
        trust: Mapping[str, bytes],
        *,
        revocations: RevocationList | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.revocations = revocations
        self._clock = clock or SystemClock()
        self._verified = _VerifiedTokens(self._clock, revocations)
        # The header of an issuer's tokens is one constant text. Anything else, such as another
        # algorithm, a key inside the header or an unknown "crit", is unknown as a whole.
        self._keys = {
            _identity_header(name): (name, _ed25519(name, pem)) for name, pem in trust.items()
        }

    def verify(self, token: str) -> Principal:
        """Who the token says is asking.

        Raises:
            TokenRefused: it is not a valid token of a trusted issuer.
            CredentialRevoked: the session or key behind it has ended.
        """
        return self._verified.get(token) or self._verified.add(token, self._check(token))

    def _check(self, token: str) -> _Verified:
        header, payload, signature = _split(token)
        issuer, key = self._keys.get(header, ("", None))
        if key is None:
            raise TokenRefused("the identity's issuer is not trusted")
        try:
            key.verify(_signature_of(signature), f"{header}.{payload}".encode())
        except InvalidSignature as error:
            raise TokenRefused("the identity's signature is wrong") from error
        claims = _object_of(payload)
        if claims.get("iss") != issuer or claims.get("aud") != IDENTITY_AUDIENCE:
            raise TokenRefused("the identity is not for this mesh")
        now_s = self._clock.now().timestamp()
        refused_from_s = _expiry_s(claims, now_s=now_s, life_s_max=IDENTITY_LIFE_S)
        return _Verified(_asserted(issuer, claims), refused_from_s)


def _ed25519(issuer: str, pem: bytes) -> ed25519.Ed25519PublicKey:
    key = load_pem_public_key(pem)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ValueError(f"the identity key of {issuer} is not an Ed25519 key")
    return key


def _asserted(issuer: str, claims: Mapping[str, Any]) -> Principal:
    """The principal of verified claims, if this issuer may speak for it."""
    try:
        kind = PrincipalKind(_text(claims, "kind"))
    except ValueError as error:
        raise TokenRefused("the identity is of an unknown kind") from error
    subject = _text(claims, "sub")
    is_itself = kind is PrincipalKind.SERVICE and subject == issuer
    speaks_for_others = issuer == EDGE_ISSUER and kind is not PrincipalKind.SERVICE
    if not (is_itself or speaks_for_others):
        raise TokenRefused("the issuer may not speak for this principal")
    scopes = frozenset(_text(claims, "scope").split())
    return Principal(kind, subject, _text(claims, "tenant"), scopes, _text(claims, "cred"))


class AccessTokenVerifier:
    """Believes access tokens that auth has signed (RFC 9068 with RS256).

    Args:
        jwks: the key set as RFC 7517 JSON, or its "keys".
        revocations: checked at every use; None where nothing can be revoked.
        clock: where time comes from.
    """

    def __init__(
        self,
        jwks: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
        *,
        revocations: RevocationList | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._verified = _VerifiedTokens(self._clock, revocations)
        self._keys: dict[str, rsa.RSAPublicKey] = {}
        self.replace_keys(jwks)

    def replace_keys(self, jwks: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Believe these keys from now on, and no others.

        Raises:
            ValueError: a key is malformed or weak; the keys stay as they were.
        """
        keys = jwks["keys"] if isinstance(jwks, Mapping) else jwks
        usable = {key["kid"]: _rsa(key) for key in keys if key.get("alg") == "RS256"}
        if usable.keys() != self._keys.keys():
            self._verified.clear()
        self._keys = usable

    def verify(self, token: str) -> Principal:
        """The user that holds the token.

        Raises:
            UnknownSigningKey: no key of that name; a fetch may help, at most once a minute.
            TokenRefused: it is not a valid access token of ours.
            CredentialRevoked: its session has ended.
        """
        return self._verified.get(token) or self._verified.add(token, self._check(token))

    def _check(self, token: str) -> _Verified:
        header_part, payload, signature = _split(token)
        key = self._key_of(_object_of(header_part))
        signed = f"{header_part}.{payload}".encode()
        try:
            key.verify(_signature_of(signature), signed, padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature as error:
            raise TokenRefused("the token's signature is wrong") from error
        claims = _object_of(payload)
        if claims.get("iss") != ACCESS_TOKEN_ISSUER:
            raise TokenRefused("the token is another issuer's")
        if claims.get("aud") != ACCESS_TOKEN_AUDIENCE:
            raise TokenRefused("the token is for another audience")
        now_s = self._clock.now().timestamp()
        refused_from_s = _expiry_s(claims, now_s=now_s, life_s_max=ACCESS_TOKEN_LIFE_S)
        return _Verified(_user(claims), refused_from_s)

    def _key_of(self, header: Mapping[str, Any]) -> rsa.RSAPublicKey:
        # Exactly these three members: an embedded key, a key URL, "crit" or "b64" has no place.
        if header.keys() != {"alg", "kid", "typ"}:
            raise TokenRefused("the token's header is not ours")
        if header["alg"] != "RS256" or header["typ"] != ACCESS_TOKEN_TYPE:
            raise TokenRefused("the token is of another type")
        kid = header["kid"]
        key = self._keys.get(kid) if isinstance(kid, str) else None
        if key is None:
            raise UnknownSigningKey("the token's signing key is not known")
        return key


def _rsa(jwk: Mapping[str, Any]) -> rsa.RSAPublicKey:
    modulus = int.from_bytes(_decode(jwk["n"]), "big")
    exponent = int.from_bytes(_decode(jwk["e"]), "big")
    key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
    if key.key_size < RSA_BITS_MIN:
        raise ValueError(f"the RSA key {jwk['kid']} has only {key.key_size} bits")
    return key


def _user(claims: Mapping[str, Any]) -> Principal:
    scopes = frozenset(_text(claims, "scope").split())
    subject, tenant, session = (_text(claims, name) for name in ("sub", "tenant", "sid"))
    if not subject or not session:
        raise TokenRefused("the token names no user or no session")
    return Principal(PrincipalKind.USER, subject, tenant, scopes, session)
