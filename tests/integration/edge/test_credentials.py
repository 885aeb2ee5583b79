"""Who asks: access tokens and API keys at the edge, and what is refused."""

import asyncio
import base64
import json
import time
from uuid import uuid4

import pytest
from tenfold.auth.v1 import auth_service_pb2

from edge.auth import has_valid_checksum
from edge.config import EdgeConfig
from tests.integration.edge.behind import KNOWN, Behind
from tests.unit.edge.keys import make_key

PATH = f"/v1/{KNOWN}"


def jwt_part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


async def until_status(edge, status: int, headers: dict[str, str]) -> None:
    until = time.monotonic() + 10
    while (await edge.client.get(PATH, headers=headers)).status_code != status:
        assert time.monotonic() < until
        await asyncio.sleep(0.02)


async def test_no_credential_is_401_and_a_missing_scope_403(edge):
    missing = await edge.client.get(PATH)
    assert (missing.status_code, missing.json()["reason"]) == (401, "CREDENTIAL_MISSING")
    scopeless = await edge.client.get(PATH, headers=edge.bearer(scope="media.read"))
    assert (scopeless.status_code, scopeless.json()["reason"]) == (403, "SCOPE_MISSING")


async def test_a_user_may_not_call_what_is_for_operators(edge):
    answer = await edge.client.get("/v1/trialBalance", headers=edge.bearer(scope="ledger.audit"))
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": 1},
        {"iat": 99999999999, "exp": 99999999999},
        {"exp": 99999999999},
        {"nbf": 99999999999},
        {"iss": "tenfold-auth.evil"},
        {"aud": "other"},
        {"aud": ["tenfold", "other"]},
        {"header": {"alg": "none"}},
        {"header": {"alg": "HS256"}},
        {"header": {"kid": "../../etc/passwd"}},
        {"header": {"kid": "x" * 2000}},
        {"header": {"jku": "http://127.0.0.1/jwks"}},
        {"header": {"crit": ["b64"], "b64": False}},
        {"header": {"typ": "refresh+jwt"}},
    ],
    ids=lambda claims: json.dumps(claims)[:40],
)
async def test_a_token_that_is_not_ours_for_this_use_is_401(edge, claims):
    answer = await edge.client.get(PATH, headers=edge.bearer(**claims))
    assert answer.status_code == 401


async def test_truncated_extended_and_unsigned_tokens_are_401(edge):
    token = edge.behind.tokens.token()
    head, body, _ = token.split(".")
    none = f"{jwt_part({'alg': 'none', 'typ': 'at+jwt', 'kid': 'test-key'})}.{body}."
    for bad in (token[:-2], token + "AA", f"{head}.{body}.", none.rstrip("."), "a.b.c", "x"):
        answer = await edge.client.get(PATH, headers={"authorization": f"Bearer {bad}"})
        assert answer.status_code == 401, bad


async def test_unknown_key_ids_make_the_edge_ask_auth_at_most_once_a_minute(edge):
    await edge.client.get(PATH, headers=edge.bearer(header={"kid": "unknown"}))
    before = edge.behind.tokens.asked
    for number in range(10):
        headers = edge.bearer(header={"kid": f"unknown-{number}"})
        assert (await edge.client.get(PATH, headers=headers)).status_code == 401
    assert edge.behind.tokens.asked == before


async def test_two_credentials_or_another_scheme_are_400(edge):
    token = edge.behind.tokens.token()
    two = [("authorization", f"Bearer {token}"), ("authorization", f"Bearer {token}")]
    for headers in (
        two,
        {"authorization": f"Bearer {token}, Bearer {token}"},
        {"authorization": "Basic dXNlcjpwYXNz"},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {token} {token}"},
    ):
        assert (await edge.client.get(PATH, headers=headers)).status_code == 400


async def test_a_credential_in_the_query_is_never_taken(edge):
    token = edge.behind.tokens.token()
    for name in ("access_token", "token", "authorization"):
        answer = await edge.client.get(PATH, params={name: token})
        assert answer.status_code == 401


async def test_identity_headers_from_outside_never_cross(edge):
    subject = uuid4()
    forged = {
        "tenfold-identity": edge.behind.edge_signer.token_for(edge.behind.edge_signer.own),
        "x-user-id": "other",
        "x-tenant-id": "other",
        "X_User_Id": "other",
        "x-roles": "admin",
        "baggage": "user=admin",
        "grpc-metadata-tenfold-identity": "other",
    }
    answer = await edge.client.get(PATH, headers={**edge.bearer(subject=subject), **forged})
    assert answer.json()["owner"] == f"users/{subject}"
    metadata = edge.behind.ledger.contexts[-1].metadata
    assert "other" not in metadata.values()
    assert "baggage" not in metadata
    alone = await edge.client.get(PATH, headers=forged)
    assert alone.status_code == 401


async def test_an_api_key_acts_for_its_owner_and_is_asked_for_once(edge):
    key, keys = make_key(), edge.behind.keys
    assert has_valid_checksum(key)
    keys.known[key] = auth_service_pb2.ResolveApiKeyResponse(
        principal_kind="user",
        subject=str(uuid4()),
        tenant="default",
        scopes=["ledger.read"],
        credential=str(uuid4()),
    )
    keys.known[key].expire_time.FromSeconds(int(time.time()) + 600)
    before, headers = keys.asked, {"authorization": f"Bearer {key}"}
    answers = await asyncio.gather(*(edge.client.get(PATH, headers=headers) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert keys.asked == before + 1
    await edge.behind.sessions.revoke(keys.known[key].credential)
    await until_status(edge, 401, headers)


async def test_junk_keys_are_refused_without_asking_auth_and_unknown_ones_asked_once(edge):
    before = edge.behind.keys.asked
    junk = {"authorization": "Bearer tf_user_live_0000000000000000000000000000AAAAAA"}
    assert (await edge.client.get(PATH, headers=junk)).status_code == 401
    assert edge.behind.keys.asked == before
    unknown = {"authorization": f"Bearer {make_key()}"}
    for _ in range(5):
        assert (await edge.client.get(PATH, headers=unknown)).status_code == 401
    assert edge.behind.keys.asked == before + 1


async def test_cached_keys_serve_while_auth_is_away_until_the_feed_is_too_old(start_edge):
    behind = Behind()
    await behind.start()
    config = EdgeConfig(revocations_stale_s=3.0, drain_s=1.0)
    async with start_edge(config, behind=behind) as edge:
        headers = edge.bearer()
        assert (await edge.client.get(PATH, headers=headers)).status_code == 200
        await behind.stop()
        away = await edge.client.get(PATH, headers=headers)
        assert (away.status_code, away.json()["reason"]) == (503, "UNAVAILABLE")
        async with asyncio.timeout(30):
            while away.json()["reason"] != "CREDENTIALS_UNCHECKED":
                await asyncio.sleep(0.05)
                away = await edge.client.get(PATH, headers=headers)
        assert away.headers["retry-after"] == "1"
        assert (await edge.client.get("/readyz")).status_code == 503
        await behind.restart()
        await until_status(edge, 200, headers)
    await behind.stop()
