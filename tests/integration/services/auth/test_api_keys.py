"""API keys and the operator's key, over gRPC."""

import stat
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tenfold.auth.v1 import auth_pb2 as resources
from tenfold.auth.v1 import auth_service_pb2 as auth

from services.auth.domain import ApiKeySecret, KeyKind
from shared.errors import InvalidRequest, NotFound, Unauthenticated
from shared.identity import Principal, PrincipalKind
from tests.fakes import ManualClock
from tests.integration.services.auth.harness import Auth, new_email, running_auth

SERVICE = Principal(PrincipalKind.SERVICE, "edge")


async def make_key(
    auth_service: Auth, owner: Principal, *, request_id: str = "", days: float = 30,
    scopes: tuple[str, ...] = ("ledger.read",),
) -> auth.CreateApiKeyResponse:  # fmt: skip
    expires = Timestamp()
    expires.FromDatetime(auth_service.clock.now() + timedelta(days=days))
    request = auth.CreateApiKeyRequest(
        display_name="ci", scopes=scopes, expire_time=expires, request_id=request_id or new_email()
    )
    return await auth_service.keys.CreateApiKey(request, metadata=auth_service.as_(owner))


async def resolve(auth_service: Auth, secret: str) -> auth.ResolveApiKeyResponse:
    request = auth.ResolveApiKeyRequest(secret=secret)
    return await auth_service.keys.ResolveApiKey(request, metadata=auth_service.as_(SERVICE))


async def test_a_key_resolves_to_its_owner_with_its_scopes(auth_service: Auth) -> None:
    _, ada = await auth_service.new_user()
    made = await make_key(auth_service, ada)
    found = await resolve(auth_service, made.secret)
    assert (found.principal_kind, found.subject) == ("user", ada.subject)
    assert list(found.scopes) == ["ledger.read"]
    assert made.api_key.name == f"apiKeys/{found.credential}"
    assert made.secret.startswith(made.api_key.prefix)
    assert made.secret.endswith(made.api_key.last_four)


async def test_a_repeat_gives_the_key_without_its_secret(auth_service: Auth) -> None:
    _, ada = await auth_service.new_user()
    first = await make_key(auth_service, ada, request_id="again")
    again = await make_key(auth_service, ada, request_id="again")
    assert again.api_key == first.api_key
    assert (again.secret, again.secret_unavailable) == ("", True)


async def test_a_key_cannot_hold_more_than_its_maker(auth_service: Auth) -> None:
    _, ada = await auth_service.new_user()
    with pytest.raises(InvalidRequest) as refusal:
        await make_key(auth_service, ada, scopes=("ledger.read", "ledger.audit"))
    assert [violation.field for violation in refusal.value.violations] == ["scopes[1]"]


@pytest.mark.parametrize("days", [-1, 400])
async def test_a_key_lives_at_most_a_year(auth_service: Auth, days: float) -> None:
    _, ada = await auth_service.new_user()
    with pytest.raises(InvalidRequest) as refusal:
        await make_key(auth_service, ada, days=days)
    assert [violation.field for violation in refusal.value.violations] == ["expire_time"]


async def test_a_revoked_key_is_refused_at_once_and_listed_as_such(auth_service: Auth) -> None:
    _, ada = await auth_service.new_user()
    made = await make_key(auth_service, ada)
    request, metadata = auth.RevokeApiKeyRequest(name=made.api_key.name), auth_service.as_(ada)
    _, eve = await auth_service.new_user()
    with pytest.raises(NotFound):
        await auth_service.keys.RevokeApiKey(request, metadata=auth_service.as_(eve))
    for _ in range(2):
        revoked = await auth_service.keys.RevokeApiKey(request, metadata=metadata)
        assert revoked.state == resources.ApiKey.STATE_REVOKED
    assert auth_service.revocations.is_revoked(made.api_key.name.removeprefix("apiKeys/"))
    with pytest.raises(Unauthenticated):
        await resolve(auth_service, made.secret)
    page = await auth_service.keys.ListApiKeys(auth.ListApiKeysRequest(), metadata=metadata)
    assert list(page.api_keys) == [revoked]


async def test_an_expired_key_is_refused(auth_service: Auth, auth_clock: ManualClock) -> None:
    _, ada = await auth_service.new_user()
    made = await make_key(auth_service, ada, days=1)
    auth_clock.advance(86_401)
    with pytest.raises(Unauthenticated):
        await resolve(auth_service, made.secret)


async def test_junk_is_refused(auth_service: Auth) -> None:
    _, ada = await auth_service.new_user()
    secret = (await make_key(auth_service, ada)).secret
    unknown = ApiKeySecret.make(KeyKind.USER, 7).text
    for junk in (secret[:-1], secret + "0", secret.replace("user", "admin"), unknown, "tf_", "x"):
        with pytest.raises(Unauthenticated) as refusal:
            await resolve(auth_service, junk)
        assert refusal.value.error_reason == "CREDENTIALS_REJECTED"


async def test_the_operator_s_key_is_private_and_survives_a_restart(
    tmp_path: Path, nats_url: str, clock: ManualClock
) -> None:
    subjects = set()
    for _ in range(2):
        async with running_auth(tmp_path, nats_url, clock) as running:
            file = tmp_path / "admin.key"
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            found = await resolve(running, file.read_text().strip())
            assert found.principal_kind == "admin"
            assert {"ledger.post", "ledger.audit", "auth.users.read"} <= set(found.scopes)
            subjects.add(found.subject)
    assert len(subjects) == 1


async def test_a_lost_database_takes_the_operator_s_key_of_the_file(
    tmp_path: Path, nats_url: str, clock: ManualClock
) -> None:
    async with running_auth(tmp_path / "a", nats_url, clock):
        text = (tmp_path / "a" / "admin.key").read_text()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "admin.key").write_text(text)  # a kill between the file and the database
    async with running_auth(tmp_path / "b", nats_url, clock) as running:
        found = await resolve(running, text.strip())
        owner = Principal(
            PrincipalKind.ADMIN, found.subject, scopes=frozenset(found.scopes),
            credential=found.credential,
        )  # fmt: skip
        made = await make_key(running, replace(owner), scopes=("ledger.post",))
        assert made.secret.startswith("tf_admin_live_")
