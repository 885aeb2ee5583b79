"""Access tokens (RFC 9068) and the key that signs them."""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from services.auth.domain import Session
from shared.identity import (
    ACCESS_TOKEN_AUDIENCE,
    ACCESS_TOKEN_ISSUER,
    ACCESS_TOKEN_LIFE_S,
    ACCESS_TOKEN_TYPE,
)

RSA_BITS = 2048
# RFC 9068 wants a client; log-ins of our own API have this one.
FIRST_PARTY_CLIENT = "tenfold"


def write_private_once(path: Path, content: bytes) -> bytes:
    """Write a file that only its owner may read, unless it is there; returns what is there.

    It appears whole or not at all, and of two processes that write at once, one wins.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(scratch, path)
    except FileExistsError:
        return path.read_bytes()
    finally:
        scratch.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return content


@dataclass(frozen=True)
class SigningKey:
    """An RSA key for RS256.

    Attributes:
        jwk: its public half as RFC 7517 JSON; `kid` is the RFC 7638 thumbprint.
    """

    key: rsa.RSAPrivateKey
    jwk: Mapping[str, str]

    @classmethod
    def load(cls, path: Path) -> Self:
        """The key in a file (mode 0600), made at the first start. Blocking: half a second.

        Raises:
            ValueError: the file holds no RSA key of at least 2048 bits.
        """
        pem = path.read_bytes() if path.exists() else write_private_once(path, _new_pem())
        key = load_pem_private_key(pem, password=None)
        if not isinstance(key, rsa.RSAPrivateKey) or key.key_size < RSA_BITS:
            raise ValueError(f"{path} holds no RSA key of at least {RSA_BITS} bits")
        return cls(key, _jwk(key.public_key()))

    def sign(self, claims: Mapping[str, Any]) -> str:
        """A compact JWS of these claims."""
        header = {"alg": "RS256", "kid": self.jwk["kid"], "typ": ACCESS_TOKEN_TYPE}
        signed = f"{_base64_json(header)}.{_base64_json(claims)}"
        signature = self.key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{_base64(signature)}"


def access_token(key: SigningKey, session: Session, scopes: frozenset[str]) -> str:
    """The access token that goes with a session's current refresh token.

    It depends on nothing else: repeating a refresh gives the same token.
    """
    issued_s = int(session.rotated_at.timestamp())
    return key.sign(
        {
            "iss": ACCESS_TOKEN_ISSUER,
            "aud": ACCESS_TOKEN_AUDIENCE,
            "sub": str(session.user_id),
            "client_id": FIRST_PARTY_CLIENT,
            "tenant": session.tenant,
            "scope": " ".join(sorted(scopes)),
            "sid": str(session.id),
            "jti": f"{session.id}.{session.counter}",
            "iat": issued_s,
            "exp": issued_s + ACCESS_TOKEN_LIFE_S,
        }
    )


def access_expires_at(session: Session) -> datetime:
    """When the session's current access token expires."""
    return session.rotated_at.replace(microsecond=0) + timedelta(seconds=ACCESS_TOKEN_LIFE_S)


def _new_pem() -> bytes:
    key = rsa.generate_private_key(public_exponent=65_537, key_size=RSA_BITS)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _jwk(key: rsa.RSAPublicKey) -> dict[str, str]:
    numbers = key.public_numbers()
    required = {"e": _base64_int(numbers.e), "kty": "RSA", "n": _base64_int(numbers.n)}
    canonical = json.dumps(required, separators=(",", ":"), sort_keys=True)
    kid = _base64(hashlib.sha256(canonical.encode()).digest())
    return {**required, "use": "sig", "alg": "RS256", "kid": kid}


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _base64_json(value: Mapping[str, Any]) -> str:
    return _base64(json.dumps(value, separators=(",", ":")).encode())


def _base64_int(number: int) -> str:
    return _base64(number.to_bytes((number.bit_length() + 7) // 8))
