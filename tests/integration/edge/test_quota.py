"""Quotas as a client of the edge meets them, counted in a real Valkey."""

import asyncio
import json
from dataclasses import dataclass, replace
from functools import partial
from uuid import uuid4

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from edge.config import EdgeConfig
from shared.config import ConfigError
from tests.integration.edge.behind import KNOWN
from tests.integration.edge.quotas import AWAY

PATH = f"/v1/{KNOWN}"
API = ("api", "credential")
SMALL = EdgeConfig(api_points_per_s=0.1, api_burst_points=50, login_points_per_minute=1, drain_s=1)


@pytest.fixture
def own_db(valkey_url: str) -> str:
    """Valkey with a key space of this file's own: other files log in from this address, too."""
    return valkey_url.removesuffix("/0") + "/7"


async def test_calls_are_charged_by_credential_and_refused_with_retry_after(start_edge):
    async with start_edge(SMALL) as edge:
        mine, other = edge.bearer(), edge.bearer()
        first = await edge.client.get(PATH, headers=mine)
        assert first.headers["ratelimit-policy"] == '"api";q=50;w=500, "api-tenant";q=40000;w=2'
        assert first.headers["ratelimit"] == '"api";r=49;t=490'
        answers = [await edge.client.get(PATH, headers=mine) for _ in range(50)]
        assert [answer.status_code for answer in answers] == [200] * 49 + [429]
        refused = answers[-1]
        assert refused.json()["reason"] == "QUOTA_EXCEEDED"
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert (await edge.client.get(PATH, headers=other)).status_code == 200


async def test_an_invalid_call_keeps_one_point_and_a_replay_too(start_edge):
    body = {"toAccount": KNOWN, "amount": {"currencyCode": "EUR", "minorUnits": "5"}}
    config = replace(SMALL, payments_burst_points=100, payments_points_per_s=0.01)
    async with start_edge(config) as edge:
        headers = {**edge.bearer(), "idempotency-key": str(uuid4())}

        async def left(answer_of: dict[str, object], status: int) -> str:
            path = f"{PATH}:transferFunds"  # costs 10
            answer = await edge.client.post(path, json=answer_of, headers=headers)
            assert answer.status_code == status
            return answer.headers["ratelimit"].partition(";t=")[0]

        assert await left({"no": 1}, 400) == '"payments";r=99'
        assert await left(body, 200) == '"payments";r=89'
        assert await left(body, 200) == '"payments";r=88'  # replayed
        answer = await edge.client.get(PATH, headers=headers)
        assert answer.headers["ratelimit"].startswith('"api";r=49;')  # another bucket


async def test_a_refused_call_of_a_usual_bucket_gives_back_all_but_one_point(start_edge):
    async with start_edge(replace(SMALL, api_burst_points=100)) as edge:
        headers = edge.bearer()
        answer = await edge.client.get("/v1/accounts?pageSize=-1", headers=headers)
        assert answer.status_code >= 400
        assert answer.headers["ratelimit"].startswith('"api";r=99;')


async def test_logging_in_is_counted_by_address_and_a_wrong_password_costs_in_full(start_edge):
    config = replace(SMALL, login_burst_points=30, trusted_hops=1)
    async with start_edge(config) as edge:

        async def log_in(address: str, **more: str) -> int:
            headers = {"x-forwarded-for": f"10.0.0.1, {address}", **more}
            body = {"email": "a@b.example", "password": "wrong"}
            return (await edge.client.post("/v1/sessions", json=body, headers=headers)).status_code

        block = f"198.51.{uuid4().int % 256}"
        codes = [await log_in(f"{block}.{number}", **edge.bearer()) for number in range(4)]
        assert codes == [401, 401, 401, 429]
        assert await log_in(f"203.0.{uuid4().int % 256}.1") == 401
        six = f"2001:db8:{uuid4().int % 65536:x}:1"
        assert [await log_in(f"{six}::{number}") for number in range(4)] == [401, 401, 401, 429]


async def test_a_forged_forwarded_for_does_not_dodge_the_quota(start_edge, own_db):
    async with start_edge(replace(SMALL, login_burst_points=30), valkey=own_db) as edge:
        body = {"email": "a@b.example", "password": "wrong"}
        codes = []
        for number in range(8):
            headers = {"x-forwarded-for": f"203.0.113.{number}", "x-real-ip": f"1.2.3.{number}"}
            answer = await edge.client.post("/v1/sessions", json=body, headers=headers)
            codes.append(answer.status_code)
        assert 429 in codes


async def test_with_valkey_away_the_edge_serves_and_says_so(start_edge):
    async with start_edge(SMALL, valkey=AWAY) as edge:
        answer = await edge.client.get(PATH, headers=edge.bearer())
        assert answer.status_code == 200
        assert answer.headers["tenfold-quota-mode"] == "local"
        headers = edge.bearer()
        codes = [(await edge.client.get(PATH, headers=headers)).status_code for _ in range(55)]
        assert codes.count(200) == 50


async def test_one_address_cannot_take_the_whole_edge(start_edge):
    config = EdgeConfig(address_points_per_s=5, drain_s=1)
    async with start_edge(config, is_ready=False) as edge:
        codes = [(await edge.client.get("/healthz")).status_code for _ in range(20)]
        assert 429 in codes


async def policy_of(edge, headers) -> tuple[int, str]:
    answer = await edge.client.get(PATH, headers=headers)
    return answer.status_code, answer.headers["ratelimit-policy"].split(",")[0]


async def until_policy(edge, headers, policy: str, status_code: int = 0) -> None:
    """The policy of the caller's own bucket is this, and perhaps the status that."""
    async with asyncio.timeout(10):
        while True:
            status, seen = await policy_of(edge, headers)
            if seen == policy and status_code in (0, status):
                return
            await asyncio.sleep(0.05)


async def test_plans_of_a_file_are_obeyed_and_change_without_a_restart(start_edge, tmp_path):
    file = tmp_path / "plans.toml"
    file.write_text('[plans.default.api]\ncredential = {rate = "1/min", burst = 70}\n')
    async with start_edge(SMALL, quota_plans=file) as edge:
        headers = edge.bearer()
        assert (await policy_of(edge, headers))[1] == '"api";q=70;w=4200'
        file.write_text('[plans.default.api]\ncredential = {rate = "1/min", burst = 80}\n')
        await until_policy(edge, headers, '"api";q=80;w=4800')
        file.write_text("[plans.default.api]\ncredential = 1\n")  # wrong: the last good one stays
        await asyncio.sleep(1.5)
        assert (await policy_of(edge, headers))[1] == '"api";q=80;w=4800'


async def test_each_tenant_has_its_plan(start_edge, tmp_path):
    file = tmp_path / "plans.toml"
    gold = '[plans.gold.api]\ncredential = {rate = "1/min", burst = 70}\ntenant = "unlimited"\n'
    file.write_text(f'[tenants]\nacme = "gold"\n{gold}')
    async with start_edge(SMALL, quota_plans=file) as edge:
        answer = await edge.client.get(PATH, headers=edge.bearer(tenant="acme"))
        assert answer.headers["ratelimit-policy"] == '"api";q=70;w=4200'
        assert (await policy_of(edge, edge.bearer()))[1] == '"api";q=50;w=500'


async def test_a_wrong_file_of_plans_ends_the_start_and_names_the_key(start_edge, tmp_path):
    file = tmp_path / "plans.toml"
    file.write_text('[plans.gold.apo]\ntenant = "unlimited"\n')
    with pytest.raises(ConfigError, match=r"plans.gold.apo.tenant: no contract names this bucket"):
        async with start_edge(SMALL, quota_plans=file):
            pass


@dataclass(frozen=True)
class Said:
    """What a command printed, or why it stopped."""

    out: str
    error: str


async def tenfold(url: str, *words: str) -> Said:
    invoke = partial(CliRunner().invoke, app, ["quota", *words], env={"TENFOLD_VALKEY_URL": url})
    done = await asyncio.to_thread(invoke)
    return Said(done.stdout, str(done.exception or ""))


async def run(url: str, *words: str) -> str:
    said = await tenfold(url, *words)
    assert not said.error
    return said.out


async def until_shown(url: str) -> None:
    """An edge tells what it obeys within its first second."""
    async with asyncio.timeout(10):
        while (await tenfold(url, "show")).error:  # noqa: ASYNC110 - it is another process's
            await asyncio.sleep(0.05)


async def test_an_operator_shows_sets_and_resets_while_edges_run(start_edge, own_db):
    async with start_edge(SMALL, valkey=own_db) as one, start_edge(SMALL, valkey=own_db) as two:
        headers = one.bearer(sid="quota-command")
        await until_policy(one, headers, '"api";q=50;w=500')
        for _ in range(60):
            await one.client.get(PATH, headers=headers)
        assert (await two.client.get(PATH, headers=headers)).status_code == 429
        shown = json.loads(await run(own_db, "show", "--credential", "quota-command", "--json"))
        assert shown["edges"] == 2
        [left] = [row for row in shown["left"] if (row["bucket"], row["level"]) == API]
        assert left["remaining_points"] <= 2
        await run(own_db, "reset", "--credential", "quota-command")
        await until_policy(two, headers, '"api";q=50;w=500', status_code=200)
        # What one operator sets, every edge obeys.
        limit = ("--bucket", "api", "--level", "credential")
        await run(own_db, "set", *limit, "--rate", "1/min", "--burst", "99")
        for edge in (one, two):
            await until_policy(edge, headers, '"api";q=99;w=5940')
        assert "default          api          credential  1/min burst 99  (set)" in await run(
            own_db, "show"
        )
        await run(own_db, "set", *limit, "--unset")
        await until_policy(two, headers, '"api";q=50;w=500')


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("set", "--bucket", "apo", "--level", "tenant", "--unlimited"), "no bucket 'apo': api"),
        (("set", "--bucket", "api", "--level", "user", "--unlimited"), "'user' is none of"),
        (("set", "--bucket", "api", "--level", "tenant", "--rate", "1/w"), "'1/w' must be points"),
        (("set", "--bucket", "api", "--level", "tenant", "--rate", "1/s"), "burst: None must be"),
        (("set", "--tenant", "acme", "--plan", "golf"), "no plan 'golf': default"),
        (("set",), "either --bucket and --level, or --tenant"),
    ],
)
async def test_a_wrong_command_changes_nothing_and_says_what_is_wrong(
    start_edge, own_db, words, named
):
    async with start_edge(SMALL, valkey=own_db):
        await until_shown(own_db)
        assert named in (await tenfold(own_db, *words)).error
        assert "(set)" not in await run(own_db, "show")


async def test_without_an_edge_or_a_valkey_a_command_says_so(own_db):
    nobody = own_db.removesuffix("7") + "9"
    assert "No edge has told" in (await tenfold(nobody, "show")).error
    assert "Valkey does not answer" in (await tenfold(AWAY, "show")).error
