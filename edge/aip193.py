"""Error -> the JSON of AIP-193, for clients that were written for Google's APIs.

The same facts as a problem document, under other names: one member `error` with the HTTP
status, the message, gRPC's code and google.rpc details. Chosen for the whole edge by a
setting. What the HTTP server refuses before it is a request stays a problem document.
"""

import math
from collections.abc import Iterator
from typing import Any

from edge.problem import Problem, problem_of
from edge.routes import Route
from shared.errors import ERROR_DOMAIN, Internal, TenfoldError

CONTENT_TYPE = "application/json"
_TYPE = "type.googleapis.com/google.rpc."


def google_error_of(error: TenfoldError, *, request_id: str, route: Route | None = None) -> Problem:
    """See problem.problem_of."""
    problem = problem_of(error, request_id=request_id, route=route)
    document = {
        "code": problem.status,
        "message": problem.document["detail"],
        "status": problem.document["code"],
        "details": list(_details(error, problem.document)),
    }
    headers = problem.headers | {"content-type": CONTENT_TYPE}
    return Problem(problem.status, document, headers, envelope="error")


def _details(error: TenfoldError, told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the problem document tells, as google.rpc messages in JSON."""
    yield {
        "@type": f"{_TYPE}ErrorInfo",
        "reason": told["reason"],
        "domain": ERROR_DOMAIN,
        "metadata": told.get("details", {}),
    }
    yield {"@type": f"{_TYPE}RequestInfo", "requestId": told["request_id"]}
    if "violations" in told:
        violations = [
            {"field": violation["field"], "description": violation["description"]}
            for violation in told["violations"]
        ]
        yield {"@type": f"{_TYPE}BadRequest", "fieldViolations": violations}
    if "violated-policies" in told:
        subjects = error.metadata.get("subject", "")
        quotas = [
            {"subject": subjects, "description": told["detail"], "quotaId": name}
            for name in told["violated-policies"]
        ]
        yield {"@type": f"{_TYPE}QuotaFailure", "violations": quotas}
    if error.retry_after_s is not None and not isinstance(error, Internal):
        # In whole seconds, as Retry-After.
        seconds = max(0, math.ceil(error.retry_after_s))
        yield {"@type": f"{_TYPE}RetryInfo", "retryDelay": f"{seconds}s"}
