"""shared/rpc/status.py: kind, reason and details survive a hop."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from shared import errors
from shared.errors import InvalidRequest, TenfoldError, Violation
from shared.rpc.status import code_of, error_of, status_of

KINDS = [
    errors.Unauthenticated, errors.PermissionDenied, errors.NotFound, errors.AlreadyExists,
    errors.FailedPrecondition, errors.QuotaExceeded, errors.Overloaded, errors.Aborted,
    errors.Unavailable, errors.DeadlineExceeded, errors.Unimplemented, errors.Internal,
    errors.IdempotencyInFlight,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_comes_back_as_it_left(kind: type[TenfoldError]) -> None:
    error = kind("why", metadata={"key": "value"}, retry_after_s=1.5)
    status = status_of(error, request_id="r-1")
    back = error_of(status.code, status.message, status.details)
    assert type(back) is kind
    assert (back.message, back.error_reason, back.metadata, back.retry_after_s) == (
        "why", error.error_reason, {"key": "value"}, 1.5,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [InvalidRequest, errors.IdempotencyKeyReused])
def test_violations_come_back(kind: type[InvalidRequest]) -> None:
    violations = (Violation("entries[0].amount", "must be above 0"),)
    status = status_of(kind("wrong", violations=violations))
    back = error_of(status.code, status.message, status.details)
    assert type(back) is kind
    assert isinstance(back, InvalidRequest)
    assert back.violations == violations


def test_a_service_s_own_error_comes_back_as_its_kind_with_its_reason() -> None:
    class Closed(errors.FailedPrecondition):
        reason = "ACCOUNT_CLOSED"

    status = status_of(Closed("the account is closed"))
    back = error_of(status.code, status.message, status.details)
    assert (type(back), back.error_reason) == (errors.FailedPrecondition, "ACCOUNT_CLOSED")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.CANCELLED, errors.Unreachable),
        (grpc.StatusCode.UNAVAILABLE, errors.Unreachable),
        (grpc.StatusCode.UNKNOWN, errors.Unknown),
        (grpc.StatusCode.DATA_LOSS, errors.DataLoss),
        (grpc.StatusCode.OUT_OF_RANGE, errors.OutOfRange),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
    ],
)
@pytest.mark.parametrize("details", [None, b""])
def test_what_grpc_itself_says_becomes_the_nearest_kind(
    code: grpc.StatusCode, kind: type[TenfoldError], details: bytes | None
) -> None:
    assert type(error_of(code, "from the core", details)) is kind


def test_the_core_s_words_about_addresses_stay_inside() -> None:
    text = "failed to connect to ipv4:10.0.0.7:9090"
    assert "10.0.0.7" not in error_of(grpc.StatusCode.UNAVAILABLE, text, None).message


def test_a_status_stays_below_what_metadata_may_hold() -> None:
    violations = [Violation("f" * 1000, "d" * 1000) for _ in range(1000)]
    error = InvalidRequest("m" * 100_000, violations=violations)
    error.metadata.update({f"key-{n}": "v" * 1000 for n in range(1000)})
    assert len(status_of(error).details) < 12_000


def foreign(*details, code=grpc.StatusCode.UNAVAILABLE):
    status = status_pb2.Status(code=code.value[0], message="theirs")
    for detail in details:
        status.details.add().Pack(detail)
    return error_of(code, "theirs", status.SerializeToString())


@pytest.mark.parametrize(
    ("delay", "retry_after_s"),
    [
        (Duration(seconds=2, nanos=500_000_000), 2.5),
        (Duration(), 0.0),
        (Duration(seconds=-5), 0.0),
        (Duration(seconds=2**63 - 1), float(2**63)),
    ],
)
@pytest.mark.parametrize(
    "code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK], ids=lambda c: c.name
)
def test_the_delay_of_any_server_s_retry_info_is_kept(
    code: grpc.StatusCode, delay: Duration, retry_after_s: float
) -> None:
    assert foreign(RetryInfo(retry_delay=delay), code=code).retry_after_s == retry_after_s


def test_without_a_delay_nothing_is_made_up() -> None:
    assert foreign().retry_after_s is None
    assert foreign(RetryInfo()).retry_after_s is None


def test_a_foreign_server_that_says_why_is_out_of_quota_not_full() -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert type(foreign(ErrorInfo(domain="other.example"), code=code)) is errors.QuotaExceeded
    assert type(foreign(code=code)) is errors.Overloaded


def test_details_that_do_not_parse_are_none() -> None:
    status = status_pb2.Status(code=14, message="theirs")
    status.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff")
    error = error_of(grpc.StatusCode.UNAVAILABLE, "", status.SerializeToString())
    assert (type(error), error.retry_after_s) == (errors.Unavailable, None)


def test_every_kind_of_the_family_has_a_code() -> None:
    for kind in KINDS:
        assert code_of(kind("x")) is not grpc.StatusCode.UNKNOWN
