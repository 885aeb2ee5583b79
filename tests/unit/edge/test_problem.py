import grpc
import orjson
import pytest

from edge.contracts import load_contracts
from edge.problem import json_field, problem_of
from edge.refusals import MethodNotAllowed
from edge.routes import RouteTable
from shared import errors
from shared.errors import InvalidRequest, TenfoldError, Violation
from shared.rpc.status import code_of

TABLE = {
    errors.InvalidRequest: (400, "INVALID_ARGUMENT"),
    errors.Unauthenticated: (401, "UNAUTHENTICATED"),
    errors.PermissionDenied: (403, "PERMISSION_DENIED"),
    errors.NotFound: (404, "NOT_FOUND"),
    errors.AlreadyExists: (409, "ALREADY_EXISTS"),
    errors.FailedPrecondition: (400, "FAILED_PRECONDITION"),
    errors.QuotaExceeded: (429, "RESOURCE_EXHAUSTED"),
    errors.Overloaded: (503, "RESOURCE_EXHAUSTED"),
    errors.Aborted: (409, "ABORTED"),
    errors.Unavailable: (503, "UNAVAILABLE"),
    errors.Unreachable: (503, "UNAVAILABLE"),
    errors.DeadlineExceeded: (504, "DEADLINE_EXCEEDED"),
    errors.Unimplemented: (501, "UNIMPLEMENTED"),
    errors.Internal: (500, "INTERNAL"),
    errors.OutOfRange: (400, "OUT_OF_RANGE"),
    errors.Unknown: (500, "UNKNOWN"),
    errors.DataLoss: (500, "DATA_LOSS"),
    errors.IdempotencyKeyReused: (422, "INVALID_ARGUMENT"),
    errors.IdempotencyInFlight: (409, "ABORTED"),
    errors.RaceLost: (409, "ABORTED"),
}


class InsufficientFunds(errors.FailedPrecondition):
    reason = "INSUFFICIENT_FUNDS"


@pytest.fixture(scope="module")
def table():
    return RouteTable.of_contracts(load_contracts())


def told(error, route=None):
    return orjson.loads(problem_of(error, request_id="r-1", route=route).body)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_every_error_has_its_status_and_code(kind):
    document = told(kind("sentence"))
    assert (document["status"], document["code"]) == TABLE[kind]
    assert document["reason"] == kind.reason
    assert document["request_id"] == "r-1"
    assert code_of(kind("x")) is getattr(grpc.StatusCode, TABLE[kind][1])


def test_the_table_covers_the_whole_family():
    def leaves(kind):
        below = kind.__subclasses__()
        return {kind}.union(*map(leaves, below)) if below else {kind}

    family = {kind for kind in leaves(TenfoldError) if kind.__module__ == "shared.errors"}
    assert family - {TenfoldError} == TABLE.keys()


def test_a_service_error_keeps_its_own_reason_and_values():
    document = told(InsufficientFunds("too little", metadata={"available": "5"}))
    assert document == {
        "type": "https://tenfold.dev/errors/insufficient-funds",
        "title": "Bad Request",
        "status": 400,
        "detail": "too little",
        "code": "FAILED_PRECONDITION",
        "reason": "INSUFFICIENT_FUNDS",
        "request_id": "r-1",
        "details": {"available": "5"},
    }


def test_a_reason_decides_when_the_class_was_lost_on_the_way():
    assert told(InvalidRequest("x", reason="IDEMPOTENCY_KEY_REUSED"))["status"] == 422


def test_an_internal_error_tells_nothing_but_the_request_id():
    error = errors.Internal("SELECT secret FROM t", metadata={"sql": "secret"})
    problem = problem_of(error, request_id="r-1")
    assert b"secret" not in problem.body
    assert b"r-1" in problem.body


@pytest.mark.parametrize(("retry_after_s", "header"), [(0.2, "1"), (1, "1"), (1.01, "2"), (0, "0")])
def test_retry_after_is_in_whole_seconds_and_never_too_early(retry_after_s, header):
    error = errors.QuotaExceeded("x", retry_after_s=retry_after_s)
    assert problem_of(error, request_id="r").headers["retry-after"] == header


def test_a_missing_credential_is_challenged_without_its_message():
    problem = problem_of(errors.Unauthenticated("key tf_abc is unknown"), request_id="r")
    assert problem.headers["www-authenticate"] == "Bearer"
    assert problem.headers["content-type"] == "application/problem+json"


def test_violations_carry_json_names_and_pointers_into_the_body(table):
    route = table.match("POST", "/v1/accounts/a:transferFunds").route
    error = InvalidRequest(
        "amount.minor_units: too small",
        violations=[
            Violation("amount.minor_units", "too small"),
            Violation("account", "unknown"),
            Violation("nothing_known", "?"),
        ],
    )
    document = told(error, route)
    assert document["detail"] == "amount.minorUnits: too small"
    assert document["violations"] == [
        {
            "field": "amount.minorUnits",
            "description": "too small",
            "in": "body",
            "pointer": "#/amount/minorUnits",
        },
        {"field": "account", "description": "unknown", "in": "path", "pointer": "/account"},
        {"field": "nothing_known", "description": "?", "in": "body", "pointer": "#/nothing_known"},
    ]


def test_pointers_start_where_the_body_does(table):
    route = table.match("POST", "/v1/transactions").route
    error = InvalidRequest.of_field("transaction.entries[1].amount.minor_units", "bad")
    (violation,) = told(error, route)["violations"]
    assert violation["field"] == "transaction.entries[1].amount.minorUnits"
    assert violation["pointer"] == "#/entries/1/amount/minorUnits"
    whole = InvalidRequest.of_field("transaction", "is required")
    assert told(whole, route)["violations"][0]["pointer"] == "#"
    beside = InvalidRequest.of_field("transactional", "?")
    assert told(beside, route)["violations"][0]["in"] == "query"


@pytest.mark.parametrize(
    ("target", "field", "violation"),
    [
        ("/v1/things/x", "text", ("text", "path", "/text")),
        ("/v1/things/x", "an_int64", ("anInt64", "query", "/anInt64")),
        ("/v1/things/x", "inner.big_number", ("inner.bigNumber", "query", "/inner/bigNumber")),
        ("/v1/things/x", "labels[a/b]", ("labels[a/b]", "query", "/labels/a~1b")),
        ("/v1/things/x", "texts[1]", ("texts[1]", "query", "/texts/1")),
        ("/v1/things/x", "nothing", ("nothing", "query", "/nothing")),
        ("/v1/inners/i/things/5", "inner.text", ("inner.text", "path", "/inner/text")),
        ("/v1/inners/i/things/5", "inner", ("inner", "query", "/inner")),
    ],
)
def test_a_parameter_has_a_pointer_from_the_request_message(
    everything_table, target, field, violation
):
    route = everything_table.match("GET", target).route
    [found] = told(InvalidRequest.of_field(field, "bad"), route)["violations"]
    assert (found["field"], found["in"], found["pointer"]) == violation


def test_a_header_has_no_pointer_and_a_foreign_reason_is_no_broken_uri(table):
    route = table.match("GET", "/v1/accounts").route
    assert told(InvalidRequest.of_field("If-Match", "bad"), route)["violations"] == [
        {"field": "If-Match", "description": "bad"}
    ]
    foreign = told(errors.NotFound("x", reason="NO SUCH<thing>"))
    assert foreign["type"] == "https://tenfold.dev/errors/no%20such%3Cthing%3E"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("an_int64", ("anInt64", "/anInt64")),
        ("anInt64", ("anInt64", "/anInt64")),
        ("inner.big_number", ("inner.bigNumber", "/inner/bigNumber")),
        ("inners[3].big_number", ("inners[3].bigNumber", "/inners/3/bigNumber")),
        ('labels["a.b/c~d"]', ('labels["a.b/c~d"]', "/labels/a.b~1c~0d")),
        ("inner_by_number[7].text", ("innerByNumber[7].text", "/innerByNumber/7/text")),
        ("custom_named", ("otherName", "/otherName")),
        ("not a path!", ("not a path!", "")),
        ("", ("", "")),
    ],
)  # fmt: skip
def test_paths_are_translated_by_the_descriptor(everything_contracts, path, expected):
    assert json_field(path, everything_contracts.message("everything.v1.Everything")) == expected


def test_what_only_http_knows_has_the_same_shape():
    refusal = MethodNotAllowed("This path answers GET.", headers={"allow": "GET"})
    problem = problem_of(refusal, request_id="r")
    assert problem.status == 405
    assert problem.headers == {"content-type": "application/problem+json", "allow": "GET"}
    assert orjson.loads(problem.body).keys() == told(errors.NotFound("x")).keys()
