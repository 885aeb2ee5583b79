import pytest

from edge.contracts import ContractError, load_contracts
from edge.reachable import require_reachable
from edge.routes import RouteTable

OWN = {b"/healthz", b"/docs"}


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ('get: "/healthz"', "the edge itself answers /healthz"),
        ('post: "/docs"', "the edge itself answers /docs"),
        ('get: "/d%6Fcs"', "the edge itself answers /docs"),
        ('custom: {kind: "*" path: "/docs"}', "the edge itself answers /docs"),
        ('get: "/v1/./x"', "dot segments"),
        ('get: "/v1/%2E%2e/{a}"', "dot segments"),
        ('custom: {kind: "CONNECT" path: "/v1/x"}', "CONNECT asks for a host"),
        ('custom: {kind: "FROB" path: "/v1/x"}', "the method 'FROB' with 501"),
        ('custom: {kind: "GET /" path: "/v1/x"}', "the method 'GET /' with 501"),
        ('custom: {kind: "" path: "/v1/x"}', "the method '' with 501"),
    ],
)
def test_a_route_that_no_request_can_reach_is_refused_by_name(table_of, rule, why):
    with pytest.raises(ContractError, match=rf"\(/t\.S/M0\) can never be reached: .*{why}"):
        require_reachable(table_of(rule), OWN)


@pytest.mark.parametrize(
    "rule",
    [
        'get: "/{a}"',
        'get: "/docs/{a}"',
        'get: "/docs:do"',
        'get: "/v1/a%2E"',
        'get: "/v1/.well-known"',
        'custom: {kind: "purge" path: "/v1/x"}',
        'custom: {kind: "M-SEARCH" path: "/v1/x"}',
        'custom: {kind: "*" path: "/v1/x"}',
    ],
)
def test_a_route_that_loses_some_requests_or_none_is_served(table_of, rule):
    require_reachable(table_of(rule), OWN)


def test_our_own_routes_are_all_reached():
    require_reachable(RouteTable.of_contracts(load_contracts()), OWN)
