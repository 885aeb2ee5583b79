"""Error -> RFC 9457 problem document: the only place that knows HTTP's codes.

One shape everywhere, also inside streams: type, title, status, detail, and our members
code (gRPC's name), reason, request_id, details, violations.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote

import orjson
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from edge.fields import descriptor_of, is_map, map_fields
from edge.refusals import ABNORMAL_USAGE, CAPACITY_REDUCED, HttpRefusal, PreconditionFailed
from edge.routes import Route
from shared import errors
from shared.errors import ERROR_DOMAIN, InvalidRequest, TenfoldError, Violation
from shared.rpc.status import code_of

CONTENT_TYPE = "application/problem+json"
# What a caller sees of a bug: nothing of it.
INTERNAL_DETAIL = "Something failed on our side. The request id finds it in our log."

# draft-ietf-httpapi-ratelimit-headers-10, section 5: by a reason, else by an error class.
_IANA = "https://iana.org/assignments/http-problem-types#"
_QUOTA_TYPES: Mapping[str, tuple[str, str]] = {
    ABNORMAL_USAGE: (
        f"{_IANA}abnormal-usage-detected",
        "Request not satisfied due to detection of abnormal request pattern",
    ),
    CAPACITY_REDUCED: (
        f"{_IANA}temporary-reduced-capacity",
        "Request cannot be satisfied due to temporary server capacity constraints",
    ),
}
_QUOTA_EXCEEDED = (
    f"{_IANA}quota-exceeded",
    "Request cannot be satisfied as assigned quota has been exceeded",
)

# The canonical table of google.rpc.Code, by error class. Two rows differ from their code's:
# a server that is full is 503 and not the caller's 429, and a reused key is 422 (the
# Idempotency-Key draft, section 2.7).
_STATUS: Mapping[type[TenfoldError], HTTPStatus] = {
    errors.IdempotencyKeyReused: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.InvalidRequest: HTTPStatus.BAD_REQUEST,
    errors.Unauthenticated: HTTPStatus.UNAUTHORIZED,
    errors.PermissionDenied: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.AlreadyExists: HTTPStatus.CONFLICT,
    errors.FailedPrecondition: HTTPStatus.BAD_REQUEST,
    PreconditionFailed: HTTPStatus.PRECONDITION_FAILED,
    errors.QuotaExceeded: HTTPStatus.TOO_MANY_REQUESTS,
    errors.Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.Aborted: HTTPStatus.CONFLICT,
    errors.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.DeadlineExceeded: HTTPStatus.GATEWAY_TIMEOUT,
    errors.Unimplemented: HTTPStatus.NOT_IMPLEMENTED,
    errors.Internal: HTTPStatus.INTERNAL_SERVER_ERROR,
}

_PATH_PART = re.compile(
    r"\.?([A-Za-z_@][A-Za-z0-9_]*)"  # a field
    r"|\[([0-9]+)\]"  # an element
    r'|\["((?:[^"\\]|\\.)*)"\]'  # a map entry
    r'|\[([^"\[\]]*)\]'  # the same, as parameters have it
)


@dataclass(frozen=True)
class Problem:
    """An HTTP answer that tells of an error.

    Attributes:
        status: the HTTP status.
        headers: in lower case, beside content-length.
        document: the members of the problem document.
        envelope: the name of the member that holds the document in an answer; "" for none. In
            a stream the framing has its own.
    """

    status: int
    document: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    envelope: str = ""

    @property
    def body(self) -> bytes:
        """The whole answer."""
        return orjson.dumps({self.envelope: self.document}) if self.envelope else self.line

    @property
    def line(self) -> bytes:
        """The document as JSON without line breaks, so that a stream's last line can carry it."""
        return orjson.dumps(self.document)


class ErrorTeller(Protocol):
    """See problem_of: makes the answer that tells of an error, in one of several shapes."""

    def __call__(
        self, error: TenfoldError, *, request_id: str, route: Route | None = None
    ) -> Problem:
        """See problem_of."""
        ...


def problem_of(error: TenfoldError, *, request_id: str, route: Route | None = None) -> Problem:
    """Tell of an error.

    Args:
        error: what went wrong; of an Internal, only the request id is told.
        request_id: the correlation id of the request.
        route: gives the fields of violations their JSON names and pointers; None before routing.
    """
    status = status_of(error)
    detail = INTERNAL_DETAIL if isinstance(error, errors.Internal) else error.message
    document = _document(status, code_of(error).name, error.error_reason, detail, request_id)
    if error.metadata and not isinstance(error, errors.Internal):
        document["details"] = dict(sorted(error.metadata.items()))
    if isinstance(error, errors.QuotaExceeded) or error.error_reason in _QUOTA_TYPES:
        _tell_of_quota(document, error)
    if isinstance(error, InvalidRequest) and error.violations:
        told = [_violation(violation, route) for violation in error.violations]
        document["violations"] = told
        prefix = f"{error.violations[0].field}: "
        if detail.startswith(prefix):  # InvalidRequest.of_field: say it in JSON names too
            document["detail"] = f"{told[0]['field']}: {detail.removeprefix(prefix)}"
    return Problem(status, document, {"content-type": CONTENT_TYPE} | headers_of(error))


def _tell_of_quota(document: dict[str, Any], error: TenfoldError) -> None:
    """Give the document the type and the member that the RateLimit draft has for quotas.

    A quota of a service is no policy that a RateLimit field names: its reason stands for it.
    """
    kind = _QUOTA_TYPES.get(error.error_reason, _QUOTA_EXCEEDED)
    document["type"], document["title"] = kind
    names = error.metadata.get("quota") or error.error_reason.lower().replace("_", "-")
    document["violated-policies"] = names.split(",")


def headers_of(error: TenfoldError) -> dict[str, str]:
    """The headers that go with an error, in lower case, beside those of its document."""
    headers = dict(error.headers) if isinstance(error, HttpRefusal) else {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(0, math.ceil(error.retry_after_s)))
    if isinstance(error, errors.Unauthenticated):
        # RFC 9110, section 11.6.1. Never the message: peers copied it here and leaked it.
        headers["www-authenticate"] = "Bearer"
    return headers


def status_of(error: TenfoldError) -> HTTPStatus:
    """The HTTP status of an error: by its reason where that says more, else by its class."""
    if isinstance(error, HttpRefusal):
        return HTTPStatus(error.http_status)
    # A reason outlives the class: a service's error has become its gRPC kind on the way here.
    if error.error_reason == errors.IdempotencyKeyReused.reason:
        return HTTPStatus.UNPROCESSABLE_ENTITY
    if error.error_reason == errors.IdempotencyInFlight.reason:
        return HTTPStatus.CONFLICT
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return _STATUS[kind]
    return HTTPStatus.INTERNAL_SERVER_ERROR


def json_field(path: str, message: Descriptor | None) -> tuple[str, str]:
    """Translate a field path into JSON names.

    Args:
        path: as protovalidate and services write it: 'entries[0].amount', 'labels["a.b"]'.
            Names that are JSON names already, or of no field, stay as they are.
        message: where the path starts; None leaves all names as they are.

    Returns:
        The path in JSON names, and its JSON pointer (RFC 6901): "/entries/0/amount".
    """
    text = pointer = ""
    at = 0
    while at < len(path):
        found = _PATH_PART.match(path, at)
        if found is None:
            return path, ""
        name, *keys = found.groups()
        at = found.end()
        if name is not None:
            name, message = _json_name(name, message)
            text += f".{name}" if text else name
        else:
            text += found.group()
        token = next(part for part in (name, *keys) if part is not None)
        pointer += "/" + token.replace("~", "~0").replace("/", "~1")
    return text, pointer


def _json_name(name: str, message: Descriptor | None) -> tuple[str, Descriptor | None]:
    """The JSON name of a field, and the message that follows it."""
    if message is None:
        return name, None
    found = message.fields_by_name.get(name)
    if found is None:
        found = next((f for f in message.fields if f.json_name == name), None)
    if found is None:
        return name, None
    return found.json_name, _next_message(found)


def _next_message(descriptor: FieldDescriptor) -> Descriptor | None:
    return map_fields(descriptor)[1].message_type if is_map(descriptor) else descriptor.message_type


def _violation(violation: Violation, route: Route | None) -> dict[str, str]:
    message = descriptor_of(route.method.input) if route is not None else None
    name, pointer = json_field(violation.field, message)
    told = {"field": name, "description": violation.description}
    if pointer and route is not None:
        told["in"], told["pointer"] = _place_of(pointer, route)
    return told


def _place_of(pointer: str, route: Route) -> tuple[str, str]:
    """The part of the HTTP request that fills a field, and a JSON pointer to it.

    Into the body it is a URI fragment, the form that RFC 9457 shows, from where the body
    begins. For a parameter it is a plain pointer (RFC 6901), from the request message.
    """
    message = descriptor_of(route.method.input)
    if route.raw is None:
        variables = (variable.field_path for variable in route.template.variables)
        if pointer in {json_field(path, message)[1] for path in variables}:
            return "path", pointer
    if route.body == "*":
        return "body", f"#{pointer}"
    if route.body:
        body = "/" + message.fields_by_name[route.body].json_name
        if pointer == body or pointer.startswith(f"{body}/"):
            return "body", f"#{pointer.removeprefix(body)}"
    return "query", pointer


def _document(
    status: HTTPStatus, code: str, reason: str, detail: str, request_id: str
) -> dict[str, Any]:
    return {
        "type": f"https://{ERROR_DOMAIN}/errors/{quote(reason.lower().replace('_', '-'))}",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
        "code": code,
        "reason": reason,
        "request_id": request_id,
    }
