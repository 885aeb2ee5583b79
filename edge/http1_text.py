"""What HTTP/1.1 answers begin with, and those that refuse what never became a request."""

import time
from email.utils import formatdate
from http import HTTPStatus

import orjson

HeaderList = list[tuple[bytes, bytes]]

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
# gRPC's name, and the reason, of each status that the server itself refuses with.
_CODES = {408: "DEADLINE_EXCEEDED", 429: "RESOURCE_EXHAUSTED", 501: "UNIMPLEMENTED"}
_REASONS = {
    408: "HEADERS_TOO_SLOW",
    414: "TARGET_TOO_LARGE",
    429: "TOO_MANY_PIPELINED",
    431: "HEADERS_TOO_LARGE",
}


class Refusal(Exception):
    """This request ends its connection, with this status.

    Attributes:
        status: of the answer.
        detail: one sentence for the client.
        reason: for programs.
        request_id: finds it in the log; known when it is told.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.reason = _REASONS.get(status, "BAD_HTTP")
        self.request_id = ""


def status_line(status: int) -> bytes:
    """Any status has one; those of other protocols, such as 460 of tus, have no phrase."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


_date = (0, b"")


def date_line() -> bytes:
    """The Date header (RFC 9110 §6.6.1), made once a second."""
    global _date  # noqa: PLW0603 - one clock per process
    now_s = int(time.time())
    if _date[0] != now_s:
        _date = now_s, f"date: {formatdate(now_s, usegmt=True)}\r\n".encode()
    return _date[1]


def answer_of(refusal: Refusal) -> bytes:
    """The whole answer that tells of a refusal, as a problem document (RFC 9457)."""
    document = {
        "type": "about:blank",
        "title": HTTPStatus(refusal.status).phrase,
        "status": refusal.status,
        "detail": refusal.detail,
        "code": _CODES.get(refusal.status, "INVALID_ARGUMENT"),
        "reason": refusal.reason,
        "request_id": refusal.request_id,
    }
    body = orjson.dumps(document)
    head = (
        "content-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\n"
        "x-content-type-options: nosniff\r\n"
        f"x-request-id: {refusal.request_id}\r\n"
        "connection: close\r\n\r\n"
    )
    return status_line(refusal.status) + date_line() + head.encode("ascii") + body
