"""The error family, by what a caller may do about it.

    TenfoldError
    ├── fix the request
    │   ├── InvalidRequest        a field is wrong: the violations name it
    │   ├── Unauthenticated       no credential, or one that is not valid
    │   ├── PermissionDenied      a valid caller that may not do this
    │   ├── NotFound              absent, or another tenant's: they look alike
    │   ├── AlreadyExists         the name is taken
    │   └── FailedPrecondition    the state forbids it: a business refusal, stored under its key
    ├── wait
    │   ├── QuotaExceeded         out of points until retry_after_s
    │   └── Overloaded            the server is full until retry_after_s
    ├── retry
    │   ├── Aborted               lost a race; the same request may pass
    │   ├── Unavailable           a part is down; the outcome may be unknown
    │   │   └── Unreachable       the server itself: nobody there has put it into words
    │   └── DeadlineExceeded      the time was spent; the outcome may be unknown
    └── give up
        ├── Unimplemented         no such method
        └── Internal              our bug; the log has it under the request id

A service's errors subclass these, live in its domain.py and set `reason`.
`shared/rpc/status.py` maps them to gRPC, `edge/problem.py` to HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

ERROR_DOMAIN = "tenfold.dev"


@dataclass(frozen=True)
class Violation:
    """One wrong field: its path in proto names ("entries[0].amount"), and what to do."""

    field: str
    description: str


class TenfoldError(Exception):
    """An error that a caller is meant to see.

    Args:
        message: one sentence that says what is wrong and how to mend it; no secrets.
        metadata: values a program may need; they travel in ErrorInfo.
        retry_after_s: seconds after which the same request may pass, or None.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.error_reason = reason or self.reason


class InvalidRequest(TenfoldError):
    """A field of the request is wrong."""

    reason = "INVALID_REQUEST"

    def __init__(
        self, message: str, *, violations: Sequence[Violation] = (), reason: str | None = None
    ) -> None:
        super().__init__(message, reason=reason)
        self.violations = tuple(violations)

    @classmethod
    def of_field(cls, field: str, description: str) -> "InvalidRequest":
        """The usual case: one field, one remedy."""
        return cls(f"{field}: {description}", violations=[Violation(field, description)])


class Unauthenticated(TenfoldError):
    """No credential, or one that is not valid."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(TenfoldError):
    """The caller is known and may not do this."""

    reason = "PERMISSION_DENIED"


class NotFound(TenfoldError):
    """There is nothing of that name for this caller."""

    reason = "NOT_FOUND"


class AlreadyExists(TenfoldError):
    """The name is taken."""

    reason = "ALREADY_EXISTS"


class FailedPrecondition(TenfoldError):
    """The state of the resource forbids it: a business refusal."""

    reason = "FAILED_PRECONDITION"


class QuotaExceeded(TenfoldError):
    """The caller is out of quota points."""

    reason = "QUOTA_EXCEEDED"


class Overloaded(TenfoldError):
    """The server is full."""

    reason = "OVERLOADED"


class Aborted(TenfoldError):
    """The request lost a race; repeating it may pass."""

    reason = "ABORTED"


class RaceLost(Aborted):
    """A transaction was undone whole by the database; a server tries the call again itself."""


class Unavailable(TenfoldError):
    """A part that is needed does not answer."""

    reason = "UNAVAILABLE"


class Unreachable(Unavailable):
    """No server answered, or one without a word of its own.

    An Unavailable with details comes from a service that is alive and misses something, such as
    one shard of its data: what else is asked of it may well be answered.
    """


class DeadlineExceeded(TenfoldError):
    """The time for the call is spent."""

    reason = "DEADLINE_EXCEEDED"


class Unimplemented(TenfoldError):
    """There is no such method."""

    reason = "UNIMPLEMENTED"


class Internal(TenfoldError):
    """A bug of ours; the caller sees a request id, the log the rest."""

    reason = "INTERNAL"


class OutOfRange(InvalidRequest):
    """The request reached past the end; another's server says so, ours do not."""

    reason = "OUT_OF_RANGE"


class Unknown(Internal):
    """A bug of a server that is not ours, which names no code for it."""

    reason = "UNKNOWN"


class DataLoss(Internal):
    """What a server that is not ours calls beyond repair."""

    reason = "DATA_LOSS"


class IdempotencyKeyReused(InvalidRequest):
    """The same key came with another request."""

    reason = "IDEMPOTENCY_KEY_REUSED"


class IdempotencyInFlight(Aborted):
    """The first request under this key is still running."""

    reason = "IDEMPOTENCY_IN_FLIGHT"
