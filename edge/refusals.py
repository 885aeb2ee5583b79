"""What HTTP alone can refuse: statuses that no gRPC code stands for.

They are TenfoldErrors like the rest, so that a caller sees one error shape everywhere;
`http_status` says which status their problem document carries.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from shared.errors import FailedPrecondition, InvalidRequest, Violation

# Reasons of refusals that have problem types of their own: one address asks for more than any
# caller would; less can be served than the caller's quota says.
ABNORMAL_USAGE, CAPACITY_REDUCED = "ABNORMAL_USAGE", "CAPACITY_REDUCED"


class HttpRefusal(InvalidRequest):
    """The request breaks a rule of HTTP itself."""

    http_status: ClassVar[int] = 400
    reason = "BAD_HTTP"

    def __init__(
        self,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
    ) -> None:
        super().__init__(message, violations=violations)
        self.headers = dict(headers or {})


class MethodNotAllowed(HttpRefusal):
    """The path exists, for other methods."""

    http_status = 405
    reason = "METHOD_NOT_ALLOWED"


class NotAcceptable(HttpRefusal):
    """Nothing that the client accepts can be produced."""

    http_status = 406
    reason = "NOT_ACCEPTABLE"


class RequestTimeout(HttpRefusal):
    """The body came too slowly."""

    http_status = 408
    reason = "BODY_TOO_SLOW"


class BodyTooLarge(HttpRefusal):
    """The body is longer than this route takes."""

    http_status = 413
    reason = "BODY_TOO_LARGE"


class UnsupportedMediaType(HttpRefusal):
    """The body is in a format, charset or coding that is not taken."""

    http_status = 415
    reason = "UNSUPPORTED_MEDIA_TYPE"


class PreconditionUnsupported(HttpRefusal):
    """A conditional header that this route cannot keep; to ignore it would break its promise."""

    reason = "PRECONDITION_UNSUPPORTED"


class PreconditionFailed(FailedPrecondition):
    """The resource is not the one that If-Match names; `edge.problem` answers it with 412."""

    reason = "PRECONDITION_FAILED"


class HeadersTooLarge(HttpRefusal):
    """The headers that go on to the service are longer than it would take."""

    http_status = 431
    reason = "HEADERS_TOO_LARGE"


class ClientLeft(Exception):
    """The connection is gone: nobody waits for an answer."""
