"""The OpenAPI document says what the edge serves, and nothing dangles in it."""

import json
import re

import pytest

from edge.contracts import load_contracts
from edge.openapi import openapi_document, openapi_path
from edge.routes import RouteTable
from shared.rpc.policy import Access, Idempotency

OPERATIONS = {"get", "put", "post", "delete", "patch", "head", "options"}


@pytest.fixture(scope="module")
def contracts():
    return load_contracts()


@pytest.fixture(scope="module")
def table(contracts):
    return RouteTable.of_contracts(contracts)


@pytest.fixture(scope="module")
def document(contracts, table):
    return openapi_document(table, contracts, title="Tenfold", version="1")


@pytest.fixture(scope="module")
def operations(document):
    return [
        (path, method, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def resolve(document, reference):
    node = document
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


def nodes(value):
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


def parameters(document, operation):
    listed = operation["parameters"]
    return [resolve(document, p["$ref"]) if "$ref" in p else p for p in listed]


def operation_of(document, route):
    path, _ = openapi_path(route.template)
    return document["paths"][path][route.http_method.lower()]


def test_every_route_is_described_and_nothing_else(table, document, operations):
    assert len(operations) == len(table.routes)
    for route in table.routes:
        assert operation_of(document, route)["x-rpc"] == route.method.full_name
    assert {method for _, method, _ in operations} <= OPERATIONS


def test_every_described_path_matches_its_own_route(table, operations):
    for path, method, operation in operations:
        concrete = re.sub(r"\{\w+\}", "0190", path)
        found = table.match(method.upper(), concrete)
        assert found.route.method.full_name == operation["x-rpc"]


def test_every_reference_resolves_and_every_component_is_used(document):
    references = {node["$ref"] for node in nodes(document) if "$ref" in node}
    for reference in references:
        assert resolve(document, reference) is not None
    for kind in ("parameters", "headers", "responses", "schemas"):
        for name in document["components"][kind]:
            assert f"#/components/{kind}/{name}" in references


def test_path_parameters_are_declared_exactly(document, operations):
    for path, _, operation in operations:
        declared = [p for p in parameters(document, operation) if p["in"] == "path"]
        assert sorted(re.findall(r"\{(\w+)\}", path)) == sorted(p["name"] for p in declared)
        assert all(p["required"] is True for p in declared)


def test_parameters_and_operation_ids_are_unique(document, operations):
    ids = [operation["operationId"] for _, _, operation in operations]
    assert len(ids) == len(set(ids))
    for _, _, operation in operations:
        names = [(p["in"], p["name"].lower()) for p in parameters(document, operation)]
        assert len(names) == len(set(names))


def test_authentication_and_scopes_follow_the_contract(table, document):
    for route in table.routes:
        policy = route.method.policy
        security = operation_of(document, route)["security"]
        expected = [] if policy.access is Access.PUBLIC else [{"bearer": sorted(policy.scopes)}]
        assert security == expected


def test_the_idempotency_key_is_required_where_the_contract_says_so(table, document):
    for route in table.routes:
        found = {p["name"]: p for p in parameters(document, operation_of(document, route))}
        key = found.get("Idempotency-Key")
        idempotency = route.method.policy.idempotency
        assert (key is not None) == (idempotency in {Idempotency.KEYED, Idempotency.OPTIONAL})
        assert (key or {}).get("required", False) == (idempotency is Idempotency.KEYED)


def test_streams_are_described_as_events_and_lines(table, document):
    streams = [r for r in table.routes if r.method.server_streaming and r.raw is None]
    assert streams
    for route in streams:
        content = operation_of(document, route)["responses"]["200"]["content"]
        assert content.keys() == {"text/event-stream", "application/x-ndjson"}
    inbox = document["paths"]["/v1/inbox:watch"]["get"]
    assert "Last-Event-ID" in {p["name"] for p in parameters(document, inbox)}


def test_every_error_is_a_problem(document, operations):
    problem = {"$ref": "#/components/responses/Problem"}
    for _, _, operation in operations:
        responses = operation["responses"]
        assert responses["default"] == problem
        assert all(responses[status] == problem for status in responses if status[0] == "4")


def test_what_a_client_can_deal_with_is_named(document):
    transfer = document["paths"]["/v1/accounts/{account}:transferFunds"]["post"]["responses"]
    client_errors = [400, 401, 403, 404, 406, 408, 409, 413, 414, 415, 422, 429, 431]
    assert sorted(transfer) == ["200", *map(str, client_errors), "default"]
    listed = document["paths"]["/v1/accounts"]["get"]["responses"]
    assert not listed.keys() & {"408", "412", "413", "415", "422"}


def test_a_field_that_its_rule_refuses_when_it_is_left_out_is_required(document):
    sums = document["paths"]["/v1/dailySums"]["get"]
    required = {p["name"] for p in parameters(document, sums) if p.get("required")}
    assert {"firstDay", "lastDay"} <= required


def test_request_ids_are_not_asked_for_twice(document):
    body = document["paths"]["/v1/accounts/{account}:transferFunds"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert "requestId" not in schema["properties"]
    assert "account" not in schema["properties"]
    assert set(schema["required"]) == {"toAccount", "amount"}


def test_comments_and_rules_of_the_contract_are_told(document):
    transfer = document["paths"]["/v1/accounts/{account}:transferFunds"]["post"]
    assert transfer["summary"].startswith("Moves money from an account of the caller")
    assert "INSUFFICIENT_FUNDS" in transfer["description"]
    money = document["components"]["schemas"]["tenfold.common.v1.Money"]["properties"]
    assert money["currencyCode"]["pattern"] == "^[A-Z]{3}$"
    assert money["minorUnits"]["type"] == "string"
    sign_up = document["paths"]["/v1/users:signUp"]["post"]["requestBody"]
    password = sign_up["content"]["application/json"]["schema"]["properties"]["password"]
    assert password["format"] == "password"


def test_the_document_keeps_to_what_openapi_3_0_and_3_1_share(document):
    """The bundled viewer reads 3.0 only; edge/docs.py shows the document under that number."""
    assert document["openapi"] == "3.1.0"
    for node in nodes(document["components"]["schemas"]):
        assert not isinstance(node.get("type"), list)
        assert not node.keys() & {"const", "examples", "contentEncoding", "$defs"}
        if "$ref" in node:
            assert node.keys() == {"$ref"}


def test_the_document_is_plain_json_and_the_same_each_time(contracts, table, document):
    again = openapi_document(table, contracts, title="Tenfold", version="1")
    assert json.dumps(document) == json.dumps(again)


def test_any_contract_set_can_be_described(everything_document):
    paths = everything_document["paths"]
    assert {"get", "put", "post", "delete", "patch"} == paths["/v1/open/caf%C3%A9"].keys()
    assert "/v1/files/{rest}:stat" in paths
    assert "/v1/shelves/{shelve}/books/{book}" in paths
    names = [p.get("name") for p in paths["/v1/things/{text}"]["get"]["parameters"]]
    assert {"text", "inner.bigNumber", "labels", "time", "stringWrapper"} <= set(names)


def test_literals_of_a_path_are_written_as_a_target_has_them(everything_document):
    assert "/v1/open/caf%C3%A9" in everything_document["paths"]


def test_a_response_body_that_may_be_unset_may_be_null(everything_document):
    put = everything_document["paths"]["/v1/inners/{inner}"]["put"]
    schema = put["responses"]["200"]["content"]["application/json"]["schema"]
    assert {"enum": [None]} in schema["anyOf"]


def test_a_double_may_be_what_json_has_no_number_for(everything_document):
    schema = everything_document["components"]["schemas"]["everything.v1.Everything"]
    number, word = schema["properties"]["aDouble"]["anyOf"]
    assert (number["type"], word["enum"]) == ("number", ["NaN", "Infinity", "-Infinity"])
    assert schema["properties"]["choiceNull"] == {"enum": [None]}


def test_a_parameter_that_is_json_says_so(everything_document):
    listed = everything_document["paths"]["/v1/things/{text}"]["get"]["parameters"]
    [struct] = [p for p in listed if p.get("name") == "struct"]
    assert struct["content"].keys() == {"application/json"}
    assert "schema" not in struct


@pytest.fixture(scope="module")
def everything_document(tmp_path_factory):
    from edge.contracts import Contracts
    from tests.protos import compile_protos
    from tests.unit.edge.conftest import HERE

    contracts = Contracts(compile_protos(HERE, tmp_path_factory.mktemp("protos")))
    table = RouteTable.of_contracts(contracts)
    return openapi_document(table, contracts, title="Everything", version="1")
