"""Wrong and hostile requests over REST: a 4xx that names the field, and nothing changed."""

import base64
import json
import secrets
from dataclasses import dataclass

import httpx
import pytest

from tests.mesh import Mesh, poll_until

PROBLEM = "application/problem+json"
FILM = base64.b64encode(b"film.mp4").decode()


@dataclass(frozen=True)
class World:
    """Two users' accounts with money in them, and the operator's cash."""

    mesh: Mesh
    token: str
    account: str
    other_account: str
    cash: str

    @property
    def headers(self) -> dict[str, str]:
        """The first user's credential."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def operator(self) -> dict[str, str]:
        """The operator's credential."""
        return {"Authorization": f"Bearer {self.mesh.admin_key}"}

    def transfer(self, content: bytes, **headers: str) -> httpx.Response:
        """Ask for a transfer with these bytes as body."""
        sent = {"Content-Type": "application/json", "Idempotency-Key": key(), **headers}
        return self.mesh.post(
            f"/v1/{self.account}:transferFunds", content=content, headers={**self.headers, **sent}
        )

    def snapshot(self) -> object:
        """Everything that a refused request could have changed."""
        totals = self.mesh.get("/v1/trialBalance", headers=self.operator).json()["totals"]
        paths = (f"/v1/{self.account}/balance", "/v1/accounts", "/v1/videos", "/v1/apiKeys")
        mine = [self.mesh.get(path, headers=self.headers).json() for path in paths]
        return totals, mine


def key() -> str:
    return secrets.token_hex(8)


@pytest.fixture(scope="module")
def world(mesh: Mesh, sign_in) -> World:
    tokens = [sign_in(mesh), sign_in(mesh)]
    operator = {"Authorization": f"Bearer {mesh.admin_key}"}

    def account(headers: dict[str, str], **body: object) -> str:
        asked, sent = {"currencyCode": "EUR", **body}, {**headers, "Idempotency-Key": key()}
        answer = mesh.post("/v1/accounts", json=asked, headers=sent)
        return answer.json()["name"]

    own, other = (account({"Authorization": f"Bearer {token}"}) for token in tokens)
    cash = account(operator, normalSide="SIDE_DEBIT", mayOverdraw=True)
    world = World(mesh, tokens[0], own, other, cash)
    assert posted(world, own, key()).status_code == 200
    return world


def posted(world: World, account: str, request_id: str) -> httpx.Response:
    """Deposit 50.00 into an account."""
    amount = {"currencyCode": "EUR", "minorUnits": "5000"}
    entries = [
        {"account": world.cash, "side": "SIDE_DEBIT", "amount": amount},
        {"account": account, "side": "SIDE_CREDIT", "amount": amount},
    ]
    return world.mesh.post(
        "/v1/transactions",
        json={"entries": entries},
        headers={**world.operator, "Idempotency-Key": request_id},
    )


def transfer_body(world: World, **changes: object) -> bytes:
    body = {
        "toAccount": world.other_account,
        "amount": {"currencyCode": "EUR", "minorUnits": "1"},
        **changes,
    }
    return json.dumps(body).encode()


def amount(minor_units: object, currency: str = "EUR") -> dict[str, object]:
    return {"amount": {"currencyCode": currency, "minorUnits": minor_units}}


BAD_FIELDS = {
    "zero": (amount("0"), "amount"),
    "negative": (amount("-1"), "amount"),
    "2^63": (amount(str(2**63)), "minorUnits"),
    "2^63 bare": (amount(2**63), "minorUnits"),
    "fraction": (amount(1.5), "minorUnits"),
    "words": (amount("ten"), "minorUnits"),
    "boolean": (amount(True), "minorUnits"),
    "currency in lower case": (amount("1", "eur"), "currencyCode"),
    "unknown field": ({"owner": "users/x"}, "owner"),
    "wrong type": ({"toAccount": {"a": 1}}, "toAccount"),
    "path parts": ({"toAccount": "accounts/../../etc/passwd"}, "toAccount"),
    "SQL": ({"toAccount": "accounts/' OR 1=1 --"}, "toAccount"),
    "10 KB name": ({"toAccount": "accounts/" + "a" * 10_000}, "toAccount"),
    "NUL": ({"description": "a\0b"}, "description"),
    "long text": ({"description": "a" * 201}, "description"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_wrong_field_is_named_and_moves_no_money(world: World, case: str) -> None:
    changes, field = BAD_FIELDS[case]
    before = world.snapshot()
    answer = world.transfer(transfer_body(world, **changes))
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"].startswith(PROBLEM)
    problem = answer.json()
    assert field in json.dumps(problem.get("violations", problem))
    assert problem["request_id"]
    assert "Traceback" not in answer.text
    assert world.snapshot() == before


BAD_BODIES = {
    "malformed": b'{"toAccount": ',
    "trailing garbage": b"{} {}",
    "no object": b"[1, 2]",
    "broken UTF-8": b'{"description": "\xff\xfe"}',
    "lone surrogate": b'{"description": "\\ud800"}',
    "duplicate keys": b'{"description": "a", "description": "b"}',
    "two spellings": b'{"toAccount": "a", "to_account": "b"}',
    "deep nesting": b"[" * 100_000,
    "deep objects": b'{"amount":' * 5_000,
    "NaN": b'{"amount": {"minorUnits": NaN}}',
    "1e400": b'{"amount": {"minorUnits": 1e400}}',
    "10 MB": b'{"description": "' + b"a" * 10_000_000 + b'"}',
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_body_that_is_no_request_is_refused(world: World, case: str) -> None:
    before = world.snapshot()
    try:
        answer = world.transfer(BAD_BODIES[case])
    except httpx.WriteError:  # refused, and closed, before all of it was sent
        answer = None
    if answer is not None:
        assert answer.status_code in (400, 413), answer.text
        assert answer.headers["content-type"].startswith(PROBLEM)
    assert world.snapshot() == before


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/v1/accounts?pageSize=-1", "pageSize"),
        ("/v1/accounts?pageSize=many", "pageSize"),
        ("/v1/accounts?pageToken=junk", "pageToken"),
        ("/v1/accounts?pageSize=1&pageSize=2", "pageSize"),
        ("/v1/accounts?tenant=other", "tenant"),
        ("/v1/accounts/not-an-id", "name"),
        ("/v1/dailySums?firstDay=2026-02-30&lastDay=2026-03-01", "firstDay"),
        ("/v1/dailySums?firstDay=2026-03-02&lastDay=2026-03-01", "Day"),
    ],
)
def test_a_wrong_parameter_is_named(world: World, path: str, named: str) -> None:
    answer = world.mesh.get(path, headers=world.headers)
    assert answer.status_code in (400, 404), answer.text
    assert answer.headers["content-type"].startswith(PROBLEM)
    assert answer.status_code == 404 or named in answer.text


def test_a_page_token_is_worth_nothing_to_another_user(world: World, sign_in) -> None:
    for _ in range(2):
        body = {"currencyCode": "EUR"}
        world.mesh.post(
            "/v1/accounts", json=body, headers={**world.headers, "Idempotency-Key": key()}
        )
    page = world.mesh.get("/v1/accounts?pageSize=1", headers=world.headers).json()
    stranger = {"Authorization": f"Bearer {sign_in(world.mesh)}"}
    params = {"pageToken": page["nextPageToken"]}
    answer = world.mesh.get("/v1/accounts", headers=stranger, params=params)
    assert answer.status_code == 400
    assert "pageToken" in answer.text


def test_a_key_belongs_to_one_request_whatever_its_shard(world: World) -> None:
    request_id = key()
    first = posted(world, world.account, request_id)
    before = world.snapshot()
    again = posted(world, world.account, request_id)
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    other = posted(world, world.other_account, request_id)
    assert (other.status_code, other.json()["reason"]) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert world.snapshot() == before


@pytest.mark.parametrize("bad_key", ["", "k" * 256], ids=["none", "256 characters"])
def test_a_keyed_call_needs_a_key_of_the_right_shape(world: World, bad_key: str) -> None:
    before = world.snapshot()
    answer = world.transfer(transfer_body(world), **{"Idempotency-Key": bad_key})
    assert answer.status_code == 400
    assert "Idempotency-Key" in answer.text
    assert world.snapshot() == before


def unsigned(world: World) -> str:
    """The user's own claims under "alg": "none"."""
    header = base64.urlsafe_b64encode(b'{"alg":"none","typ":"at+jwt"}').rstrip(b"=").decode()
    return f"{header}.{world.token.split('.')[1]}."


def test_credentials_that_are_none_are_refused(world: World) -> None:
    tokens = ["junk", "a.b.c", unsigned(world), world.token[:-4], "tf_live_" + "a" * 40]
    for token in tokens:
        answer = world.mesh.get("/v1/accounts", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 401, token[:20]
    two = [("Authorization", f"Bearer {world.token}")] * 2
    assert world.mesh.get("/v1/accounts", headers=two).status_code == 400
    in_query = world.mesh.get("/v1/accounts", params={"access_token": world.token})
    assert in_query.status_code in (400, 401)


def test_identity_headers_from_outside_have_no_effect(world: World) -> None:
    forged = {"tenfold-identity": "x", "x-user-id": "admin", "x-tenant-id": "other"}
    assert world.mesh.get("/v1/accounts", headers=forged).status_code == 401
    own = world.mesh.get("/v1/accounts", headers={**world.headers, **forged})
    assert world.account in own.text


def tus(world: World, method: str, path: str, content: bytes = b"", **headers: str):
    sent = {"Tus-Resumable": "1.0.0", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return world.mesh.request(method, path, content=content, headers={**world.headers, **sent})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 400),
        ({"Upload_Length": "-1"}, 400),
        ({"Upload_Length": "ten"}, 400),
        ({"Upload_Length": str(10**15)}, 413),
        ({"Upload_Length": "10", "Upload_Metadata": "filename !!!"}, 400),
        ({"Upload_Length": "10", "Upload_Metadata": f"filename {FILM},filename {FILM}"}, 400),
        ({"Upload_Length": "10", "Tus_Resumable": "0.2.0"}, 412),
    ],
    ids=["absent", "negative", "words", "huge", "base64", "twice", "version"],
)
def test_an_upload_that_cannot_be_is_not_begun(world: World, headers, status: int) -> None:
    answer = tus(world, "POST", "/v1/files", **headers)
    assert answer.status_code == status, answer.text


def test_wrong_bytes_leave_an_upload_as_it_was(world: World) -> None:
    traversal = base64.b64encode("../../x\r\nSet-Cookie: a\u202e".encode()).decode()
    created = tus(
        world, "POST", "/v1/files", Upload_Length="10", Upload_Metadata=f"filename {traversal}"
    )
    path = "/v1/files/" + created.headers["location"].rpartition("/")[2]
    octets = "application/offset+octet-stream"
    wrong = base64.b64encode(b"\0" * 20).decode()
    tries = [
        ({"Upload_Offset": "5", "Content_Type": octets}, 409),
        ({"Upload_Offset": "-1", "Content_Type": octets}, 400),
        ({"Upload_Offset": "0", "Content_Type": "text/plain"}, 415),
        ({"Upload_Offset": "0", "Content_Type": octets, "Upload_Checksum": f"sha1 {wrong}"}, 460),
    ]
    for headers, status in tries:
        answer = tus(world, "PATCH", path, b"01234", **headers)
        assert answer.status_code == status, (headers, answer.text)
        assert tus(world, "HEAD", path).headers["upload-offset"] == "0"
    upload = world.mesh.get(f"/v1/uploads/{path.rpartition('/')[2]}", headers=world.headers)
    name = upload.json()["displayName"]
    assert "/" not in name or name == "../../x"
    assert not set(name) & set("\r\n\0\u202e")


@pytest.mark.parametrize(
    "content",
    [
        b"just some text",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"\0\0\0\x20ftypisom" + b"\0" * 50,
    ],
    ids=["text", "play-list", "truncated"],
)
def test_what_is_no_film_fails_with_a_reason(world: World, content: bytes) -> None:
    created = tus(world, "POST", "/v1/files", Upload_Length=str(len(content)))
    path = "/v1/files/" + created.headers["location"].rpartition("/")[2]
    octets = "application/offset+octet-stream"
    done = tus(world, "PATCH", path, content, Upload_Offset="0", Content_Type=octets)
    assert done.status_code == 204
    name = done.headers["upload-video"]

    def failed() -> dict[str, object] | None:
        video = world.mesh.get(f"/v1/{name}", headers=world.headers).json()
        return video["failure"] if video["state"] == "STATE_FAILED" else None

    failure = poll_until(failed, timeout_s=30, what="a refused film")
    assert failure["reason"] == "ERROR_REASON_NOT_A_VIDEO"
    assert "root:" not in json.dumps(failure)
