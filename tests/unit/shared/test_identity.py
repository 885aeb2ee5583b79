"""Tokens: what is believed, and every attack of spec/reliability.md c.3 that applies."""

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.errors import Unavailable
from shared.identity import (
    ACCESS_TOKEN_LIFE_S,
    IDENTITY_LIFE_S,
    LEEWAY_S,
    AccessTokenVerifier,
    CredentialRevoked,
    IdentitySigner,
    IdentityVerifier,
    Principal,
    PrincipalKind,
    RevocationList,
    TokenRefused,
    UnknownSigningKey,
)
from tests.fakes import ManualClock

USER = Principal(PrincipalKind.USER, "u", "acme", frozenset({"a.read", "b.write"}), "session-1")


def b64(data: bytes | dict[str, Any]) -> str:
    content = json.dumps(data).encode() if isinstance(data, dict) else data
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def ed25519_pair() -> tuple[bytes, bytes]:
    key = Ed25519PrivateKey.generate()
    return (
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )


PRIVATE, PUBLIC_KEY = ed25519_pair()
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def jwk_of(key: rsa.RSAPrivateKey, kid: str = "k1") -> dict[str, str]:
    numbers = key.public_key().public_numbers()
    n = numbers.n.to_bytes(key.key_size // 8)
    return {"kty": "RSA", "alg": "RS256", "kid": kid, "n": b64(n), "e": b64(b"\x01\x00\x01")}


def access_token(
    clock: ManualClock, *, header: dict[str, Any] | None = None, key: Any = RSA_KEY, **claims: Any
) -> str:
    now = int(clock.now().timestamp())
    all_claims = {
        "iss": "tenfold-auth", "aud": "tenfold", "sub": "u", "tenant": "acme", "scope": "a.read",
        "sid": "session-1", "jti": "1", "iat": now, "exp": now + 600, **claims,
    }  # fmt: skip
    all_claims = {name: value for name, value in all_claims.items() if value is not ...}
    signed = f"{b64(header or {'alg': 'RS256', 'kid': 'k1', 'typ': 'at+jwt'})}.{b64(all_claims)}"
    return f"{signed}.{b64(key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


@pytest.fixture
def verifier(clock: ManualClock) -> AccessTokenVerifier:
    return AccessTokenVerifier({"keys": [jwk_of(RSA_KEY)]}, clock=clock)


class TestIdentityTokens:
    def test_what_the_edge_signs_is_believed(self, clock: ManualClock) -> None:
        signer = IdentitySigner("edge", PRIVATE, clock=clock)
        verifier = IdentityVerifier({"edge": PUBLIC_KEY}, clock=clock)
        assert verifier.verify(signer.token_for(USER)) == USER
        assert signer.token_for(USER) is signer.token_for(USER)

    def test_a_token_is_renewed_before_it_expires_and_refused_after(
        self, clock: ManualClock
    ) -> None:
        signer = IdentitySigner("edge", PRIVATE, clock=clock)
        verifier = IdentityVerifier({"edge": PUBLIC_KEY}, clock=clock)
        old = signer.token_for(USER)
        verifier.verify(old)
        clock.advance(IDENTITY_LIFE_S / 2)
        assert signer.token_for(USER) != old
        clock.advance(IDENTITY_LIFE_S / 2 + LEEWAY_S)
        with pytest.raises(TokenRefused, match="expired"):
            verifier.verify(old)

    @pytest.mark.parametrize(
        ("issuer", "principal", "is_believed"),
        [
            ("edge", USER, True),
            ("edge", Principal(PrincipalKind.SERVICE, "edge"), True),
            ("edge", Principal(PrincipalKind.SERVICE, "services"), False),
            ("services", Principal(PrincipalKind.SERVICE, "services"), True),
            ("services", Principal(PrincipalKind.SERVICE, "edge"), False),
            ("services", USER, False),
            ("services", Principal(PrincipalKind.ADMIN, "a"), False),
            ("services", Principal(PrincipalKind.PUBLIC, ""), False),
            ("stranger", Principal(PrincipalKind.SERVICE, "stranger"), False),
        ],
    )
    def test_an_issuer_speaks_only_for_whom_it_may(
        self, issuer: str, principal: Principal, is_believed: bool, clock: ManualClock
    ) -> None:
        verifier = IdentityVerifier({"edge": PUBLIC_KEY, "services": PUBLIC_KEY}, clock=clock)
        token = IdentitySigner(issuer, PRIVATE, clock=clock).token_for(principal)
        if is_believed:
            assert verifier.verify(token) == principal
        else:
            with pytest.raises(TokenRefused):
                verifier.verify(token)

    def test_one_changed_character_anywhere_is_refused(self, clock: ManualClock) -> None:
        token = IdentitySigner("edge", PRIVATE, clock=clock).token_for(USER)
        verifier = IdentityVerifier({"edge": PUBLIC_KEY}, clock=clock)
        for index in range(0, len(token), 7):
            changed = "A" if token[index] != "A" else "B"
            with pytest.raises(TokenRefused):
                verifier.verify(token[:index] + changed + token[index + 1 :])

    @pytest.mark.parametrize("text", ["", ".", "..", "a.b.c", "a.b", "é.b.c", "x" * 9000, "..."])
    def test_garbage_is_refused(self, text: str, clock: ManualClock) -> None:
        with pytest.raises(TokenRefused):
            IdentityVerifier({"edge": PUBLIC_KEY}, clock=clock).verify(text)


class TestAccessTokens:
    def test_a_token_of_ours_is_believed(
        self, verifier: AccessTokenVerifier, clock: ManualClock
    ) -> None:
        principal = verifier.verify(access_token(clock))
        assert principal == Principal(
            PrincipalKind.USER, "u", "acme", frozenset({"a.read"}), "session-1"
        )

    @pytest.mark.parametrize(
        "header",
        [
            {"alg": "none", "kid": "k1", "typ": "at+jwt"},
            {"alg": "None", "kid": "k1", "typ": "at+jwt"},
            {"alg": "HS256", "kid": "k1", "typ": "at+jwt"},
            {"alg": "RS512", "kid": "k1", "typ": "at+jwt"},
            {"alg": "RS256", "kid": "k1", "typ": "JWT"},
            {"alg": "RS256", "kid": "k1", "typ": "tenfold-identity+jwt"},
            {"alg": "RS256", "kid": "k1"},
            {"alg": "RS256", "typ": "at+jwt"},
            {"alg": "RS256", "kid": "../../etc/passwd", "typ": "at+jwt"},
            {"alg": "RS256", "kid": ["k1"], "typ": "at+jwt"},
            {"alg": "RS256", "kid": "k1", "typ": "at+jwt", "jwk": jwk_of(RSA_KEY)},
            {"alg": "RS256", "kid": "k1", "typ": "at+jwt", "jku": "https://evil.example"},
            {"alg": "RS256", "kid": "k1", "typ": "at+jwt", "crit": ["b64"], "b64": False},
        ],
        ids=lambda header: ",".join(f"{k}={str(v)[:12]}" for k, v in header.items()),
    )
    def test_another_header_is_refused(
        self, header: dict[str, Any], verifier: AccessTokenVerifier, clock: ManualClock
    ) -> None:
        with pytest.raises(TokenRefused):
            verifier.verify(access_token(clock, header=header))

    def test_no_signature_and_the_public_key_as_a_secret_are_refused(
        self, verifier: AccessTokenVerifier, clock: ManualClock
    ) -> None:
        header, claims, _ = access_token(clock).split(".")
        pem = RSA_KEY.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for alg in ("HS256", "RS256"):
            start = f"{b64({'alg': alg, 'kid': 'k1', 'typ': 'at+jwt'})}.{claims}"
            mac = hmac.digest(pem, start.encode(), hashlib.sha256)
            with pytest.raises(TokenRefused):
                verifier.verify(f"{start}.{b64(mac)}")
        with pytest.raises(TokenRefused):
            verifier.verify(f"{header}.{claims}.")

    @pytest.mark.parametrize(
        "claims",
        [
            {"iss": "tenfold-auth.evil"}, {"iss": "tenfold"}, {"iss": ...},
            {"aud": "tenfold2"}, {"aud": ["tenfold", "other"]}, {"aud": ...},
            {"exp": ...}, {"exp": "9999999999"}, {"exp": 253402300799}, {"exp": True},
            {"iat": ...}, {"sub": ...}, {"sub": ""}, {"sub": 7}, {"sid": ...}, {"sid": ""},
            {"tenant": ...}, {"scope": ...}, {"scope": ["a.read"]},
        ],
        ids=str,
    )  # fmt: skip
    def test_wrong_or_missing_claims_are_refused(
        self, claims: dict[str, Any], verifier: AccessTokenVerifier, clock: ManualClock
    ) -> None:
        with pytest.raises(TokenRefused):
            verifier.verify(access_token(clock, **claims))

    def test_times_are_kept_with_a_leeway_of_half_a_minute(
        self, verifier: AccessTokenVerifier, clock: ManualClock
    ) -> None:
        now = int(clock.now().timestamp())
        verifier.verify(access_token(clock, iat=now - 600, exp=now - 29))
        verifier.verify(access_token(clock, iat=now + 29, exp=now + 600))
        for wrong in (
            {"iat": now - 600, "exp": now - 31},
            {"iat": now + 31},
            {"nbf": now + 31},
            {"iat": now, "exp": now + ACCESS_TOKEN_LIFE_S + 1},
        ):
            with pytest.raises(TokenRefused):
                verifier.verify(access_token(clock, **wrong))

    def test_an_unknown_key_is_told_apart_so_that_a_fetch_may_follow(
        self, verifier: AccessTokenVerifier, clock: ManualClock
    ) -> None:
        header = {"alg": "RS256", "kid": "k2", "typ": "at+jwt"}
        other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        token = access_token(clock, header=header, key=other)
        with pytest.raises(UnknownSigningKey):
            verifier.verify(token)
        verifier.replace_keys([jwk_of(RSA_KEY), jwk_of(other, "k2")])
        verifier.verify(token)

    def test_a_key_that_is_gone_takes_its_believed_tokens_along(
        self, verifier: AccessTokenVerifier, clock: ManualClock
    ) -> None:
        token = access_token(clock)
        verifier.verify(token)
        verifier.replace_keys([])
        with pytest.raises(UnknownSigningKey):
            verifier.verify(token)

    def test_a_weak_key_is_refused_at_load(self, clock: ManualClock) -> None:
        weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
        with pytest.raises(ValueError, match="1024 bits"):
            AccessTokenVerifier([jwk_of(weak)], clock=clock)

    def test_padding_white_space_and_another_serialization_are_refused(
        self, verifier: AccessTokenVerifier, clock: ManualClock
    ) -> None:
        token = access_token(clock)
        header, claims, signature = token.split(".")
        as_json = json.dumps({"protected": header, "payload": claims, "signature": signature})
        for spelled in (token + "=", token + " ", " " + token, token + ".x", as_json, token[:-2]):
            with pytest.raises(TokenRefused):
                verifier.verify(spelled)


class TestRevocations:
    def test_a_revoked_session_is_refused_though_it_was_believed(self, clock: ManualClock) -> None:
        revocations = RevocationList(clock=clock)
        verifier = AccessTokenVerifier([jwk_of(RSA_KEY)], revocations=revocations, clock=clock)
        token = access_token(clock)
        verifier.verify(token)
        revocations.revoke("session-1", clock.now().timestamp() + 600)
        with pytest.raises(CredentialRevoked):
            verifier.verify(token)

    def test_entries_are_forgotten_when_their_tokens_have_expired(self, clock: ManualClock) -> None:
        revocations = RevocationList(clock=clock)
        revocations.revoke("old", clock.now().timestamp() + 10)
        clock.advance(10 + LEEWAY_S + 1)
        revocations.revoke("new", clock.now().timestamp() + 10)
        assert len(revocations) == 1

    def test_a_prolonged_entry_stays(self, clock: ManualClock) -> None:
        revocations = RevocationList(clock=clock)
        now_s = clock.now().timestamp()
        revocations.revoke("session", now_s + 10)
        revocations.revoke("session", now_s + 1000)
        clock.advance(100)
        revocations.revoke("other", clock.now().timestamp() + 10)
        assert revocations.is_revoked("session")

    def test_memory_is_bounded_and_no_access_widens(self, clock: ManualClock) -> None:
        revocations = RevocationList(clock=clock, entries_max=10)
        now_s = clock.now().timestamp()
        for number in range(11):
            revocations.revoke(f"session-{number}", now_s + 100 + number)
        assert len(revocations) == 10
        with pytest.raises(Unavailable):
            revocations.is_revoked("anyone")
        clock.advance(100 + LEEWAY_S + 1)
        assert not revocations.is_revoked("anyone")
        assert revocations.is_revoked("session-10")

    def test_the_list_knows_how_old_it_is(self, clock: ManualClock) -> None:
        revocations = RevocationList(clock=clock)
        assert revocations.age_s() is None
        revocations.mark_current()
        clock.advance(7)
        assert revocations.age_s() == 7
