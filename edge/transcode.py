"""HTTP request -> message; message -> JSON, by the google.api.http rule of a route.

http.proto, "Rules for HTTP mapping": path variables first, then the body, then every
field that is left is a query parameter. Peers silently let one source win over
another; here a field may come from two only with the same value, and an unknown or
doubly set field is refused by its JSON name.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message

from edge.codec import Codecs, MessageCodec, Setter, read_json
from edge.fields import AnyMessage, descriptor_of
from edge.json_text import Wrong
from edge.query import Leaf, find_leaf, gather, parse_query, set_leaf
from edge.routes import Route
from edge.well_known import ToJson
from shared.errors import Internal, InvalidRequest

HTTP_BODY = "google.api.HttpBody"
# More routes than any contract set has; old contracts leave the cache after a swap.
_PLANS_MAX = 4096


@dataclass(frozen=True, eq=False)
class Plan:
    """What is compiled for one route.

    Attributes:
        request: the codec of the whole request.
        response: the codec of the whole answer.
        variables: path variables: proto field path -> the field.
        body_field: the field that the body fills; None for "*" and for no body.
        set_body: fills it; None as above.
        read_response_body: makes the JSON of the answer's field; None for the whole answer.
        taken: proto paths that a query parameter must not touch.
    """

    request: MessageCodec
    response: MessageCodec
    variables: dict[str, Leaf]
    body_field: FieldDescriptor | None
    set_body: Setter | None
    read_response_body: ToJson | None
    taken: frozenset[tuple[str, ...]]


def request_message(
    route: Route,
    captures: dict[str, str],
    query_string: bytes,
    body: bytes,
    *,
    content_type: str = "",
) -> Message:
    """Make the request message of a call.

    Args:
        route: not a raw one.
        captures: as RouteTable.match returns them.
        query_string: undecoded, without "?"; may be empty.
        body: JSON, or any bytes where the body is a google.api.HttpBody; may be empty.
        content_type: of the body, for HttpBody only.

    Raises:
        InvalidRequest: something does not fit; violations name fields by JSON name.
    """
    plan = plan_of(route)
    message = plan.request.message_class()
    try:
        _read_body(route, plan, message, body, content_type)
        for field_path, text in captures.items():
            _set_captured(message, plan.variables[field_path], text)
        if query_string:
            _read_query(route, plan, message, query_string)
    except Wrong as wrong:
        raise invalid_request(wrong) from None
    return message


def response_json(route: Route, message: Message) -> bytes:
    """Write an answer as JSON: the message, or the field that response_body names.

    Raises:
        Internal: the answer holds what JSON cannot write (a time out of range, an unknown Any).
    """
    plan = plan_of(route)
    try:
        if plan.read_response_body is not None:
            return orjson.dumps(plan.read_response_body(message))
        return plan.response.json_of_message(message)
    except ValueError as error:
        raise Internal(f"the answer of {route.method.full_name} is no JSON: {error}") from error


def http_body_of(route: Route, message: Message) -> tuple[str, bytes] | None:
    """The content type and bytes of an answer that is (or whose response_body is) an HttpBody."""
    target: AnyMessage = getattr(message, route.response_body) if route.response_body else message
    if getattr(getattr(target, "DESCRIPTOR", None), "full_name", "") != HTTP_BODY:
        return None
    return target.content_type or "application/octet-stream", target.data


def set_request_id(message: Message, key: str) -> None:
    """Put the Idempotency-Key header into the request.

    Raises:
        InvalidRequest: the body holds another request_id.
    """
    request: Any = message
    if request.request_id and request.request_id != key:
        raise InvalidRequest.of_field("requestId", "differs from the Idempotency-Key header")
    request.request_id = key


def invalid_request(wrong: Wrong) -> InvalidRequest:
    """The error that a caller sees."""
    if wrong.field:
        return InvalidRequest.of_field(wrong.field, wrong.description)
    return InvalidRequest(f"The request {wrong.description}")


@lru_cache(maxsize=_PLANS_MAX)
def plan_of(route: Route) -> Plan:
    """The compiled plan of a route; call it for each route at start, so that no request pays."""
    request, answer = descriptor_of(route.method.input), descriptor_of(route.method.output)
    codecs = codecs_of(request.file.pool)
    variables = {}
    if route.raw is None:
        paths = [variable.field_path for variable in route.template.variables]
        variables = {path: find_leaf(request, path) for path in paths}
    body_field = request.fields_by_name[route.body] if route.body not in {"", "*"} else None
    taken = {leaf.path for leaf in variables.values()}
    if body_field is not None:
        taken.add((body_field.name,))
    read = None
    if route.response_body:
        read = codecs.value_of(answer.fields_by_name[route.response_body])[1]
    return Plan(
        request=codecs.of(request),
        response=codecs.of(answer),
        variables=variables,
        body_field=body_field,
        set_body=codecs.value_of(body_field)[0] if body_field is not None else None,
        read_response_body=read,
        taken=frozenset(taken),
    )


@lru_cache(maxsize=16)
def codecs_of(pool: DescriptorPool) -> Codecs:
    """The codecs of a pool, shared by its routes."""
    return Codecs(pool)


def _read_body(
    route: Route, plan: Plan, message: AnyMessage, body: bytes, content_type: str
) -> None:
    if not body:
        return
    if not route.body:
        raise Wrong("must have no body")
    field = plan.body_field
    target = plan.request.descriptor if field is None else field.message_type
    if target is not None and target.full_name == HTTP_BODY:
        http_body = message if field is None else getattr(message, field.name)
        http_body.content_type, http_body.data = content_type, body
    elif field is None:
        read_json(plan.request.into, message, body)
    elif plan.set_body is not None:
        try:
            read_json(plan.set_body, message, body)
        except Wrong as wrong:
            raise wrong.within(field.json_name or field.name) from None


def _set_captured(message: AnyMessage, leaf: Leaf, text: str) -> None:
    """Set a field from the path; a body may repeat it (AIP-134), not contradict it."""
    target = message
    for field in leaf.fields[:-1]:
        target = getattr(target, field.name)
    name = leaf.fields[-1].name
    before = getattr(target, name)
    set_leaf(message, leaf, [text])
    if before != leaf.fields[-1].default_value and before != getattr(target, name):
        raise Wrong.of_field(leaf.json_path, "differs from the path")


def _read_query(route: Route, plan: Plan, message: AnyMessage, query_string: bytes) -> None:
    pairs = parse_query(query_string)
    if route.body == "*" and pairs:
        # http.proto: with "*", all that the path leaves is the body's.
        raise Wrong.of_field(pairs[0][0][:64], "is no parameter: send it in the body")
    for leaf, texts in gather(pairs, plan.request.descriptor):
        for length in range(1, len(leaf.path) + 1):
            if leaf.path[:length] in plan.taken:
                raise Wrong.of_field(leaf.json_path, "belongs to the path or the body")
        set_leaf(message, leaf, texts)
