"""Values and rules of auth: pure, no await."""

import hashlib
import hmac
import secrets
import string
import unicodedata
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum, StrEnum, auto
from typing import Self
from uuid import UUID

from shared.errors import InvalidRequest, NotFound, Overloaded, QuotaExceeded, Unauthenticated

EMAIL_CHARACTERS_MAX, LOCAL_PART_CHARACTERS_MAX = 254, 64
REFRESH_GRACE = timedelta(seconds=30)
API_KEY_LIFE_MAX = timedelta(days=366)


class CredentialsRejected(Unauthenticated):
    """The e-mail or the password, token or key is wrong; which one is never said."""

    reason = "CREDENTIALS_REJECTED"

    def __init__(self) -> None:
        super().__init__("the credentials are not valid")


class RefreshTokenReused(Unauthenticated):
    """A refresh token came again after its grace: the session has ended."""

    reason = "REFRESH_TOKEN_REUSED"

    def __init__(self) -> None:
        super().__init__("this refresh token was used before; the session has ended, log in again")


class PasswordTooCommon(InvalidRequest):
    """The password is among the most common ones, or is the e-mail."""

    reason = "PASSWORD_TOO_COMMON"


class LoginThrottled(QuotaExceeded):
    """Too many tries for one address."""

    reason = "LOGIN_THROTTLED"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(
            "too many log-ins were tried for this address; wait a little",
            retry_after_s=retry_after_s,
        )


class HashingBusy(Overloaded):
    """The pool that hashes passwords is full."""

    reason = "HASHING_BUSY"

    def __init__(self) -> None:
        super().__init__("too many log-ins at once; try again shortly", retry_after_s=1.0)


class UserNotFound(NotFound):
    """No such user for this caller."""


class SessionNotFound(NotFound):
    """No such session for this caller."""


class ApiKeyNotFound(NotFound):
    """No such key for this caller."""


@dataclass(frozen=True)
class EmailAddress:
    """An e-mail address.

    Attributes:
        text: as mail is sent to: NFC, the domain in lower case.
        canonical: what makes two addresses the same: compatibility forms and case folded.
    """

    text: str
    canonical: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what a person typed.

        Raises:
            InvalidRequest: it is not an address, or holds control characters or spaces.
        """
        address = unicodedata.normalize("NFC", text)
        local, at, domain = address.rpartition("@")
        # Control, format, separator and unassigned characters could forge a header or hide.
        if any(unicodedata.category(c)[0] in "CZ" for c in address):
            raise InvalidRequest.of_field("email", "must not hold spaces or control characters")
        if not at or not local or "@" in local or not _is_domain(domain):
            raise InvalidRequest.of_field("email", "must be of the form name@example.org")
        if len(local) > LOCAL_PART_CHARACTERS_MAX or len(address) > EMAIL_CHARACTERS_MAX:
            raise InvalidRequest.of_field("email", "must have at most 64 characters before the @")
        return cls(
            text=f"{local}@{domain.casefold()}",
            canonical=unicodedata.normalize("NFKC", address).casefold(),
        )


def _is_domain(domain: str) -> bool:
    labels = domain.split(".")
    return all(
        0 < len(label) <= 63
        and label[0] != "-"
        and label[-1] != "-"
        and all(c == "-" or c.isalnum() for c in label)
        for label in labels
    )


def require_uncommon(password: str, email: EmailAddress, common: Collection[str]) -> None:
    """Refuse what an attacker tries first.

    Args:
        password: as given.
        email: its own user's.
        common: the most common passwords, case folded.

    Raises:
        PasswordTooCommon: it is among them, or is the e-mail or its name.
    """
    folded = password.casefold()
    own = {email.canonical, email.text.casefold(), email.canonical.rpartition("@")[0]}
    if folded in common or folded in own:
        raise PasswordTooCommon(
            "password: is too easy to guess; choose another",
        )


class SessionState(StrEnum):
    """As the table stores it; whether it has expired depends on the moment."""

    ACTIVE = "ACTIVE"
    REVOKED = "REVOKED"


@dataclass(frozen=True)
class User:
    """A person with an account."""

    id: UUID
    tenant: str
    email: str
    display_name: str
    locale: str
    is_active: bool
    created_at: datetime


class Rotation(Enum):
    """What a refresh token is worth."""

    ROTATED = auto()
    REPEATED = auto()
    REUSED = auto()
    REFUSED = auto()


@dataclass(frozen=True)
class Session:
    """One log-in of one user.

    Attributes:
        counter: how often it was refreshed; the current refresh token names it.
        rotated_at: when the current refresh token was made.
    """

    id: UUID
    tenant: str
    user_id: UUID
    state: SessionState
    counter: int
    rotated_at: datetime
    created_at: datetime
    expires_at: datetime

    def is_live(self, now: datetime) -> bool:
        """Whether it may be used."""
        return self.state is SessionState.ACTIVE and now < self.expires_at

    def refresh(self, counter: int, *, now: datetime) -> tuple[Rotation, Self]:
        """Judge a refresh token whose MAC is right, by the counter that it names.

        One behind within the grace is a lost answer or a second tab: it gets the same tokens
        again. Unbounded, thief and victim could leapfrog for ever; so later it is a reuse.
        """
        if not self.is_live(now) or counter > self.counter:
            return Rotation.REFUSED, self
        if counter == self.counter:
            return Rotation.ROTATED, replace(self, counter=counter + 1, rotated_at=now)
        if counter == self.counter - 1 and now - self.rotated_at <= REFRESH_GRACE:
            return Rotation.REPEATED, self
        return Rotation.REUSED, replace(self, state=SessionState.REVOKED)


REFRESH_PREFIX = "tfr_"
_MAC_BYTES = 16
_COUNTER_BYTES = 4


@dataclass(frozen=True)
class RefreshTokens:
    """Refresh tokens: session id, counter and a MAC; garbage is refused without a look-up.

    The same session and counter always give the same token, so it need not be stored.
    """

    key: bytes

    @classmethod
    def of_secret(cls, secret: bytes) -> Self:
        """The key of this purpose, derived from the process's secret."""
        return cls(hmac.digest(secret, b"tenfold refresh token", "sha256"))

    def seal(self, session_id: UUID, counter: int) -> str:
        """The token of a session's n-th refresh."""
        body = session_id.bytes + counter.to_bytes(_COUNTER_BYTES)
        return REFRESH_PREFIX + urlsafe_b64encode(body + self._mac(body)).decode().rstrip("=")

    def open(self, token: str) -> tuple[UUID, int]:
        """The session and counter of a token.

        Raises:
            CredentialsRejected: we did not make it.
        """
        text = token.removeprefix(REFRESH_PREFIX)
        try:
            content = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except (Base64Error, ValueError) as error:
            raise CredentialsRejected from error
        body, mac = content[:-_MAC_BYTES], content[-_MAC_BYTES:]
        if len(body) != 16 + _COUNTER_BYTES or not hmac.compare_digest(mac, self._mac(body)):
            raise CredentialsRejected
        session_id, counter = UUID(bytes=body[:16]), int.from_bytes(body[16:])
        if self.seal(session_id, counter) != token:  # one spelling per token
            raise CredentialsRejected
        return session_id, counter

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self.key, body, "sha256")[:_MAC_BYTES]


BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_BUCKET_BITS, _RANDOM_BITS = 12, 160
_BODY_CHARACTERS, _CHECKSUM_CHARACTERS = 29, 6
_ENVIRONMENT = "live"
_SHOWN_CHARACTERS = 4


class KeyKind(StrEnum):
    """As whom a key acts."""

    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True)
class ApiKeySecret:
    """The secret of an API key.

    Attributes:
        text: tf_<kind>_live_<bucket and 160 random bits><CRC-32>, in base 62.
        kind: as whom it acts.
        bucket: where its row is, so that a look-up asks one shard.
    """

    text: str
    kind: KeyKind
    bucket: int

    @classmethod
    def make(cls, kind: KeyKind, bucket: int) -> Self:
        """A new secret."""
        body = _base62(bucket << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS), _BODY_CHARACTERS)
        start = f"tf_{kind}_{_ENVIRONMENT}_{body}"
        return cls(start + _checksum(start), kind, bucket)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a secret; junk is refused by its checksum.

        Raises:
            CredentialsRejected: it is not one that we could have made.
        """
        parts = text.split("_")
        if len(parts) != 4 or parts[0] != "tf" or parts[2] != _ENVIRONMENT:
            raise CredentialsRejected
        body, checksum = parts[3][:_BODY_CHARACTERS], parts[3][_BODY_CHARACTERS:]
        if parts[1] not in set(KeyKind) or len(body) != _BODY_CHARACTERS:
            raise CredentialsRejected
        if any(c not in BASE62 for c in body) or checksum != _checksum(text[: -len(checksum)]):
            raise CredentialsRejected
        bucket = _of_base62(body) >> _RANDOM_BITS
        if bucket >= 1 << _BUCKET_BITS:
            raise CredentialsRejected
        return cls(text, KeyKind(parts[1]), bucket)

    @property
    def hash(self) -> bytes:
        """What is stored of it."""
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def prefix(self) -> str:
        """What people may see of its start."""
        return self.text[: len(f"tf_{self.kind}_{_ENVIRONMENT}_") + _SHOWN_CHARACTERS]

    @property
    def last_four(self) -> str:
        """What people may see of its end."""
        return self.text[-_SHOWN_CHARACTERS:]


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(BASE62[digit])
    return "".join(reversed(digits))


def _of_base62(text: str) -> int:
    number = 0
    for character in text:
        number = number * 62 + BASE62.index(character)
    return number


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECKSUM_CHARACTERS)


@dataclass(frozen=True)
class ApiKey:
    """A key for programs; its secret is not here."""

    id: UUID
    tenant: str
    owner: UUID
    kind: KeyKind
    display_name: str
    scopes: frozenset[str]
    prefix: str
    last_four: str
    is_revoked: bool
    created_at: datetime
    expires_at: datetime

    def is_live(self, now: datetime) -> bool:
        """Whether it may be used."""
        return not self.is_revoked and now < self.expires_at


@dataclass(frozen=True)
class Revocation:
    """A session or key that has ended.

    Attributes:
        credential: its id.
        forget_at: every token of it has expired by then.
    """

    credential: UUID
    forget_at: datetime


@dataclass(frozen=True)
class TryBudget:
    """How often a log-in may be tried for one address; see shared quota: the same arithmetic.

    Source: Generic Cell Rate Algorithm, ITU-T Recommendation I.371.
    """

    burst: int = 10
    refill_s: float = 6.0

    def take(self, full_at_s: float, now_s: float) -> tuple[float, float]:
        """Take one try.

        Args:
            full_at_s: when the budget is whole again; any past moment means it is.
            now_s: on the same clock.

        Returns:
            The new full_at_s, and how long to wait: 0 when the try may go on.
        """
        start_s = max(full_at_s, now_s)
        wait_s = start_s - now_s - (self.burst - 1) * self.refill_s
        if wait_s > 0:
            return full_at_s, wait_s
        return start_s + self.refill_s, 0.0
