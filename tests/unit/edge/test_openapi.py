"""What library.proto's routes add to the document; tests/contracts has what ours need."""

import pytest

from edge.codec import CodecOptions
from edge.contracts import Contracts
from edge.forwarding import Forwarding
from edge.openapi import openapi_document
from edge.routes import RouteTable
from tests.protos import compile_protos
from tests.unit.edge.conftest import HERE

BOOK = "/v1/shelves/{shelve}/books/{book}"


@pytest.fixture(scope="module")
def document_of(tmp_path_factory):
    contracts = Contracts(compile_protos(HERE / "library", tmp_path_factory.mktemp("protos")))

    def make(**options):
        json = CodecOptions(**options)
        table = RouteTable.of_contracts(contracts, json=json)
        return openapi_document(table, contracts, title="Library", version="1", json=json)

    return make


@pytest.fixture(scope="module")
def paths(document_of):
    return document_of()["paths"]


def header_names(operation):
    return {p["name"] for p in operation["parameters"] if p.get("in") == "header"}


def test_the_status_of_success_is_the_contracts(paths):
    created = paths["/v1/shelves/{shelve}/books"]["post"]["responses"]
    assert created.keys() & {"200", "201", "204"} == {"201"}
    assert created["201"]["headers"].keys() == {"X-Request-Id", "ETag", "Location"}
    deleted = paths[BOOK]["delete"]["responses"]
    assert "content" not in deleted["204"]


def test_conditions_are_told_where_they_are_kept(paths):
    read, update, delete = (paths[BOOK][method] for method in ("get", "patch", "delete"))
    assert "If-None-Match" in header_names(read)
    assert "304" in read["responses"]
    assert "If-Match" not in header_names(read)
    for operation in (update, delete):
        assert "If-Match" in header_names(operation)
        assert "412" in operation["responses"]
        assert "304" not in operation["responses"]
    assert "ETag" not in paths[BOOK]["put"]["responses"]["200"]["headers"]


def test_a_patch_needs_a_body_and_bytes_have_any_type(paths):
    assert paths[BOOK]["patch"]["requestBody"]["required"]
    page = paths[f"{BOOK}:page"]
    assert page["get"]["responses"]["200"]["content"].keys() == {"*/*"}
    assert page["put"]["requestBody"]["content"].keys() == {"*/*"}
    assert page["put"]["responses"]["200"]["content"].keys() == {"*/*"}


def test_names_are_those_that_answers_have(document_of):
    def names(document):
        author = document["components"]["schemas"]["library.v1.Author"]["properties"]
        search = document["paths"]["/v1/books:search"]["get"]["parameters"]
        return {*author, *(p["name"] for p in search if p.get("in") == "query")}

    assert {"birthYear", "author.birthYear", "kindByName"} <= names(document_of())
    proto = document_of(proto_names=True)
    assert {"birth_year", "author.birth_year", "kind_by_name"} <= names(proto)
    assert "as the contracts do" in proto["info"]["description"]


def test_defaults_are_told_as_they_are_written(document_of):
    assert "Answers hold fields" in document_of()["info"]["description"]
    assert "Answers leave out fields" in document_of(emit_defaults=False)["info"]["description"]


def test_a_lenient_method_says_so(paths):
    assert "are ignored" in paths["/v1/books:search"]["get"]["description"]
    assert "are ignored" not in paths[BOOK]["get"].get("description", "")


@pytest.fixture
def operations_of(contracts_of):
    """The operations of methods, by path; all are POST."""

    def make(*methods, **settings):
        text = "".join(
            f'rpc M{i}{rpc} {{ option (google.api.http) = {{post: "/v1/m{i}" {rule}}};'
            f" option (tenfold.options.v1.method) = {{{policy}}}; }}"
            for i, (rpc, rule, policy) in enumerate(methods)
        )
        contracts = contracts_of(text)
        table = RouteTable.of_contracts(contracts)
        forwarding = Forwarding(contracts.methods(), **settings)
        document = openapi_document(table, contracts, title="T", version="1", forwarding=forwarding)
        return [item["post"] for item in document["paths"].values()]

    return make


def test_a_client_stream_takes_lines_or_bytes(operations_of):
    lines, body, whole, none = operations_of(
        ("(stream Q) returns (Q)", 'body: "*"', ""),
        ("(stream Q) returns (stream Q)", 'body: "body"', ""),
        ("(stream google.api.HttpBody) returns (Q)", 'body: "*"', ""),
        ("(stream Q) returns (Q)", "", ""),
    )
    assert lines["requestBody"]["content"].keys() == {"application/x-ndjson"}
    assert lines["responses"]["200"]["content"].keys() == {"application/json"}
    assert body["requestBody"]["content"].keys() == {"*/*"}
    assert whole["requestBody"]["content"].keys() == {"*/*"}
    assert "requestBody" not in none


def test_a_stream_of_bytes_is_bytes_whatever_holds_them(operations_of):
    whole, inside = operations_of(
        ("(Q) returns (stream google.api.HttpBody)", "", ""),
        ("(Q) returns (stream Q)", 'response_body: "body"', ""),
    )
    for operation in (whole, inside):
        assert operation["responses"]["200"]["content"].keys() == {"*/*"}


def test_headers_that_cross_are_told(operations_of):
    policy = 'request_headers: "x-own" response_headers: "x-back"'
    own, other = operations_of(
        ("(Q) returns (Q)", "", policy), ("(Q) returns (Q)", "", ""), request_headers="x-all"
    )
    assert header_names(own) == {"X-Own", "X-All"}
    assert header_names(other) == {"X-All"}
    assert "X-Back" in own["responses"]["200"]["headers"]
    assert "X-Back" not in other["responses"]["200"]["headers"]
