"""Which names may be listed, by a contract or a setting."""

import pytest

from edge.contracts import ContractError
from edge.forwarding import Crossing, Forwarding, headers_of

REFUSED_BOTH_WAYS = {
    "speaks of one connection": [
        *("connection", "keep-alive", "proxy-authorization", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade", "http2-settings", "host", "content-length", "via"),
        *("content-type", "content-encoding", "expect", "user-agent", "date", "server"),
    ],
    "what the edge and services tell each other": [
        *("tenfold-identity", "tenfold-quota-mode", "x-request-id", "idempotency-key"),
        *("idempotency-replayed", "traceparent", "tracestate", "grpc-timeout", "grpc-status"),
        *("grpc-anything", "http-method", "http-url", "http-path-name", "http-header-range"),
    ],
    "would let a client say who or where it is": [
        *("x-user-id", "x-tenant-id", "x-roles", "x-internal-user", "x-forwarded-for"),
        *("x-forwarded-host", "forwarded", "x-real-ip"),
    ],
    "browsers send by themselves": ["cookie", "set-cookie"],
    "would be binary": ["x-flavour-bin", "x-bin"],
    "is no header name": [
        *("x_user_id", "x user", ":path", "x.y", "1x", "-x", "größe", "x:y", "x\ny", "x" * 101),
    ],
}
REFUSED = [(name, why) for why, names in REFUSED_BOTH_WAYS.items() for name in names]


@pytest.mark.parametrize(("name", "why"), REFUSED)
@pytest.mark.parametrize("direction", ["request_headers", "response_headers"])
def test_these_names_are_refused_at_start_in_any_case(direction, name, why):
    for spelled in (name, name.upper(), name.title()):
        with pytest.raises(ContractError, match=f"TENFOLD_EDGE_{direction.upper()}: .*{why}"):
            Forwarding(**{direction: f"x-good, {spelled} "})


@pytest.mark.parametrize(
    "name", ["etag", "cache-control", "vary", "ratelimit", "access-control-allow-origin"]
)
def test_what_the_edge_writes_itself_leaves_no_service(name):
    with pytest.raises(ContractError, match=f"{name!r} is written by the edge"):
        Forwarding(response_headers=name)
    Forwarding(request_headers=name)


def test_authorization_enters_only_where_the_edge_does_not_read_it():
    with pytest.raises(ContractError, match="the edge's own to check"):
        Forwarding(request_headers="Authorization")
    Forwarding(request_headers="Authorization", takes_credentials=False)


@pytest.mark.parametrize("option", ["request_headers", "response_headers"])
def test_a_contract_that_lists_such_a_name_is_told_of_method_and_name(contracts_of, option):
    contracts = contracts_of(
        'rpc Add(Q) returns (Q) { option (google.api.http) = {get: "/v1/a"};'
        f' option (tenfold.options.v1.method) = {{{option}: "x-good" {option}: "Grpc-Status"}}; }}'
    )
    with pytest.raises(ContractError, match=f"/t.S/Add: {option}: 'grpc-status' is what the edge"):
        Forwarding(contracts.methods())


def test_a_methods_own_list_adds_to_that_of_all(contracts_of):
    contracts = contracts_of(
        "rpc Add(Q) returns (Q) {"
        ' option (tenfold.options.v1.method) = {request_headers: "X-Own"}; }'
        "rpc Other(Q) returns (Q);"
    )
    add, other = contracts.methods()
    forwarding = Forwarding([add, other], request_headers="x-all", response_headers="x-back")
    assert forwarding.of(add) == Crossing(("x-all", "x-own"), (b"x-back",))
    assert forwarding.of(other) == Crossing(("x-all",), (b"x-back",))
    assert Forwarding([other]).of(other) == Crossing()


@pytest.mark.parametrize(
    "value", [b"a\r\nset-cookie: a=b", b"a\nb", b"a\0b", b"caf\xc3\xa9", b"\x7f"]
)
def test_a_value_that_is_no_visible_ascii_does_not_leave(value):
    crossing = Crossing(leaving=(b"x-a", b"x-b"))
    assert headers_of(crossing, {b"x-a": value, b"x-b": b"1"}) == [(b"x-b", b"1")]
