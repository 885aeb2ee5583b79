"""Headers that cross, and those that never do, over real sockets."""

import json

import pytest

from edge.contracts import ContractError
from tests.integration.edge.wire import Connection

NOTE = "/v1/rooms/den/note"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def sent(edge, *lines: str, target: str = NOTE, method: str = "GET", body: bytes = b""):
    """The metadata that a request with these header lines became."""
    connection = Connection(edge.port)
    try:
        answer = await connection.ask(method, target, lines, body)
    finally:
        connection.close()
    assert answer.status == 200, answer.body
    return edge.stranger.metadata


async def test_what_the_contract_lists_enters_in_any_case_of_its_name(foreign_edge):
    metadata = await sent(foreign_edge, "ACCEPT-Language: de", "x-fLAVOUR: vanilla, mint")
    assert (metadata["accept-language"], metadata["x-flavour"]) == ("de", "vanilla, mint")


async def test_a_header_that_comes_twice_enters_as_one_value(foreign_edge):
    metadata = await sent(foreign_edge, "X-Flavour: a", "X-Flavour: b", "x-flavour: c")
    assert metadata["x-flavour"] == "a, b, c"


@pytest.mark.parametrize(
    "line",
    [
        *("X-User-Id: 1", "x-tenant-id: 1", "X-Roles: admin", "X-Internal-User: 1"),
        *("Tenfold-Identity: t", "TENFOLD-IDENTITY: t", "tenfold_identity: t"),
        *("Tenfold-Identity-Bin: dA==", "x_flavour: a", "X-Flavour-Bin: YQ==", "X.Flavour: a"),
        *("Grpc-Status: 0", "grpc-tags-bin: YQ==", "Grpc-Encoding: gzip", "grpc-message: a"),
        *("Http-Method: DELETE", "http-path-room: attic", "http-header-x: 1"),
        *("Cookie: a=b", "Authorization: Basic YTpi", "Proxy-Authorization: Basic YTpi"),
        *("X-Forwarded-For: 1.2.3.4", "Forwarded: for=1.2.3.4", "X-Real-Ip: 1.2.3.4"),
        *("Keep-Alive: 5", "Via: 1.1 a", "TE: trailers", "Baggage: user=1", "X-Colour: red"),
    ],
)
async def test_nothing_else_enters_under_any_name(foreign_edge, line):
    before = set(await sent(foreign_edge))
    metadata = await sent(foreign_edge, line)
    assert set(metadata) == before
    assert not set(metadata.values()) & {line.partition(": ")[2]}


async def test_a_connection_header_neither_takes_out_nor_lets_in(foreign_edge):
    metadata = await sent(foreign_edge, "Connection: x-flavour, x-user-id", "X-Flavour: a")
    assert metadata["x-flavour"] == "a"
    assert "connection" not in metadata


async def test_settings_let_in_and_out_for_every_method(start_foreign_edge):
    async with start_foreign_edge(
        request_headers="X-Tint, authorization", response_headers="x-hue"
    ) as edge:
        edge.stranger.reset()
        edge.stranger.answers = (("x-hue", "deep"), ("x-colour", "red"))
        answer = await edge.client.get(
            NOTE, headers={"x-tint": "1", "authorization": "Basic YTpi", "x-flavour": "mint"}
        )
        assert {"x-tint": "1", "authorization": "Basic YTpi", "x-flavour": "mint"}.items() <= (
            edge.stranger.metadata.items()
        )
        assert (answer.headers["x-hue"], answer.headers["x-colour"]) == ("deep", "red")
        for target in ("/v1/files/f:download", "/v1/rooms/den:watch?count=1"):
            answer = await edge.client.get(target, headers={"x-tint": "2"})
            assert (edge.stranger.metadata["x-tint"], answer.headers["x-hue"]) == ("2", "deep")
        answer = await edge.client.post("/v1/rooms/den/notes:touch", headers={"x-tint": "3"})
        assert (edge.stranger.metadata["x-tint"], answer.headers["x-hue"]) == ("3", "deep")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"request_headers": "x-ok,Grpc-Timeout"}, "TENFOLD_EDGE_REQUEST_HEADERS: 'grpc-timeout'"),
        ({"response_headers": "Set-Cookie"}, "TENFOLD_EDGE_RESPONSE_HEADERS: 'set-cookie'"),
    ],
)
async def test_a_setting_that_lists_what_may_not_cross_ends_the_start(
    start_foreign_edge, settings, told
):
    with pytest.raises(ContractError, match=told):
        async with start_foreign_edge(**settings):
            pass


@pytest.mark.parametrize(
    ("value", "status"),
    [("x" * 5000, 431), ("t\xe4g", 400), ("a\tb", 400)],
    ids=["too long", "no ASCII", "a tab"],
)
async def test_a_value_that_metadata_cannot_carry_is_refused(foreign_edge, value, status):
    connection = Connection(foreign_edge.port)
    answer = await connection.ask("GET", NOTE, [f"X-Flavour: {value}"], b"")
    connection.close()
    assert answer.status == status
    assert "x-flavour" in json.loads(answer.body)["detail"]
    assert foreign_edge.stranger.metadata == {}


async def test_initial_and_trailing_metadata_leave_the_later_wins(foreign_edge):
    foreign_edge.stranger.answers = (("x-colour", "red"), ("content-language", "de"))
    foreign_edge.stranger.trailers = (("x-colour", "blue"), ("x-secret", "s"))
    answer = await foreign_edge.client.get(NOTE)
    assert (answer.headers["x-colour"], answer.headers["content-language"]) == ("blue", "de")
    assert "x-secret" not in answer.headers


@pytest.mark.parametrize(
    "target", ["/v1/rooms/den:watch?count=1", "/v1/rooms/den:watch?count=0"], ids=["one", "none"]
)
async def test_initial_metadata_of_a_stream_leaves(foreign_edge, target):
    foreign_edge.stranger.answers = (("x-colour", "red"), ("x-secret", "s"))
    answer = await foreign_edge.client.get(target)
    assert answer.headers["x-colour"] == "red"
    assert "x-secret" not in answer.headers


async def test_metadata_of_a_client_streams_answer_leaves(foreign_edge):
    foreign_edge.stranger.answers = (("x-colour", "red"),)
    foreign_edge.stranger.trailers = (("idempotency-replayed", "true"),)
    headers = {"content-type": "application/x-ndjson"}
    answer = await foreign_edge.client.post("/v1/rooms/den/notes:add", content=b"", headers=headers)
    assert (answer.headers["x-colour"], answer.headers["idempotency-replayed"]) == ("red", "true")


async def test_trace_request_id_and_deadline_are_mapped(foreign_edge):
    metadata = await sent(
        foreign_edge,
        f"Traceparent: {TRACE}",
        "Tracestate: a=1,b=2",
        "X-Request-Id: r-1",
        "Grpc-Timeout: 5S",
    )
    assert metadata["traceparent"] == TRACE
    assert metadata["tracestate"] == "a=1,b=2"
    assert metadata["x-request-id"] == "r-1"
    # Told as the deadline of the call, which a server sees as such and not as metadata.
    assert "grpc-timeout" not in metadata


@pytest.mark.parametrize(
    "lines",
    [
        ["Tracestate: a=1"],
        ["Traceparent: nonsense", "Tracestate: a=1"],
        [f"Traceparent: {TRACE}", f"Tracestate: a={'x' * 600}"],
        [f"Traceparent: {TRACE}", "Tracestate: \xe4=1"],
    ],
    ids=["without a parent", "of a malformed parent", "too long", "malformed"],
)
async def test_a_trace_state_that_cannot_be_carried_is_dropped(foreign_edge, lines):
    assert "tracestate" not in await sent(foreign_edge, *lines)


async def test_a_page_may_send_and_read_what_crosses(start_foreign_edge):
    origin = {"origin": "https://app.example.com"}
    settings = {"cors_origins": "https://app.example.com", "request_headers": "x-tint"}
    async with start_foreign_edge(**settings) as edge:
        preflight = await edge.client.options(
            NOTE, headers={**origin, "access-control-request-method": "GET"}
        )
        allowed = preflight.headers["access-control-allow-headers"].split(", ")
        assert {"x-tint", "x-flavour", "accept-language"} <= set(allowed)
        answer = await edge.client.get(NOTE, headers=origin)
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {"x-colour", "content-language"} <= set(exposed)
