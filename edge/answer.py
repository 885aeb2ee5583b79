"""message -> HTTP answer: status, headers and body of a unary call that succeeded."""

import re
from dataclasses import dataclass

from google.protobuf.message import Message

from edge.compiled import compiled
from edge.contracts import ContractError
from edge.etags import Condition, ETags, etags_of, tag_of_etag
from edge.fields import AnyMessage, descriptor_of
from edge.http1_text import HeaderList
from edge.negotiation import choose_media_type
from edge.routes import NAME_FIELD, Route
from edge.transcode import HTTP_BODY, JSON, answer_type, response_json
from shared.rpc.policy import Access

OCTET_STREAM = b"application/octet-stream"
OK, NO_CONTENT, NOT_MODIFIED = 200, 204, 304
SUCCESS_STATUSES = (OK, 201, 202, NO_CONTENT)
EMPTY = "google.protobuf.Empty"
_ROUTES_MAX = 4096

# RFC 9110, section 8.3.1. A service's own words go into a header: they must fit there.
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,127}"
_CONTENT_TYPE = re.compile(rf"{_WORD}/{_WORD}(?:[ \t]*;[ -~]{{0,255}})?")


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    headers: HeaderList
    body: bytes


@dataclass(frozen=True, eq=False)
class Answers:
    """How one route answers.

    Attributes:
        route: not of a stream.
        status: of every success.
        is_json: whether a body is JSON; else it is an HttpBody.
        etags: what it does with entity tags.
        cache_control: of every success.
    """

    route: Route
    status: int
    is_json: bool
    etags: ETags
    cache_control: tuple[bytes, bytes]

    def require_acceptable(self, accept: str) -> None:
        """Refuse a client that takes no JSON; what an HttpBody is, only its service knows.

        Raises:
            NotAcceptable: as said.
        """
        if accept and self.is_json and self.status != NO_CONTENT:
            choose_media_type(accept, [JSON])

    def of(self, message: Message, condition: Condition | None) -> Answer:
        """The answer that a message becomes.

        Raises:
            Internal: the message holds what JSON cannot write.
        """
        headers = [self.cache_control]
        if self.etags.is_answered:
            tag = tag_of_etag(self._resource(message).etag)
            known = condition.known_form(tag) if condition is not None else ""
            if tag:
                headers.append((b"etag", (known or tag).encode()))
            if known:
                return Answer(NOT_MODIFIED, headers, b"")
        if self.route.served_at:
            headers += self._location(message)
        if self.status == NO_CONTENT:
            return Answer(NO_CONTENT, headers, b"")
        if not self.is_json:
            http_body = self._resource(message)
            headers.append((b"content-type", content_type_of(http_body.content_type)))
            return Answer(self.status, headers, http_body.data)
        headers.append((b"content-type", JSON.encode()))
        pretty = self.route.json.pretty
        return Answer(self.status, headers, response_json(self.route, message, pretty=pretty))

    def _resource(self, message: AnyMessage) -> AnyMessage:
        field = self.route.response_body
        return getattr(message, field) if field else message

    def _location(self, message: Message) -> HeaderList:
        """Where a GET answers with what was created; nothing if its name fits no such path."""
        name = getattr(self._resource(message), NAME_FIELD)
        paths = (template.path_of(name) for template in self.route.served_at)
        return [(b"location", path.encode()) for path in paths if path][:1]


@compiled(_ROUTES_MAX)
def answers_of(route: Route) -> Answers:
    """How a route answers; call it for each route at start.

    Raises:
        ContractError: its contract names a status that no answer of it can have.
    """
    return Answers(
        route=route,
        status=_status(route),
        is_json=answer_type(route) != HTTP_BODY,
        etags=etags_of(route),
        cache_control=(b"cache-control", cache_control(route)),
    )


def _status(route: Route) -> int:
    options = route.method.options
    if not options.HasField("success_status"):
        return OK
    status, what = options.success_status, f"{route.method.full_name}: success_status"
    if status not in SUCCESS_STATUSES:
        raise ContractError(f"{what} {status} is none of {SUCCESS_STATUSES}")
    if route.raw is not None or route.method.policy.is_stream:
        raise ContractError(f"{what} is for unary methods: a stream always begins with 200")
    if status == NO_CONTENT and descriptor_of(route.method.output).full_name != EMPTY:
        raise ContractError(f"{what} 204 would lose the answer: only {EMPTY} has nothing to say")
    return status


def content_type_of(text: str) -> bytes:
    """What a service says of its bytes, if a header can say it; else that they are bytes."""
    return text.encode() if _CONTENT_TYPE.fullmatch(text) else OCTET_STREAM


def cache_control(route: Route) -> bytes:
    """For how long, and by whom, an answer of this route may be reused."""
    seconds = route.method.options.cache_max_age.seconds
    if not seconds:
        return b"no-store"
    who = "public" if route.method.policy.access is Access.PUBLIC else "private"
    return f"{who}, max-age={seconds}".encode()
