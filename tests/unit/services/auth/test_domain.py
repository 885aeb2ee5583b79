"""services/auth/domain.py: sessions, refresh tokens, API keys and the budget of tries."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.auth.domain import (
    ApiKeySecret,
    CredentialsRejected,
    EmailAddress,
    KeyKind,
    RefreshTokens,
    Rotation,
    Session,
    SessionState,
    TryBudget,
)
from services.auth.passwords import common_passwords
from services.auth.roles import Roles
from shared.errors import InvalidRequest

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ID = UUID("01890000-0000-7000-8000-000000000001")


def session(counter: int = 3, **changes: object) -> Session:
    values: dict[str, object] = {
        "id": ID, "tenant": "default", "user_id": ID, "state": SessionState.ACTIVE,
        "counter": counter, "rotated_at": NOW, "created_at": NOW,
        "expires_at": NOW + timedelta(days=30), **changes,
    }  # fmt: skip
    return Session(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counter", "after_s", "rotation"),
    [
        (3, 0, Rotation.ROTATED),
        (3, 86_400, Rotation.ROTATED),
        (2, 30, Rotation.REPEATED),
        (2, 31, Rotation.REUSED),
        (1, 0, Rotation.REUSED),
        (4, 0, Rotation.REFUSED),
        (3, 30 * 86_400, Rotation.REFUSED),
    ],
)
def test_a_refresh_token_is_worth(counter: int, after_s: float, rotation: Rotation) -> None:
    judged, changed = session().refresh(counter, now=NOW + timedelta(seconds=after_s))
    assert judged is rotation
    assert changed.counter == (4 if rotation is Rotation.ROTATED else 3)
    assert (changed.state is SessionState.REVOKED) == (rotation is Rotation.REUSED)


def test_an_ended_session_refreshes_nothing() -> None:
    ended = session(state=SessionState.REVOKED)
    assert ended.refresh(3, now=NOW)[0] is Rotation.REFUSED


@given(st.uuids(), st.integers(0, 2**32 - 1))
def test_a_refresh_token_tells_what_was_sealed(id_: UUID, counter: int) -> None:
    tokens = RefreshTokens.of_secret(b"s" * 32)
    token = tokens.seal(id_, counter)
    assert tokens.open(token) == (id_, counter)
    with pytest.raises(CredentialsRejected):
        RefreshTokens.of_secret(b"t" * 32).open(token)


@given(st.text(max_size=80))
def test_garbage_opens_nothing(text: str) -> None:
    with pytest.raises(CredentialsRejected):
        RefreshTokens.of_secret(b"s" * 32).open(text)
    with pytest.raises(CredentialsRejected):
        ApiKeySecret.parse(text)


@given(st.sampled_from(KeyKind), st.integers(0, 4095))
def test_a_key_carries_its_kind_and_bucket(kind: KeyKind, bucket: int) -> None:
    secret = ApiKeySecret.make(kind, bucket)
    assert ApiKeySecret.parse(secret.text) == secret
    assert len(secret.text) == len(f"tf_{kind}_live_") + 29 + 6
    assert secret.text.startswith(secret.prefix)


@given(st.integers(0, 48), st.sampled_from("0Az_ "))
def test_one_changed_character_of_a_key_is_noticed(index: int, character: str) -> None:
    text = ApiKeySecret.make(KeyKind.USER, 1).text
    changed = text[:index] + character + text[index + 1 :]
    if changed != text:
        with pytest.raises(CredentialsRejected):
            ApiKeySecret.parse(changed)


@given(st.text(max_size=100))
def test_any_text_is_an_address_or_refused_by_name(text: str) -> None:
    try:
        email = EmailAddress.parse(text)
    except InvalidRequest as refusal:
        assert refusal.violations[0].field == "email"
    else:
        assert EmailAddress.parse(email.text).canonical == email.canonical
        assert email.text.isprintable()


def test_ten_tries_pass_at_once_and_then_one_each_refill() -> None:
    budget, full_at_s, passed = TryBudget(burst=10, refill_s=6), 0.0, 0
    for _ in range(100):
        full_at_s, wait_s = budget.take(full_at_s, 1000.0)
        passed += wait_s == 0
    assert passed == 10
    assert 0 < wait_s <= 6
    assert budget.take(full_at_s, 1000.0 + wait_s)[1] == 0


def test_the_list_of_common_passwords_is_worth_its_name() -> None:
    assert len(common_passwords()) > 300
    assert {"password", "12345678", "qwertyuiop"} <= common_passwords()
    assert all(len(password) >= 8 for password in common_passwords())


def test_roles_follow_from_the_contracts() -> None:
    roles = Roles.of_contracts()
    assert {"auth.users.read", "ledger.transfer", "media.upload"} <= roles.user
    assert roles.user < roles.admin
    assert "ledger.audit" in roles.admin - roles.user
