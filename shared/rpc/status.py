"""TenfoldError <-> gRPC status: one table, read both ways.

A status carries google.rpc details: ErrorInfo always (reason, domain, metadata), RequestInfo
with the request id, BadRequest with the violations, RetryInfo, QuotaFailure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from shared import errors
from shared.errors import ERROR_DOMAIN, InvalidRequest, TenfoldError, Violation

STATUS_DETAILS_KEY = "grpc-status-details-bin"

# A status travels in trailing metadata, which the peer bounds to 8 KiB: these keep it below.
MESSAGE_CHARACTERS_MAX = 1024
VIOLATIONS_MAX = 16
VIOLATION_CHARACTERS_MAX = 200
METADATA_ENTRIES_MAX = 16
METADATA_CHARACTERS_MAX = 128

# One row per thing a caller can do. Overloaded and QuotaExceeded share a code; the detail
# QuotaFailure tells them apart.
_CODES: Mapping[type[TenfoldError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.Internal: grpc.StatusCode.INTERNAL,
    # Of servers that are not ours: the same to a caller as the class above each.
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Unknown: grpc.StatusCode.UNKNOWN,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
}

# A reason whose class says more than its code.
_BY_REASON: Mapping[str, type[TenfoldError]] = {
    kind.reason: kind for kind in (errors.IdempotencyKeyReused, errors.IdempotencyInFlight)
}

_BY_CODE: Mapping[grpc.StatusCode, type[TenfoldError]] = {
    **{code: kind for kind, code in _CODES.items()},
    # Nobody here asked for it: the core refused without a word (spec d.1).
    grpc.StatusCode.CANCELLED: errors.Unavailable,
}


@dataclass(frozen=True)
class Status:
    """What a failed call answers.

    Attributes:
        code: the gRPC code.
        message: one sentence.
        details: a serialized google.rpc.Status.
    """

    code: grpc.StatusCode
    message: str
    details: bytes

    @property
    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """The details as gRPC carries them."""
        return ((STATUS_DETAILS_KEY, self.details),)


def code_of(error: TenfoldError) -> grpc.StatusCode:
    """The gRPC code of an error: that of the nearest class in the table."""
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    return grpc.StatusCode.INTERNAL


def status_of(error: TenfoldError, *, request_id: str = "") -> Status:
    """The status that tells a caller of this error."""
    code, message = code_of(error), error.message[:MESSAGE_CHARACTERS_MAX]
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=error.error_reason, domain=ERROR_DOMAIN)
    for key in sorted(error.metadata)[:METADATA_ENTRIES_MAX]:
        info.metadata[key] = error.metadata[key][:METADATA_CHARACTERS_MAX]
    status.details.add().Pack(info)
    if request_id:
        status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    if isinstance(error, InvalidRequest) and error.violations:
        status.details.add().Pack(_bad_request(error))
    if isinstance(error, errors.QuotaExceeded):
        status.details.add().Pack(_quota_failure(error))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return Status(code, message, status.SerializeToString())


def _bad_request(error: InvalidRequest) -> error_details_pb2.BadRequest:
    detail = error_details_pb2.BadRequest()
    for violation in error.violations[:VIOLATIONS_MAX]:
        detail.field_violations.add(
            field=violation.field[:VIOLATION_CHARACTERS_MAX],
            description=violation.description[:VIOLATION_CHARACTERS_MAX],
        )
    return detail


def _quota_failure(error: errors.QuotaExceeded) -> error_details_pb2.QuotaFailure:
    """One violation per quota that is used up; the subject says who shares it."""
    detail = error_details_pb2.QuotaFailure()
    names = error.metadata.get("quota", "").split(",")
    subjects = error.metadata.get("subject", "").split(",")
    for place, name in enumerate(names[:VIOLATIONS_MAX]):
        violation = detail.violations.add(
            subject=subjects[min(place, len(subjects) - 1)],
            description=error.message[:VIOLATION_CHARACTERS_MAX],
        )
        violation.quota_id = name
    return detail


def error_of(code: grpc.StatusCode, message: str, details: bytes | None) -> TenfoldError:
    """The error that another process raised, or the nearest to what gRPC itself says.

    Args:
        code: of the call.
        message: of the call; used only when there are no details.
        details: the value of STATUS_DETAILS_KEY in the trailing metadata, if any.
    """
    parsed = _Details.parse(details)
    kind = _BY_CODE.get(code, errors.Internal)
    if kind in {errors.QuotaExceeded, errors.Overloaded}:
        # The core says the same code without a word when it is full; others mean quotas by it.
        is_quota = parsed.is_quota or parsed.is_foreign
        kind = errors.QuotaExceeded if is_quota else errors.Overloaded
    if kind is errors.Unavailable and not details:
        kind = errors.Unreachable
    kind = _BY_REASON.get(parsed.reason, kind)
    text = parsed.message or _text_of_core(code, message)
    if issubclass(kind, InvalidRequest):
        refusal = kind(text, violations=parsed.violations, reason=parsed.reason or None)
        refusal.metadata.update(parsed.metadata or {})
        refusal.retry_after_s = parsed.retry_after_s
        return refusal
    return kind(
        text,
        metadata=parsed.metadata,
        retry_after_s=parsed.retry_after_s,
        reason=parsed.reason or None,
    )


def _text_of_core(code: grpc.StatusCode, message: str) -> str:
    # gRPC's own texts name addresses; callers further out have no use for them.
    if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
        return "a service that is needed does not answer"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "the time for this call is spent"
    if code in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS}:
        return "an internal error occurred"
    return message[:MESSAGE_CHARACTERS_MAX] or code.name.lower().replace("_", " ")


@dataclass(frozen=True)
class _Details:
    message: str = ""
    reason: str = ""
    metadata: Mapping[str, str] | None = None
    violations: tuple[Violation, ...] = ()
    retry_after_s: float | None = None
    is_quota: bool = False
    is_foreign: bool = False

    @classmethod
    def parse(cls, details: bytes | None) -> "_Details":
        if not details:
            return cls()
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        try:
            status = status_pb2.Status.FromString(details)
            for detail in status.details:
                for target in (info, bad, retry):
                    if detail.Is(target.DESCRIPTOR):
                        detail.Unpack(target)
        except DecodeError:
            return cls()
        delay = retry.retry_delay
        delay_s = max(0.0, delay.seconds + delay.nanos / 1e9)
        return cls(
            message=status.message,
            reason=info.reason,
            metadata=dict(info.metadata),
            violations=tuple(Violation(v.field, v.description) for v in bad.field_violations),
            retry_after_s=delay_s if retry.HasField("retry_delay") else None,
            is_foreign=bool(status.details) and info.domain != ERROR_DOMAIN,
            is_quota=any(
                detail.Is(error_details_pb2.QuotaFailure.DESCRIPTOR) for detail in status.details
            ),
        )
