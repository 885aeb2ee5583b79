"""HTTP request -> message; message -> JSON, by the google.api.http rule of a route.

http.proto, "Rules for HTTP mapping": path variables first, then the body, then every
field that is left is a query parameter. Peers silently let one source win over
another; here a field may come from two only with the same value, and an unknown or
doubly set field is refused by its JSON name. A contract may have unknown names ignored.
"""

from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from edge.codec import (
    JsonReader,
    MessageCodec,
    codecs_of,
    require_parsable,
    write_json,
)
from edge.compiled import compiled
from edge.fields import AnyMessage, JsonValue, descriptor_of, fields_by_any_name
from edge.ignored import Ignored
from edge.json_text import Wrong
from edge.masks import UpdateMask, update_mask_of
from edge.query import Leaf, TextDecode, find_leaf, gather, parse_query, set_leaf
from edge.routes import Route
from edge.well_known import ToJson
from shared.errors import Internal, InvalidRequest

HTTP_BODY = "google.api.HttpBody"
JSON = "application/json"
NAME_CHARACTERS_TOLD_MAX = 64
# More routes than any contract set has; old contracts leave the cache after a swap.
_PLANS_MAX = 4096


@dataclass(frozen=True, eq=False)
class Plan:
    """What is compiled for one route.

    Attributes:
        request: the codec of the whole request.
        variables: path variables: proto field path -> the field.
        body_field: the field that the body fills; None for "*" and for no body.
        read_body: fills the message, or that field; None without a body.
        takes_any_body: whether the body is an HttpBody, and so of any media type.
        answer_json: makes the JSON value of the answer, or of its response_body.
        taken: proto paths that a query parameter must not touch.
        taken_roots: the first name of each.
        plain: by JSON name and proto name, the field's name and what decodes its text: of query
            parameters that are one scalar each; the others take a longer way.
        rewritten: variables that the body may name, too.
        update_mask: checks or makes the field mask of an update; None if there is none.
        ignored: learns of unknown names where the contract ignores them; None refuses them.
    """

    request: MessageCodec
    variables: dict[str, Leaf]
    body_field: FieldDescriptor | None
    read_body: JsonReader | None
    takes_any_body: bool
    answer_json: ToJson
    taken: frozenset[tuple[str, ...]]
    taken_roots: frozenset[str]
    plain: dict[str, tuple[str, TextDecode]]
    rewritten: frozenset[str]
    update_mask: UpdateMask | None
    ignored: Ignored | None


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
        document = _read_body(plan, message, body, content_type)
        for field_path, text in captures.items():
            if body and field_path in plan.rewritten:
                _set_rewritten(message, plan.variables[field_path], text)
            else:
                set_leaf(message, plan.variables[field_path], [text])
        if query_string:
            _read_query(route, plan, message, query_string)
        complete(plan, message, document)
    except Wrong as wrong:
        raise invalid_request(wrong) from None
    return message


def complete(plan: Plan, message: AnyMessage, document: JsonValue = None) -> None:
    """Check, or make, what a request needs beside the fields that it was given.

    Args:
        plan: of its route.
        message: the request.
        document: the JSON of its body, for a mask that is made from it.

    Raises:
        Wrong: its mask names no field, or the service could not read the message.
    """
    if plan.update_mask is not None:
        plan.update_mask.complete(message, document)
    if plan.request.may_not_parse:
        require_parsable(message)


def response_json(route: Route, message: Message, *, pretty: bool = False) -> bytes:
    """Write an answer as JSON: the message, or the field that response_body names.

    Args:
        route: not a raw one.
        message: its answer.
        pretty: whether it is indented; else it is one line.

    Raises:
        Internal: the answer holds what JSON cannot write (a time out of range, an unknown Any).
    """
    try:
        return write_json(plan_of(route).answer_json(message), pretty=pretty)
    except ValueError as error:
        raise Internal(f"the answer of {route.method.full_name} is no JSON: {error}") from error


def http_body_of(route: Route, message: AnyMessage) -> AnyMessage:
    """The HttpBody of an answer that is one, or whose response_body is."""
    return getattr(message, route.response_body) if route.response_body else message


def answer_type(route: Route) -> str:
    """The full name of the message that is answered; "" for a response_body of another kind."""
    answer = descriptor_of(route.method.output)
    if not route.response_body:
        return answer.full_name
    field = answer.fields_by_name[route.response_body]
    return "" if field.is_repeated or field.message_type is None else field.message_type.full_name


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


@compiled(_PLANS_MAX)
def plan_of(route: Route) -> Plan:
    """The compiled plan of a route; call it for each route at start, so that no request pays."""
    request, answer = descriptor_of(route.method.input), descriptor_of(route.method.output)
    is_lenient = route.method.options.ignore_unknown
    codecs = codecs_of(request.file.pool, replace(route.json, ignore_unknown=is_lenient))
    variables = {}
    if route.raw is None:
        paths = [variable.field_path for variable in route.template.variables]
        variables = {path: find_leaf(request, path) for path in paths}
    body_field = request.fields_by_name[route.body] if route.body not in {"", "*"} else None
    taken = {leaf.path for leaf in variables.values()}
    if body_field is not None:
        taken.add((body_field.name,))
    taken_roots = {path[0] for path in taken}
    answer_json = codecs.of(answer).to_json
    if route.response_body:
        answer_json = codecs.value_of(answer.fields_by_name[route.response_body])[1]
    read_body = codecs.of(request).reader if route.body == "*" else None
    if body_field is not None:
        read_body = codecs.value_of(body_field)[0]
    body_type = request if body_field is None else body_field.message_type
    return Plan(
        request=codecs.of(request),
        variables=variables,
        body_field=body_field,
        read_body=read_body,
        takes_any_body=bool(route.body) and _is_http_body(body_type),
        answer_json=answer_json,
        taken=frozenset(taken),
        taken_roots=frozenset(taken_roots),
        plain=_plain_parameters(route, request, taken_roots),
        rewritten=frozenset(
            path for path, leaf in variables.items() if route.body in {"*", leaf.path[0]}
        ),
        update_mask=update_mask_of(route),
        ignored=codecs.ignored if is_lenient else None,
    )


def _is_http_body(message: Descriptor | None) -> bool:
    return message is not None and message.full_name == HTTP_BODY


def _read_body(plan: Plan, message: AnyMessage, body: bytes, content_type: str) -> JsonValue:
    """Fill the message from the body; the document, None if it is no JSON."""
    field = plan.body_field
    if plan.takes_any_body:
        http_body = message if field is None else getattr(message, field.name)
        http_body.content_type, http_body.data = content_type, body
        return None
    if not body:
        return None
    if plan.read_body is None:
        raise Wrong("must have no body")
    try:
        return plan.read_body.read(message, body)
    except Wrong as wrong:
        raise wrong if field is None else wrong.within(field.json_name) from None


def _set_rewritten(message: AnyMessage, leaf: Leaf, text: str) -> None:
    """Set a field from the path; a body may repeat it (AIP-134), not contradict it."""
    target = message
    for field in leaf.fields[:-1]:
        target = getattr(target, field.name)
    field = leaf.fields[-1]
    before = getattr(target, field.name)
    was_set = target.HasField(field.name) if field.has_presence else before != field.default_value
    set_leaf(message, leaf, [text])
    if was_set and before != getattr(target, field.name):
        raise Wrong.of_field(leaf.json_path, "differs from the path")


def _read_query(route: Route, plan: Plan, message: AnyMessage, query_string: bytes) -> None:
    pairs = parse_query(query_string)
    if plan.plain and _read_plain(plan, message, pairs):
        return
    if route.body == "*" and pairs and plan.ignored is None:
        raise _no_parameter(pairs[0][0][:NAME_CHARACTERS_TOLD_MAX])
    for leaf, texts in gather(pairs, plan.request.descriptor, plan.ignored):
        if route.body == "*":
            raise _no_parameter(leaf.json_path)
        if leaf.path[0] in plan.taken_roots and _is_taken(leaf, plan):
            raise Wrong.of_field(leaf.json_path, "belongs to the path or the body")
        set_leaf(message, leaf, texts)


def _read_plain(plan: Plan, message: AnyMessage, pairs: list[tuple[str, str]]) -> bool:
    """Fill fields from the usual query; False if the longer way must judge it."""
    done = set()
    for name, text in pairs:
        parameter = plan.plain.get(name)
        if parameter is None or parameter[0] in done:
            return False
        field, decode = parameter
        try:
            setattr(message, field, decode(text))
        except Wrong:
            return False
        done.add(field)
    return True


def _plain_parameters(
    route: Route, request: Descriptor, taken_roots: set[str]
) -> dict[str, tuple[str, TextDecode]]:
    if route.body == "*":
        return {}
    leaves = {
        name: find_leaf(request, name)
        for name, field in fields_by_any_name(request).items()
        if field.name not in taken_roots and field.message_type is None
    }
    return {
        name: (leaf.fields[0].name, leaf.decode)
        for name, leaf in leaves.items()
        if leaf.decode is not None
    }


def _is_taken(leaf: Leaf, plan: Plan) -> bool:
    lengths = range(1, len(leaf.path) + 1)
    return any(leaf.path[:length] in plan.taken for length in lengths)


def _no_parameter(name: str) -> Wrong:
    # http.proto: with body "*", all that the path leaves is the body's.
    return Wrong.of_field(name, "is no parameter: send it in the body")
