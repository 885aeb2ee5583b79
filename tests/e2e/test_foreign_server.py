"""`tenfold edge` in front of a server whose author knows nothing of Tenfold."""

import base64
import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from deploy.local.address import free_addresses
from tests.foreign import Edge, Shop, running_edge
from tests.mesh import poll_until

TIMEOUT_S = 30.0
TEA = {"name": "items/tea", "title": "Tea", "stock": "9007199254740993"}
OPEN = "--allow-anonymous"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.compiled(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def port() -> int:
    return free_addresses(1)[0].port


@pytest.fixture(scope="module")
def upstream(shop: Shop, port: int) -> Iterator[str]:
    with shop.serving(port, "reflection"):
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def edge(shop: Shop, upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = tmp_path_factory.mktemp("edge")
    with running_edge(folder, "--descriptors", shop.image, "--upstream", upstream, OPEN) as edge:
        yield edge


def fail(edge: Edge, code: int, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    return edge.client.post("/v1/fail", json={"code": code, **fields}, headers=headers)


# What it serves
def test_it_says_in_one_line_where_it_serves_how_much_and_what_is_behind(edge, upstream):
    [line] = [line for line in edge.said.splitlines() if line.startswith("edge: ")]
    url = str(edge.client.base_url).rstrip("/")
    assert line == (
        f"edge: {url} serves 6 routes of acme.shop.v1 from {upstream}; "
        f"the reference is at {url}/docs"
    )


def test_get_post_and_patch_reach_the_server(edge):
    assert edge.client.get("/v1/items/tea").json() == TEA
    made = edge.client.post("/v1/items", json={"title": "Cup", "stock": 3})
    assert made.json() == {"name": "items/cup", "title": "Cup", "stock": "3"}
    changed = edge.client.patch("/v1/items/cup", json={"stock": None, "title": "Mug"})
    assert changed.json() == {"name": "items/cup", "title": "Mug", "stock": "0"}


def test_a_field_that_only_sounds_like_an_idempotency_key_is_left_alone(edge):
    made = edge.client.post(
        "/v1/items?requestId=7", json={"title": "Pot"}, headers={"Idempotency-Key": "abc"}
    )
    assert made.status_code == 200, made.text
    [create] = [
        operation
        for operation in described(edge)["paths"]["/v1/items"].values()
        if operation["x-rpc"] == "/acme.shop.v1.Shop/CreateItem"
    ]
    assert "requestId" in {parameter.get("name") for parameter in create["parameters"]}


def test_no_identity_and_no_header_of_the_client_reaches_the_server(edge):
    headers = {"Authorization": "Bearer abc", "Cookie": "a=b", "tenfold-identity": "forged"}
    heard = edge.client.get("/v1/heard", headers=headers)
    assert heard.json() == {"names": ["user-agent", "x-request-id"]}


def test_a_server_that_checks_credentials_itself_may_have_them(shop, upstream, tmp_path):
    arguments = ("--descriptors", shop.image, "--upstream", upstream, OPEN)
    listed = {"TENFOLD_EDGE_REQUEST_HEADERS": "authorization"}
    with running_edge(tmp_path, *arguments, environ=listed) as edge:
        heard = edge.client.get("/v1/heard", headers={"Authorization": "Bearer abc"})
    assert heard.json() == {"names": ["authorization", "user-agent", "x-request-id"]}


def test_a_stream_comes_as_events_and_as_lines(edge):
    path = "/v1/items:watch?count=2"
    events = edge.client.get(path, headers={"Accept": "text/event-stream"}).text
    assert [line[6:] for line in events.splitlines() if line.startswith('data: {"name"')] == [
        '{"name":"items/0","title":"","stock":"0"}',
        '{"name":"items/1","title":"","stock":"0"}',
    ]
    assert events.endswith("event: end\ndata: {}\n\n")
    lines = edge.client.get(path).text.splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["items/0", "items/1"]


def test_the_documents_carry_the_name_of_the_contract(edge):
    info = described(edge)["info"]
    assert (info["title"], info["version"]) == ("acme.shop.v1", "v1")
    assert "<title>acme.shop.v1: API reference</title>" in edge.client.get("/docs").text


def test_the_reference_describes_what_is_served_and_asks_for_no_credential(edge):
    document = described(edge)
    operations = [o for item in document["paths"].values() for o in item.values()]
    assert {operation["x-rpc"].rpartition("/")[2] for operation in operations} == {
        "GetItem", "CreateItem", "UpdateItem", "WatchItems", "Fail", "Hear",
    }  # fmt: skip
    assert all(operation["security"] == [] for operation in operations)
    assert "/v1/sessions" not in json.dumps(document)
    [item] = [o for o in operations if o["x-rpc"].endswith("/GetItem")]
    assert item["summary"] == "Finds one item."


def test_a_method_without_an_http_rule_is_not_there_at_all(edge):
    answer = edge.client.post("/acme.shop.v1.Shop/Restock", json={})
    assert (answer.status_code, answer.json()["reason"]) == (404, "ROUTE_NOT_FOUND")


# Errors
@pytest.mark.parametrize(
    ("code", "status", "name"),
    [
        (1, 503, "UNAVAILABLE"),  # CANCELLED, though nobody here asked for it
        (2, 500, "UNKNOWN"),
        (3, 400, "INVALID_ARGUMENT"),
        (4, 504, "DEADLINE_EXCEEDED"),
        (5, 404, "NOT_FOUND"),
        (6, 409, "ALREADY_EXISTS"),
        (7, 403, "PERMISSION_DENIED"),
        (8, 503, "RESOURCE_EXHAUSTED"),
        (9, 400, "FAILED_PRECONDITION"),
        (10, 409, "ABORTED"),
        (11, 400, "OUT_OF_RANGE"),
        (12, 501, "UNIMPLEMENTED"),
        (13, 500, "INTERNAL"),
        (14, 503, "UNAVAILABLE"),
        (15, 500, "DATA_LOSS"),
        (16, 401, "UNAUTHENTICATED"),
    ],
)
def test_every_status_becomes_a_problem_document(edge, code, status, name):
    answer = fail(edge, code, message="it went wrong")
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, name)
    assert problem["request_id"] == answer.headers["x-request-id"]


def packed(*details: Any) -> str:
    status = status_pb2.Status(code=3, message="no such colour")
    for detail in details:
        if isinstance(detail, AnyMessage):
            status.details.append(detail)
        else:
            status.details.add().Pack(detail)
    return base64.b64encode(status.SerializeToString()).decode()


INFO = error_details_pb2.ErrorInfo(
    reason="COLOUR_UNKNOWN", domain="acme.example", metadata={"colour": "blurple"}
)
BAD = error_details_pb2.BadRequest()
BAD.field_violations.add(field="sleep_s", description="must be less")
RETRY = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=7))
UNKNOWN = AnyMessage(type_url="type.googleapis.com/acme.Secret", value=b"\xff\x00")


def test_the_details_that_we_know_are_told_and_others_do_no_harm(edge):
    answer = fail(edge, 3, message="x", details=packed(UNKNOWN, INFO, BAD, RETRY))
    problem = answer.json()
    assert (answer.status_code, problem["reason"]) == (400, "COLOUR_UNKNOWN")
    assert (problem["detail"], problem["details"]) == ("no such colour", {"colour": "blurple"})
    [violation] = problem["violations"]
    assert (violation["field"], violation["pointer"]) == ("sleepS", "#/sleepS")
    assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    "details",
    [
        pytest.param("/////w==", id="no status"),
        pytest.param(packed(UNKNOWN), id="a type that nobody knows"),
        pytest.param(
            packed(AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")),
            id="a known type with bytes that are none of it",
        ),
        pytest.param(packed(error_details_pb2.ErrorInfo(reason="a b/ü\n")), id="an odd reason"),
    ],
)
def test_details_of_any_kind_leave_the_error_what_it_is(edge, details):
    answer = fail(edge, 5, message="no such colour", details=details)
    assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")
    assert answer.json()["detail"] == "no such colour"
    assert httpx.URL(answer.json()["type"]).host == "tenfold.dev"


def test_what_a_bug_says_stays_inside(edge):
    for code in (2, 13, 15):
        assert "hunter2" not in fail(edge, code, message="password=hunter2").text


def test_an_error_before_the_first_message_of_a_stream_has_its_status(edge):
    answer = edge.client.get("/v1/items:watch?code=7", headers={"Accept": "text/event-stream"})
    assert (answer.status_code, answer.json()["code"]) == (403, "PERMISSION_DENIED")


def test_an_error_after_it_is_the_last_event(edge):
    path = "/v1/items:watch?count=1&code=11"
    text = edge.client.get(path, headers={"Accept": "text/event-stream"}).text
    last = text.strip().split("\n\n")[-1].splitlines()
    assert last[0] == "event: error"
    problem = json.loads(last[1].removeprefix("data: "))
    assert (problem["code"], problem["detail"]) == ("OUT_OF_RANGE", "the shelf broke")


def test_a_deadline_ends_the_call(edge):
    answer = fail(edge, 5, sleepS=25, headers={"grpc-timeout": "200m"})
    assert (answer.status_code, answer.json()["code"]) == (504, "DEADLINE_EXCEEDED")


# Its life, and the server's
def test_a_server_that_dies_and_comes_back_is_served_again(shop, tmp_path, free_port):
    arguments = ("--descriptors", shop.image, "--upstream", f"127.0.0.1:{free_port}", OPEN)
    with running_edge(tmp_path, *arguments) as edge:
        for _ in range(2):
            answer = edge.client.get("/v1/items/tea")
            assert (answer.status_code, answer.json()["code"]) == (503, "UNAVAILABLE")
            not_ready = edge.client.get("/readyz")
            assert not_ready.json()["details"] == {"missing": "acme.shop.v1.Shop"}
            assert edge.client.get("/healthz").text == "ok\n"
            with shop.serving(free_port):
                poll_until(lambda: is_ok(edge, "/readyz"), timeout_s=TIMEOUT_S, what="ready")
                poll_until(lambda: is_ok(edge, "/v1/items/tea"), timeout_s=TIMEOUT_S, what="tea")
            poll_until(lambda: not is_ok(edge, "/readyz"), timeout_s=TIMEOUT_S, what="its end")


@pytest.mark.parametrize(("health", "status"), [("SERVING", 200), ("NOT_SERVING", 503)])
def test_a_server_that_tells_its_health_is_believed(shop, tmp_path, free_port, health, status):
    arguments = ("--descriptors", shop.image, "--upstream", f"127.0.0.1:{free_port}", OPEN)
    with shop.serving(free_port, f"health={health}"), running_edge(tmp_path, *arguments) as edge:
        assert edge.client.get("/readyz").status_code == status


def test_ctrl_c_ends_streams_with_a_word_and_the_process_with_exit_0(shop, upstream, tmp_path):
    arguments = ("--descriptors", shop.image, "--upstream", upstream, OPEN)
    with running_edge(tmp_path, *arguments) as edge:
        assert is_ok(edge, "/v1/items/tea")  # and its connection is kept
        with edge.client.stream("GET", "/v1/items:watch?count=1&pauseS=600") as stream:
            lines = stream.iter_lines()
            assert json.loads(next(lines))["name"] == "items/0"
            edge.interrupt()
            last = [line for line in lines if line][-1]
        assert json.loads(last)["error"]["code"] == "UNAVAILABLE"
        assert edge.exit_code() == 0
        assert "Traceback" not in edge.said


def test_a_second_ctrl_c_does_not_wait_for_requests(shop, upstream, tmp_path):
    arguments = ("--descriptors", shop.image, "--upstream", upstream, OPEN)
    with running_edge(tmp_path, *arguments, environ={"TENFOLD_EDGE_DRAIN_S": "600"}) as edge:
        slow = threading.Thread(target=ask_slowly, args=(edge,))
        slow.start()
        poll_until(lambda: peers_of(edge), timeout_s=TIMEOUT_S, what="the call to the server")
        edge.interrupt()
        edge.until_said("draining")
        edge.interrupt()
        assert edge.exit_code() == 0
        slow.join()
        assert "Traceback" not in edge.said


def ask_slowly(edge: Edge) -> None:
    with contextlib.suppress(httpx.HTTPError):
        fail(edge, 5, sleepS=600, headers={"grpc-timeout": "60S"})


# Limits, and what it leaves alone
def test_several_workers_say_once_where_they_serve_and_share_the_limits(shop, upstream, tmp_path):
    arguments = ["--descriptors", str(shop.image), "--upstream", upstream, OPEN, "--workers", "2"]
    limits = {"TENFOLD_EDGE_API_BURST_POINTS": "20", "TENFOLD_EDGE_API_POINTS_PER_S": "0.01"}
    with running_edge(tmp_path, *arguments, environ=limits) as edge:
        edge.until_said('"worker":1')
        url = edge.client.base_url.join("/v1/items/tea")
        statuses = [httpx.get(url).status_code for _ in range(60)]  # a connection each
        assert edge.said.count("edge: ") == 1
        edge.interrupt()
        assert edge.exit_code() == 0
    assert set(statuses) == {200, 429}
    assert 10 <= statuses.count(200) <= 20


def test_an_address_is_limited_without_any_other_server(shop, upstream, tmp_path):
    arguments = ("--descriptors", shop.image, "--upstream", upstream, OPEN)
    limits = {"TENFOLD_EDGE_API_BURST_POINTS": "3", "TENFOLD_EDGE_API_POINTS_PER_S": "0.01"}
    with running_edge(tmp_path, *arguments, environ=limits) as edge:
        answers = [edge.client.get("/v1/items/tea") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[0].headers["ratelimit-policy"] == '"api";q=3;w=300'
    # That is how a mesh says that its quota store is away; here none is missing.
    assert "tenfold-quota-mode" not in answers[0].headers
    assert answers[3].json()["reason"] == "QUOTA_EXCEEDED"


def test_it_asks_nobody_but_its_server(shop, upstream, tmp_path):
    with closing(socket.socket()) as decoy:
        decoy.bind(("127.0.0.1", 0))
        decoy.listen()
        decoy.setblocking(False)
        address = f"127.0.0.1:{decoy.getsockname()[1]}"
        elsewhere = {
            "TENFOLD_VALKEY_URL": f"redis://{address}",
            "TENFOLD_NATS_URL": f"nats://{address}",
            "TENFOLD_LISTEN": address,
            "TENFOLD_DATA": str(tmp_path / "data"),
            "TENFOLD_IDENTITY_FOLDER": str(tmp_path / "identity"),
            "HTTP_PROXY": f"http://{address}",
            "http_proxy": f"http://{address}",
            "grpc_proxy": f"http://{address}",
        }
        arguments = ("--reflect", "--upstream", upstream, OPEN)
        with running_edge(tmp_path, *arguments, environ=elsewhere) as edge:
            for path in ("/v1/items/tea", "/v1/items:watch?count=1", "/readyz", "/docs"):
                assert edge.client.get(path).status_code == 200
            assert peers_of(edge) == {upstream}
        with pytest.raises(BlockingIOError):
            decoy.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["edge-0.out"]


def peers_of(edge: Edge) -> set[str]:
    """Where the IPv4 connections lead that the edge has opened (proc(5), /proc/net/tcp)."""
    folder = Path(f"/proc/{edge.process.pid}")
    links = [os.readlink(entry) for entry in (folder / "fd").iterdir()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for line in (folder / "net/tcp").read_text().splitlines()[1:]]
    own_port = f"{edge.client.base_url.port:04X}"
    remote = [row[2] for row in rows if row[9] in inodes and row[1].split(":")[1] != own_port]
    return {address_of(text) for text in remote}


def address_of(text: str) -> str:
    host, port = text.split(":")
    return f"{socket.inet_ntoa(bytes.fromhex(host)[::-1])}:{int(port, 16)}"


def described(edge: Edge) -> dict[str, Any]:
    document: dict[str, Any] = edge.client.get("/openapi.json").json()
    return document


def is_ok(edge: Edge, path: str) -> bool:
    return edge.client.get(path).status_code == 200
