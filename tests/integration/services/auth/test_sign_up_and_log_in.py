"""Sign up and log in over gRPC, on real shards."""

import asyncio
import statistics
import time

import pytest
from tenfold.auth.v1 import auth_service_pb2 as auth

from shared.errors import (
    IdempotencyKeyReused,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from shared.identity import Principal, PrincipalKind
from tests.fakes import ManualClock
from tests.integration.services.auth.harness import PASSWORD, Auth, new_email


async def test_a_user_signs_up_logs_in_and_reads_herself(auth_service: Auth) -> None:
    email = new_email()
    await auth_service.sign_up(email, display_name="Ada", locale="en")
    session = await auth_service.log_in(email)
    principal = (await auth_service.verifier()).verify(session.tokens.access_token)
    assert principal.kind is PrincipalKind.USER
    assert session.session.user == f"users/{principal.subject}"
    user = await auth_service.identities.GetUser(
        auth.GetUserRequest(name="users/me"), metadata=auth_service.as_(principal)
    )
    assert (user.email, user.display_name, user.locale) == (email, "Ada", "en")


async def test_a_taken_address_gets_the_same_receipt_and_changes_nothing(
    auth_service: Auth,
) -> None:
    email = new_email()
    first = await auth_service.sign_up(email)
    second = await auth_service.sign_up(email, key="another key " + email, password="x" * 20)
    assert first == second
    await auth_service.log_in(email)
    with pytest.raises(Unauthenticated):
        await auth_service.log_in(email, "x" * 20)


async def test_ten_sign_ups_of_one_address_at_once_make_one_user(auth_service: Auth) -> None:
    email = new_email()
    await asyncio.gather(*(auth_service.sign_up(email, key=f"{email}{n}") for n in range(10)))
    users = {(await auth_service.log_in(email)).session.user for _ in range(2)}
    assert len(users) == 1


async def test_a_repeated_sign_up_is_repeated_and_another_under_its_key_is_refused(
    auth_service: Auth,
) -> None:
    email = new_email()
    await asyncio.gather(*(auth_service.sign_up(email, key="k" + email) for _ in range(5)))
    with pytest.raises(IdempotencyKeyReused):
        await auth_service.sign_up(new_email(), key="k" + email)


@pytest.mark.parametrize(
    ("one", "other"),
    [("ada@Example.ORG", "ada@example.org"), ("café@x.org", "cafe\u0301@x.org"),
     ("Bob@x.org", "bob@x.org"), ("ﬁona@x.org", "fiona@x.org")],
    ids=["domain case", "composed", "local case", "compatibility form"],
)  # fmt: skip
async def test_two_spellings_of_an_address_are_one_user(
    auth_service: Auth, one: str, other: str
) -> None:
    prefix = new_email()[:12].replace("@", "")
    await auth_service.sign_up(prefix + one)
    await auth_service.sign_up(prefix + other, key=prefix + "2", password="another one of them")
    first = (await auth_service.log_in(prefix + one)).session.user
    assert (await auth_service.log_in(prefix + other)).session.user == first


@pytest.mark.parametrize(
    "email",
    ["a@b\r\nBcc: x@y.z", "a b@c.org", "nobody", "@x.org", "a@", "a@b@c", "a\u202eb@c.org",
     "a@-x.org", "x" * 65 + "@y.org"],
)  # fmt: skip
async def test_what_is_no_address_is_refused_by_name(auth_service: Auth, email: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await auth_service.sign_up(email, key=new_email())
    assert [violation.field for violation in refusal.value.violations] == ["email"]


@pytest.mark.parametrize("password", ["password123", "PassWord123", "{email}"])
async def test_a_common_password_is_refused(auth_service: Auth, password: str) -> None:
    email = new_email()
    with pytest.raises(InvalidRequest) as refusal:
        await auth_service.sign_up(email, password=password.format(email=email))
    assert refusal.value.error_reason == "PASSWORD_TOO_COMMON"


async def test_known_and_unknown_users_get_the_same_refusal_in_the_same_time(
    auth_service: Auth, auth_clock: ManualClock
) -> None:
    email = new_email()
    await auth_service.sign_up(email)

    async def refused(address: str) -> tuple[float, tuple[str, str]]:
        start_s = time.perf_counter()
        with pytest.raises(Unauthenticated) as refusal:
            await auth_service.log_in(address, "wrong password")
        duration_s = time.perf_counter() - start_s
        return duration_s, (refusal.value.error_reason, refusal.value.message)

    known, unknown, answers = [], [], set()
    for _ in range(8):
        auth_clock.advance(60)
        for times, address in ((known, email), (unknown, new_email())):
            duration_s, answer = await refused(address)
            times.append(duration_s)
            answers.add(answer)
    assert answers == {("CREDENTIALS_REJECTED", "the credentials are not valid")}
    ratio = statistics.median(known) / statistics.median(unknown)
    assert 0.5 < ratio < 2


async def test_tries_are_throttled_and_the_owner_waits_seconds_only(
    auth_service: Auth, auth_clock: ManualClock
) -> None:
    email = new_email()
    await auth_service.sign_up(email)
    outcomes = []
    for _ in range(12):
        try:
            await auth_service.log_in(email, "wrong password")
        except Exception as error:
            outcomes.append((type(error).__name__, getattr(error, "error_reason", "")))
            wait_s = getattr(error, "retry_after_s", None)
    assert outcomes[:10] == [("Unauthenticated", "CREDENTIALS_REJECTED")] * 10
    assert outcomes[10:] == [("QuotaExceeded", "LOGIN_THROTTLED")] * 2
    assert wait_s is not None and 0 < wait_s <= 6
    auth_clock.advance(wait_s + 0.1)
    await auth_service.log_in(email)


async def test_another_user_looks_absent_and_an_operator_sees_her(auth_service: Auth) -> None:
    session, ada = await auth_service.new_user()
    _, eve = await auth_service.new_user()
    name = auth.GetUserRequest(name=session.session.user)
    with pytest.raises(NotFound):
        await auth_service.identities.GetUser(name, metadata=auth_service.as_(eve))
    scopes = frozenset({"auth.users.read"})
    admin = Principal(PrincipalKind.ADMIN, ada.subject[:-4] + "0000", scopes=scopes)
    user = await auth_service.identities.GetUser(name, metadata=auth_service.as_(admin))
    assert user.name == session.session.user
    foreign = Principal(PrincipalKind.ADMIN, admin.subject, "elsewhere", scopes)
    with pytest.raises(NotFound):
        await auth_service.identities.GetUser(name, metadata=auth_service.as_(foreign))


async def test_a_tenant_s_users_are_its_own(auth_service: Auth) -> None:
    email = new_email()
    await auth_service.sign_up(email)
    request = auth.CreateSessionRequest(email=email, password=PASSWORD)
    with pytest.raises(Unauthenticated):
        await auth_service.sessions.CreateSession(
            request, metadata=auth_service.public("elsewhere")
        )


async def test_fifty_log_ins_at_once_leave_other_calls_fast(auth_service: Auth) -> None:
    emails = [new_email() for _ in range(50)]
    logins = [asyncio.create_task(_tried(auth_service, email)) for email in emails]
    await asyncio.sleep(0)
    slowest_s, began_s = 0.0, time.perf_counter()
    while not all(login.done() for login in logins):
        start_s = time.perf_counter()
        await auth_service.tokens.GetJwks(auth.GetJwksRequest())
        slowest_s = max(slowest_s, time.perf_counter() - start_s)
        await asyncio.sleep(0.01)
    assert slowest_s < (time.perf_counter() - began_s) / 4  # behind them, it would be nearly all


async def _tried(auth_service: Auth, email: str) -> None:
    with pytest.raises(Unauthenticated):
        await auth_service.log_in(email)


async def test_a_user_may_not_call_what_is_for_services(auth_service: Auth) -> None:
    _, ada = await auth_service.new_user()
    with pytest.raises(PermissionDenied):
        await auth_service.keys.ResolveApiKey(
            auth.ResolveApiKeyRequest(secret="x"), metadata=auth_service.as_(ada)
        )
