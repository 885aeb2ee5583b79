import orjson
import pytest

from edge.answer import answers_of
from edge.codec import CodecOptions
from edge.contracts import ContractError
from edge.etags import Condition
from edge.refusals import NotAcceptable
from edge.routes import RouteTable
from tests.protos import compile_protos

BOOK, NAME = "/v1/shelves/s/books/b", "shelves/s/books/b"
SCAN = {"content_type": "image/png", "data": b"\x00"}


@pytest.fixture
def answer(library):
    """Answers a request to library.proto with a message of these fields."""

    def make(method, path, *, known=(), **fields):
        route = library.match(method, path).route
        condition = Condition(is_tagged=False, known_tags=known) if known else None
        made = answers_of(route).of(route.method.output(**fields), condition)
        return made.status, {k.decode(): v.decode() for k, v in made.headers}, made.body

    return make


def test_an_answer_is_json_and_not_stored(answer):
    status, headers, body = answer("GET", BOOK, name=NAME)
    assert status == 200
    assert headers == {"content-type": "application/json", "cache-control": "no-store"}
    assert orjson.loads(body)["name"] == NAME


@pytest.mark.parametrize("method", ["GET", "PATCH"])
def test_an_etag_field_is_an_etag_header(answer, method):
    assert answer(method, BOOK, etag="e 1")[1]["etag"] == '"e%201"'
    assert answer(method, BOOK, etag='W/"e"')[1]["etag"] == 'W/"e"'
    assert "etag" not in answer(method, BOOK)[1]


def test_put_has_no_validator_since_what_it_sent_may_have_been_changed(answer):
    """RFC 9110, section 9.3.4; the tag is in the body, and in the next GET."""
    _, headers, body = answer("PUT", BOOK, etag="e")
    assert "etag" not in headers
    assert orjson.loads(body)["etag"] == "e"


def test_what_the_client_has_is_not_sent_again(answer):
    status, headers, body = answer("GET", BOOK, etag="e", known=('"other"', '"e"'))
    assert (status, headers, body) == (304, {"etag": '"e"', "cache-control": "no-store"}, b"")
    assert answer("GET", BOOK, etag="new", known=('"e"',))[0] == 200
    assert answer("GET", BOOK, known=("*",))[0] == 200


def test_the_contract_chooses_the_status(answer):
    assert answer("POST", "/v1/shelves/s/books")[0] == 201
    status, headers, body = answer("DELETE", BOOK)
    assert (status, headers, body) == (204, {"cache-control": "no-store"}, b"")


@pytest.mark.parametrize(
    ("name", "location"),
    [
        (NAME, BOOK),
        ("shelves/ü/books/a b%2F?", "/v1/shelves/%C3%BC/books/a%20b%252F%3F"),
        ("", None),
        ("books/b", None),
        ("shelves//books/b", None),
        ("shelves/../books/b", None),
        ("shelves/s/books/b/pages/1", None),
    ],
)
def test_a_created_resource_says_where_it_is_served(answer, library, name, location):
    headers = answer("POST", "/v1/shelves/s/books", name=name)[1]
    assert headers.get("location") == location
    if location:
        assert library.match("GET", location).captures["name"] in {name, name.replace("/", "%2F")}


def test_only_a_create_has_a_location(answer):
    assert "location" not in answer("PATCH", BOOK, name=NAME)[1]
    assert "location" not in answer("POST", "/v1/books:search")[1]


def test_an_http_body_is_answered_as_it_is(answer):
    _, headers, body = answer("GET", f"{BOOK}:page", **SCAN)
    assert (headers["content-type"], body) == ("image/png", b"\x00")
    _, headers, body = answer("PUT", f"{BOOK}:page", scan=SCAN)
    assert (headers["content-type"], body) == ("image/png", b"\x00")


def test_a_content_type_may_have_parameters(answer):
    headers = answer("GET", f"{BOOK}:page", content_type='text/plain; charset="utf-8"')[1]
    assert headers["content-type"] == 'text/plain; charset="utf-8"'


@pytest.mark.parametrize(
    "content_type", ["", "png", "a/b\r\nset-cookie: x", "ä/b", "a/b" + "c" * 999]
)
def test_a_content_type_that_no_header_can_hold_is_bytes(answer, content_type):
    headers = answer("GET", f"{BOOK}:page", content_type=content_type)[1]
    assert headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    "accept", ["", "*/*", "application/json", "text/html, application/*;q=0.1"]
)
def test_a_client_that_takes_json_is_answered(library, accept):
    answers_of(library.match("GET", BOOK).route).require_acceptable(accept)


@pytest.mark.parametrize("accept", ["image/png", "application/json;q=0", "text/*"])
def test_a_client_that_takes_no_json_is_refused_where_there_is_nothing_else(library, accept):
    with pytest.raises(NotAcceptable):
        answers_of(library.match("GET", BOOK).route).require_acceptable(accept)
    for method, path in [("GET", f"{BOOK}:page"), ("PUT", f"{BOOK}:page"), ("DELETE", BOOK)]:
        answers_of(library.match(method, path).route).require_acceptable(accept)


def test_output_follows_the_settings(everything_contracts):
    def body(**options):
        json = CodecOptions(**options)
        table = RouteTable.of_contracts(everything_contracts, json=json)
        route = table.match("PUT", "/v1/inners/i").route
        message = route.method.output(inner={"text": "x"})
        return answers_of(route).of(message, None).body

    assert body() == b'{"text":"x","bigNumber":"0","many":[]}'
    assert body(emit_defaults=False) == b'{"text":"x"}'
    assert body(proto_names=True) == b'{"text":"x","big_number":"0","many":[]}'
    assert body(emit_defaults=False, pretty=True) == b'{\n  "text": "x"\n}'


@pytest.mark.parametrize(
    ("rpc", "why"),
    [
        ("rpc M(Q) returns (Q) {OPTION}", "204 would lose the answer"),
        ("rpc M(Q) returns (stream Q) {OPTION}", "for unary methods"),
    ],
)
@pytest.mark.parametrize("status", [204])
def test_a_status_that_no_answer_can_have_is_refused_by_method(tmp_path, rpc, why, status):
    with pytest.raises(ContractError, match=rf"/t\.S/M: success_status.*{why}"):
        answers_of(route_with_status(tmp_path, rpc, status))


@pytest.mark.parametrize("status", [0, 100, 206, 301, 404, 500])
def test_only_a_few_statuses_tell_of_success(tmp_path, status):
    with pytest.raises(ContractError, match=rf"success_status {status} is none of"):
        answers_of(route_with_status(tmp_path, "rpc M(Q) returns (Q) {OPTION}", status))


def route_with_status(folder, rpc, status):
    option = (
        'option (google.api.http) = {get: "/v1/q"};'
        f"option (tenfold.options.v1.method) = {{access: ACCESS_PUBLIC success_status: {status}}};"
    )
    (folder / "t.proto").write_text(
        'syntax = "proto3"; package t; import "google/api/annotations.proto";'
        'import "tenfold/options/v1/policy.proto"; message Q {}'
        f"service S {{ {rpc.replace('OPTION', option)} }}"
    )
    return RouteTable.of_contracts(compile_protos(folder, folder)).match("GET", "/v1/q").route
