import orjson
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2

from edge.aip193 import google_error_of
from edge.refusals import MethodNotAllowed
from shared import errors
from shared.errors import InvalidRequest, Violation

assert error_details_pb2  # known to the pool that reads the details


def told(error, route=None):
    return google_error_of(error, request_id="r-1", route=route)


def test_an_error_is_one_member_with_google_s_own_names(library):
    route = library.match("PATCH", "/v1/shelves/s/books/b").route
    error = InvalidRequest(
        "author.birth_year: too early",
        violations=[Violation("book.author.birth_year", "too early")],
    )
    error.metadata["least"] = "1500"
    problem = told(error, route)
    assert (problem.status, problem.headers["content-type"]) == (400, "application/json")
    assert orjson.loads(problem.body) == {
        "error": {
            "code": 400,
            "message": "author.birth_year: too early",
            "status": "INVALID_ARGUMENT",
            "details": [
                {
                    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                    "reason": "INVALID_REQUEST",
                    "domain": "tenfold.dev",
                    "metadata": {"least": "1500"},
                },
                {"@type": "type.googleapis.com/google.rpc.RequestInfo", "requestId": "r-1"},
                {
                    "@type": "type.googleapis.com/google.rpc.BadRequest",
                    "fieldViolations": [
                        {"field": "book.author.birthYear", "description": "too early"}
                    ],
                },
            ],
        }
    }


def test_the_details_are_messages_that_google_s_clients_read():
    document = orjson.loads(told(errors.Unavailable("later", retry_after_s=1.2)).line)
    details = status_pb2.Status()
    json_format.ParseDict({"details": document["details"]}, details)
    retry = error_details_pb2.RetryInfo()
    assert details.details[-1].Unpack(retry)
    assert retry.retry_delay.seconds == 2


def test_in_a_stream_the_framing_names_the_error():
    problem = told(errors.NotFound("gone"))
    assert orjson.loads(problem.body) == {"error": orjson.loads(problem.line)}


def test_headers_and_status_are_those_of_a_problem():
    problem = told(MethodNotAllowed("This path answers GET.", headers={"allow": "GET"}))
    assert (problem.status, problem.headers["allow"]) == (405, "GET")


def test_an_internal_error_tells_nothing_but_the_request_id():
    error = errors.Internal("SELECT secret", metadata={"sql": "secret"}, retry_after_s=1)
    body = told(error).body
    assert b"secret" not in body
    assert b"r-1" in body
