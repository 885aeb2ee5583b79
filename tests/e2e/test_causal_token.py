"""A client keeps the last Causal-Token that it was given, and sends it along."""

import secrets
import time

import httpx
import pytest

from shared.causal import Seen
from tests.mesh import Mesh

DAY = time.strftime("%Y-%m-%d", time.gmtime())


@pytest.fixture(scope="module")
def bearer(mesh: Mesh, sign_in) -> dict[str, str]:
    return {"Authorization": f"Bearer {sign_in(mesh)}"}


def run_report(mesh: Mesh, bearer: dict[str, str], **headers: str) -> httpx.Response:
    sent = {**bearer, "Idempotency-Key": secrets.token_hex(8), **headers}
    body = {"firstDay": DAY, "lastDay": DAY}
    answered = mesh.post("/v1/reportRuns", json=body, headers=sent)
    assert answered.status_code == 200, answered.text
    return answered


def test_a_write_brings_a_token_that_leads_the_next_read_to_it(mesh, bearer):
    written = run_report(mesh, bearer)
    token = written.headers["causal-token"]
    assert [place.partition(".")[0] for place in Seen.of_token(token).positions] == ["reporting"]
    path = f"/v1/{written.json()['name']}"
    read = mesh.get(path, headers={**bearer, "Causal-Token": token})
    assert read.status_code == 200
    assert "causal-token" not in read.headers


def test_a_token_grows_with_each_write_and_joins_what_came_before(mesh, bearer):
    first = run_report(mesh, bearer).headers["causal-token"]
    other = first.replace("reporting.", "media.", 1)
    token = run_report(mesh, bearer, **{"Causal-Token": other}).headers["causal-token"]
    services = {place.partition(".")[0] for place in Seen.of_token(token).positions}
    assert services == {"reporting", "media"}


def test_an_upload_brings_one_too(mesh, bearer):
    tus = {**bearer, "Tus-Resumable": "1.0.0"}
    sizes = {"Upload-Length": "4", "Upload-Metadata": "filename ZmlsbS5tcDQ="}
    made = mesh.post("/v1/files", headers={**tus, **sizes})
    path = httpx.URL(made.headers["location"]).path
    kind = {"Content-Type": "application/offset+octet-stream", "Upload-Offset": "0"}
    patched = mesh.request("PATCH", path, headers={**tus, **kind}, content=b"film")
    assert patched.status_code == 204, patched.text
    assert "media" in patched.headers["causal-token"]


def test_nothing_that_sees_money_gives_a_token(mesh, bearer):
    headers = {**bearer, "Idempotency-Key": secrets.token_hex(8)}
    opened = mesh.post("/v1/accounts", json={"currencyCode": "EUR"}, headers=headers)
    assert opened.status_code == 200, opened.text
    assert "causal-token" not in opened.headers


@pytest.mark.parametrize("token", ["nonsense", "1.media.3.1.7", "a" * 2000])
def test_what_is_no_token_is_a_400_that_names_it(mesh, bearer, token):
    refused = mesh.get("/v1/reportRuns", headers={**bearer, "Causal-Token": token})
    assert refused.status_code == 400
    assert "causal-token" in str(refused.json()["violations"])


def test_a_forged_position_costs_its_sender_nothing_but_a_replica(mesh, bearer):
    path = f"/v1/{run_report(mesh, bearer).json()['name']}"
    forged = "1.reporting.0.ffffffff.7fffffffffffffff.ffffffffffff"
    read = mesh.get(path, headers={**bearer, "Causal-Token": forged})
    assert read.status_code == 200
