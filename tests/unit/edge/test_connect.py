import base64
import gzip
import struct
from pathlib import Path

import orjson
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from edge.connect import (
    CODECS,
    STREAM_TYPES,
    UNARY_TYPES,
    ConnectFraming,
    GetRequest,
    codec_of,
    envelope,
    error_json,
    is_gzip,
    only_message,
    takes_gzip,
)
from edge.contracts import load_contracts
from edge.refusals import BodyTooLarge, RequestTimeout, UnsupportedMediaType
from edge.routes import RouteTable
from shared import errors
from shared.errors import InvalidRequest, TenfoldError, Unimplemented, Violation
from tests.protos import compile_protos

CODES = {
    errors.InvalidRequest: "invalid_argument",
    errors.Unauthenticated: "unauthenticated",
    errors.PermissionDenied: "permission_denied",
    errors.NotFound: "not_found",
    errors.AlreadyExists: "already_exists",
    errors.FailedPrecondition: "failed_precondition",
    errors.QuotaExceeded: "resource_exhausted",
    errors.Overloaded: "resource_exhausted",
    errors.Aborted: "aborted",
    errors.Unavailable: "unavailable",
    errors.DeadlineExceeded: "deadline_exceeded",
    errors.Unimplemented: "unimplemented",
    errors.Internal: "internal",
    errors.IdempotencyKeyReused: "invalid_argument",
    errors.IdempotencyInFlight: "aborted",
    BodyTooLarge: "resource_exhausted",
    RequestTimeout: "deadline_exceeded",
}


@pytest.fixture(scope="module")
def route():
    table = RouteTable.of_contracts(load_contracts())
    return table.match("POST", "/tenfold.ledger.v1.LedgerService/TransferFunds").route


def told(error, route):
    return orjson.loads(error_json(error, request_id="r-1", route=route))


def details(document):
    """The details, unpacked by the type they name."""
    found = []
    for detail in document["details"]:
        value = detail["value"]
        assert "=" not in value
        kind = getattr(error_details_pb2, detail["type"].removeprefix("google.rpc."))
        found.append(kind.FromString(base64.b64decode(value + "=" * (-len(value) % 4))))
    return found


# Errors
@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_every_error_has_its_code_and_reason(route, kind):
    document = told(kind("sentence"), route)
    assert document["code"] == CODES[kind]
    info, request = details(document)[:2]
    assert (info.reason, request.request_id) == (kind.reason, "r-1")


def test_an_internal_error_tells_nothing_of_itself(route):
    error = errors.Internal("secret of the house", metadata={"table": "secret"})
    assert b"secret" not in error_json(error, request_id="r-1", route=route)


def test_violations_carry_the_names_that_javascript_knows(route):
    violations = [Violation("to_account", "is needed"), Violation("amount.minor_units", "is odd")]
    error = errors.IdempotencyKeyReused("to_account: is needed", violations=violations)
    document = told(error, route)
    assert document["message"] == "toAccount: is needed"
    assert details(document)[0].reason == "IDEMPOTENCY_KEY_REUSED"
    assert error.violations == tuple(violations)
    [bad] = [d for d in details(document) if d.DESCRIPTOR.name == "BadRequest"]
    assert [v.field for v in bad.field_violations] == ["toAccount", "amount.minorUnits"]


@pytest.mark.parametrize("kind", [errors.Unavailable, InvalidRequest])
def test_when_to_come_back_is_a_detail(route, kind):
    error = kind("later")
    error.retry_after_s = 1.5
    document = told(error, route)
    [retry] = [d for d in details(document) if d.DESCRIPTOR.name == "RetryInfo"]
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert document["details"][-1]["debug"] == {"retryDelay": "1.500s"}


# Requests
@pytest.mark.parametrize(
    ("codec", "data"),
    [
        ("json", b'{"book": {"title": "x"}, "updateMask": "title,pages"}'),
        ("proto", b"\x0a\x03\x12\x01x\x12\x05\x0a\x03foo"),
    ],
)
def test_a_mask_that_names_no_field_is_refused_in_either_codec(library, codec, data):
    route = library.match("POST", "/library.v1.Library/UpdateBook").route
    with pytest.raises(InvalidRequest, match=r"updateMask: '(pages|foo)' names no field"):
        CODECS[codec].decode(route, data)


def test_a_mask_is_never_made_from_a_message(library):
    route = library.match("POST", "/library.v1.Library/UpdateBook").route
    request = CODECS["json"].decode(route, b'{"book": {"title": "x"}}')
    assert not request.HasField("update_mask")


@pytest.mark.parametrize(("codec", "data"), [("json", b'{"next": {"text": "x"}}'), ("proto", b"")])
def test_what_proto2_requires_is_missed_by_name(tmp_path, codec, data):
    cases = Path(__file__).parents[2] / "integration" / "edge" / "cases"
    table = RouteTable.of_contracts(compile_protos(cases, tmp_path))
    [route] = [r for r in table.connect_routes if r.method.name == "PutStrict"]
    with pytest.raises(InvalidRequest, match="text: is required"):
        CODECS[codec].decode(route, data)


# Content types
@pytest.mark.parametrize(
    ("content_type", "known", "name"),
    [
        ("application/json", UNARY_TYPES, "json"),
        ("application/json;charset=UTF-8", UNARY_TYPES, "json"),
        ("APPLICATION/PROTO", UNARY_TYPES, "proto"),
        ("application/connect+json", STREAM_TYPES, "json"),
        ("application/connect+proto", STREAM_TYPES, "proto"),
        ("application/connect+proto", UNARY_TYPES, None),
        ("application/proto", STREAM_TYPES, None),
        ("application/grpc", UNARY_TYPES, None),
        ("application/json; charset=latin-1", UNARY_TYPES, None),
        ("application/json; x=1", UNARY_TYPES, None),
        ("", UNARY_TYPES, None),
    ],
)
def test_the_content_type_names_the_codec(content_type, known, name):
    if name is None:
        with pytest.raises(UnsupportedMediaType):
            codec_of(content_type, known)
    else:
        assert codec_of(content_type, known).name == name


# Compression
@pytest.mark.parametrize(
    ("accept", "request_encoding", "is_taken"),
    [
        ("", "", False),
        ("", "gzip", True),
        ("gzip", "", True),
        ("br,gzip, zstd", "", True),
        ("gzip;q=0.5, br", "", True),
        ("gzip; q=0", "gzip", False),
        ("br", "gzip", False),
        ("gzipped", "", False),
    ],
)
def test_gzip_is_sent_to_those_who_take_it(accept, request_encoding, is_taken):
    assert takes_gzip(accept, request_encoding) is is_taken


@pytest.mark.parametrize("encoding", ["br", "zstd", "GZIP", "gzip, gzip", "x" * 500])
def test_an_unknown_encoding_is_refused_naming_what_is_known(encoding):
    with pytest.raises(Unimplemented, match="gzip is"):
        is_gzip(encoding)


# GET
def test_a_get_carries_text_or_base64_in_either_alphabet():
    text = GetRequest.of_query(b"encoding=json&message=%7B%22a%22%3A+1%7D")
    assert (text.codec.name, text.message) == ("json", b'{"a": 1}')
    for query in (b"_-8", b"_-8%3D", b"%2F%2B8"):
        binary = GetRequest.of_query(b"message=" + query + b"&base64=1&encoding=proto")
        assert (binary.codec.name, binary.message) == ("proto", b"\xff\xef")


def test_a_base64_parameter_that_is_not_one_is_ignored():
    given = GetRequest.of_query(b"base64=0&encoding=json&message=abcd&compression=gzip&x=1&x=2")
    assert (given.message, given.encoding) == (b"abcd", "gzip")


@given(st.binary(max_size=100))
def test_any_query_is_read_or_refused(query):
    try:
        GetRequest.of_query(query)
    except TenfoldError as error:
        assert error.message


# Envelopes
@given(st.binary(max_size=100), st.booleans())
def test_any_body_holds_one_message_or_is_refused(body, gzip):
    try:
        only_message(body, gzip=gzip, bytes_max=50)
    except TenfoldError as error:
        assert error.message


@given(st.binary(max_size=100))
def test_an_envelope_gives_back_what_was_put_in(data):
    assert only_message(envelope(data), gzip=False, bytes_max=100) == data
    assert only_message(envelope(data), gzip=True, bytes_max=100) == data


def test_a_packed_message_is_bounded_by_what_it_unpacks_to():
    packed = envelope(gzip.compress(b"x" * 100), flags=1)
    assert only_message(packed, gzip=True, bytes_max=100) == b"x" * 100
    with pytest.raises(BodyTooLarge):
        only_message(packed, gzip=True, bytes_max=99)


def test_a_length_beyond_the_limit_is_refused_by_its_head_alone():
    with pytest.raises(BodyTooLarge):
        only_message(struct.pack(">BI", 0, 101), gzip=False, bytes_max=100)


@pytest.mark.parametrize("flags", [2, 3, 4, 0x80, 0xFF])
def test_flags_that_are_no_requests_are_refused(flags):
    with pytest.raises(InvalidRequest, match=f"0x{flags:02x}"):
        only_message(envelope(b"{}", flags=flags), gzip=True, bytes_max=9)


def test_a_stream_has_no_heartbeat_and_one_end():
    framing = ConnectFraming(CODECS["proto"], gzip=False)
    assert framing.content_type == b"application/connect+proto"
    assert (framing.opening(), framing.heartbeat()) == (b"", b"")
    assert framing.message("c1", b"abc") == b"\0\0\0\0\3abc"
    assert framing.end() == b"\2\0\0\0\2{}"
    assert framing.error(b'{"code":"x"}') == b'\2\0\0\0\x16{"error":{"code":"x"}}'
