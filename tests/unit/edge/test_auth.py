"""Credentials without a network: edge/auth.py."""

from types import SimpleNamespace
from uuid import uuid4

import pytest

from edge.auth import ApiKeys, ResolvedKey, SigningKeys, authorize, bearer_of, has_valid_checksum
from edge.exchange import Exchange
from edge.http1_request import Http1Request
from edge.refusals import HttpRefusal
from shared.errors import PermissionDenied, Unauthenticated, Unavailable
from shared.identity import PUBLIC, AccessTokenVerifier, Principal, PrincipalKind, RevocationList
from shared.rpc.policy import Access, MethodPolicy
from tests.fakes import ManualClock
from tests.unit.edge.keys import make_key

USER = Principal(PrincipalKind.USER, str(uuid4()), scopes=frozenset({"a"}), credential="session")
ADMIN = Principal(PrincipalKind.ADMIN, str(uuid4()), scopes=frozenset({"a"}), credential="key")


def exchange_with(*values: bytes) -> Exchange:
    headers = [(b"authorization", value) for value in values]
    request = Http1Request(SimpleNamespace(address=""), "GET", b"/", list(headers))
    return Exchange.of(request, trusted_hops=0)


def test_the_bearer_credential_is_read_whatever_the_case_of_its_scheme():
    assert bearer_of(exchange_with()) == ""
    assert bearer_of(exchange_with(b"bearer abc.def")) == "abc.def"


@pytest.mark.parametrize(
    "values",
    [(b"Bearer a", b"Bearer a"), (b"Bearer a, Bearer b",), (b"Basic eDp5",), (b"Bearer",), (b"",)],
    ids=["two headers", "two in one", "basic", "empty bearer", "empty"],
)
def test_anything_but_one_bearer_credential_is_refused(values):
    with pytest.raises(HttpRefusal):
        bearer_of(exchange_with(*values))


def test_a_key_with_one_wrong_character_fails_its_checksum():
    key = make_key()
    assert has_valid_checksum(key)
    for index in range(len(key)):
        other = "0" if key[index] != "0" else "1"
        assert not has_valid_checksum(key[:index] + other + key[index + 1 :])
    assert not has_valid_checksum("")
    assert not has_valid_checksum("tf_")


@pytest.mark.parametrize(
    ("access", "principal", "error"),
    [
        (Access.PUBLIC, PUBLIC, None),
        (Access.USER, PUBLIC, Unauthenticated),
        (Access.USER, USER, None),
        (Access.USER, ADMIN, None),
        (Access.ADMIN, USER, PermissionDenied),
        (Access.ADMIN, ADMIN, None),
        (Access.SERVICE, ADMIN, PermissionDenied),
        (Access.SERVICE, PUBLIC, Unauthenticated),
        (Access.NOBODY, ADMIN, PermissionDenied),
    ],
)
def test_who_may_call_follows_from_the_contract_and_nobody_is_the_default(access, principal, error):
    policy = MethodPolicy("/a.B/C", access=access)
    if error is None:
        authorize(policy, principal)
    else:
        with pytest.raises(error):
            authorize(policy, principal)


def test_every_scope_is_needed():
    policy = MethodPolicy("/a.B/C", access=Access.USER, scopes=frozenset({"a", "b"}))
    with pytest.raises(PermissionDenied) as refused:
        authorize(policy, USER)
    assert refused.value.metadata == {"scope": "b"}


class Auth:
    """Resolves one key; counts how often it is asked."""

    def __init__(self, clock: ManualClock, key: str) -> None:
        self.clock, self.key, self.asked, self.is_away = clock, key, 0, False

    async def resolve_api_key(self, secret: str) -> ResolvedKey:
        self.asked += 1
        if self.is_away:
            raise Unavailable("away")
        if secret != self.key:
            raise Unauthenticated("nobody's")
        return ResolvedKey(USER, self.clock.now().timestamp() + 20)

    async def jwks(self) -> list[dict[str, str]]:
        self.asked += 1
        if self.is_away:
            raise Unavailable("away")
        return []


def api_keys(auth: Auth, revocations: RevocationList) -> ApiKeys:
    return ApiKeys(
        auth.resolve_api_key,
        has_valid_checksum=has_valid_checksum,
        revocations=revocations,
        clock=auth.clock,
    )


async def test_a_key_is_believed_until_it_expires_and_survives_auth_being_away(clock):
    auth = Auth(clock, make_key())
    keys = api_keys(auth, RevocationList(clock=clock))
    assert await keys.principal_of(auth.key) == USER
    auth.is_away = True
    clock.advance(19)
    assert await keys.principal_of(auth.key) == USER
    clock.advance(2)
    with pytest.raises(Unavailable):
        await keys.principal_of(auth.key)
    assert auth.asked == 2


async def test_a_revoked_key_is_refused_although_it_is_remembered(clock):
    auth, revocations = Auth(clock, make_key()), RevocationList(clock=clock)
    keys = api_keys(auth, revocations)
    await keys.principal_of(auth.key)
    revocations.revoke(USER.credential, clock.now().timestamp() + 600)
    with pytest.raises(Unauthenticated):
        await keys.principal_of(auth.key)


async def test_a_refused_key_is_asked_for_again_after_two_seconds(clock):
    auth = Auth(clock, make_key())
    keys = api_keys(auth, RevocationList(clock=clock))
    unknown = make_key()
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            await keys.principal_of(unknown)
    assert auth.asked == 1
    clock.advance(2.1)
    with pytest.raises(Unauthenticated):
        await keys.principal_of(unknown)
    assert auth.asked == 2


async def test_signing_keys_are_fetched_at_most_once_a_minute_on_demand(clock):
    auth = Auth(clock, "")
    keys = SigningKeys(auth, AccessTokenVerifier(clock=clock), clock)
    auth.is_away = True
    with pytest.raises(Unavailable):
        await keys.refresh_if_due()
    auth.is_away = False
    await keys.refresh_if_due()
    await keys.refresh_if_due()
    assert (auth.asked, keys.is_loaded) == (2, True)
    clock.advance(61)
    auth.is_away = True
    await keys.refresh_if_due()  # what was fetched goes on serving
    assert auth.asked == 3
