"""Refresh, log-out and what watches it, over gRPC."""

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from tenfold.auth.v1 import auth_pb2 as resources
from tenfold.auth.v1 import auth_service_pb2 as auth

from shared.errors import InvalidRequest, NotFound, PermissionDenied, Unauthenticated
from shared.identity import CredentialRevoked, Principal, RevocationList
from shared.identity_feed import run_revocation_feed
from tests.fakes import ManualClock
from tests.integration.services.auth.harness import Auth


async def reason_of(call: object) -> str:
    with pytest.raises(Unauthenticated) as refusal:
        await call  # type: ignore[misc]
    return refusal.value.error_reason


async def test_a_refresh_gives_new_tokens_of_the_same_session(auth_service: Auth) -> None:
    session, ada = await auth_service.new_user()
    tokens = await auth_service.refresh(session.tokens.refresh_token)
    assert tokens.refresh_token != session.tokens.refresh_token
    assert (await auth_service.verifier()).verify(tokens.access_token) == ada


async def test_fifty_refreshes_at_once_get_one_answer_and_end_nothing(auth_service: Auth) -> None:
    session, _ = await auth_service.new_user()
    token = session.tokens.refresh_token
    answers = await asyncio.gather(*(auth_service.refresh(token) for _ in range(50)))
    assert len({answer.SerializeToString() for answer in answers}) == 1
    await auth_service.refresh(answers[0].refresh_token)


async def test_a_token_used_again_after_the_grace_ends_the_session(
    auth_service: Auth, auth_clock: ManualClock
) -> None:
    session, ada = await auth_service.new_user()
    tokens = await auth_service.refresh(session.tokens.refresh_token)
    auth_clock.advance(31)
    reused = auth_service.refresh(session.tokens.refresh_token)
    assert await reason_of(reused) == "REFRESH_TOKEN_REUSED"
    assert await reason_of(auth_service.refresh(tokens.refresh_token)) == "CREDENTIALS_REJECTED"
    assert auth_service.revocations.is_revoked(ada.credential)


async def test_two_behind_ends_the_session_even_within_the_grace(auth_service: Auth) -> None:
    session, _ = await auth_service.new_user()
    tokens = await auth_service.refresh(session.tokens.refresh_token)
    await auth_service.refresh(tokens.refresh_token)
    reused = auth_service.refresh(session.tokens.refresh_token)
    assert await reason_of(reused) == "REFRESH_TOKEN_REUSED"


async def test_forged_and_foreign_refresh_tokens_are_refused(auth_service: Auth) -> None:
    session, _ = await auth_service.new_user()
    token = session.tokens.refresh_token
    flipped = token[:-3] + ("A" if token[-3] != "A" else "B") + token[-2:]
    for forged in (flipped, token[:-1], token + "A", token + "=", "tfr_", "x", token[4:], "é" * 9,
                   session.tokens.access_token[:512]):  # fmt: skip
        assert await reason_of(auth_service.refresh(forged)) == "CREDENTIALS_REJECTED"
    elsewhere = auth_service.refresh(token, "elsewhere")
    assert await reason_of(elsewhere) == "CREDENTIALS_REJECTED"
    await auth_service.refresh(token)


async def test_a_session_ends_after_its_life(auth_service: Auth, auth_clock: ManualClock) -> None:
    session, ada = await auth_service.new_user()
    auth_clock.advance(30 * 86_400 + 1)
    refreshed = auth_service.refresh(session.tokens.refresh_token)
    assert await reason_of(refreshed) == "CREDENTIALS_REJECTED"
    page = await auth_service.sessions.ListSessions(
        auth.ListSessionsRequest(), metadata=auth_service.as_(ada)
    )
    assert [s.state for s in page.sessions] == [resources.Session.STATE_EXPIRED]


async def test_a_log_out_is_effective_at_once_and_repeating_it_is_harmless(
    auth_service: Auth,
) -> None:
    session, ada = await auth_service.new_user()
    verifier = await auth_service.verifier()
    request = auth.RevokeSessionRequest(name="sessions/current")
    token = auth_service.as_(ada)
    await auth_service.sessions.RevokeSession(request, metadata=token)
    with pytest.raises(CredentialRevoked):
        verifier.verify(session.tokens.access_token)
    # The identity token that a service has believed before is refused as well.
    refused = auth_service.sessions.RevokeSession(request, metadata=token)
    assert await reason_of(refused) == "CREDENTIAL_REVOKED"
    refreshed = auth_service.refresh(session.tokens.refresh_token)
    assert await reason_of(refreshed) == "CREDENTIALS_REJECTED"


async def test_a_log_out_reaches_a_follower_within_a_second(auth_service: Auth) -> None:
    _, before = await auth_service.new_user()
    _, after = await auth_service.new_user()
    await end(auth_service, before)
    elsewhere = RevocationList(clock=auth_service.clock)
    feed = asyncio.create_task(run_revocation_feed(auth_service.channels, elsewhere))
    try:
        await until(lambda: elsewhere.age_s() is not None, within_s=5)
        assert elsewhere.is_revoked(before.credential)
        assert not elsewhere.is_revoked(after.credential)
        await end(auth_service, after)
        await until(lambda: elsewhere.is_revoked(after.credential), within_s=1)
    finally:
        feed.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await feed


async def until(is_true: Callable[[], bool], *, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not is_true():  # noqa: ASYNC110  short polling, with a deadline
            await asyncio.sleep(0.01)


async def end(auth_service: Auth, principal: Principal) -> None:
    request = auth.RevokeSessionRequest(name=f"sessions/{principal.credential}")
    await auth_service.sessions.RevokeSession(request, metadata=auth_service.as_(principal))


@pytest.mark.parametrize("scopes", ["", "auth.sessions.write"], ids=["none", "another"])
async def test_listing_sessions_needs_its_scope(auth_service: Auth, scopes: str) -> None:
    from dataclasses import replace

    _, ada = await auth_service.new_user()
    poor = replace(ada, scopes=frozenset(scopes.split()))
    with pytest.raises(PermissionDenied) as refusal:
        await auth_service.sessions.ListSessions(
            auth.ListSessionsRequest(), metadata=auth_service.as_(poor)
        )
    assert refusal.value.metadata == {"scope": "auth.sessions.read"}


async def test_sessions_are_listed_newest_first_page_by_page_and_only_one_s_own(
    auth_service: Auth,
) -> None:
    session, ada = await auth_service.new_user()
    email = (
        await auth_service.identities.GetUser(
            auth.GetUserRequest(name="users/me"), metadata=auth_service.as_(ada)
        )
    ).email
    later = [await auth_service.log_in(email) for _ in range(4)]
    names = [one.session.name for one in (session, *later)]
    listed, token = [], ""
    while True:
        page = await auth_service.sessions.ListSessions(
            auth.ListSessionsRequest(page_size=2, page_token=token), metadata=auth_service.as_(ada)
        )
        listed += [one.name for one in page.sessions]
        token = page.next_page_token
        if not token:
            break
        first_token = token
    assert listed == names[::-1]
    _, eve = await auth_service.new_user()
    with pytest.raises(InvalidRequest):
        await auth_service.sessions.ListSessions(
            auth.ListSessionsRequest(page_token=first_token), metadata=auth_service.as_(eve)
        )


async def test_another_s_session_looks_absent(auth_service: Auth) -> None:
    session, _ = await auth_service.new_user()
    _, eve = await auth_service.new_user()
    for name in (session.session.name, "sessions/00000000-0000-7000-8000-000000000000",
                 "sessions/nonsense", session.session.name.upper()):  # fmt: skip
        with pytest.raises(NotFound):
            await auth_service.sessions.RevokeSession(
                auth.RevokeSessionRequest(name=name), metadata=auth_service.as_(eve)
            )
    await auth_service.refresh(session.tokens.refresh_token)
