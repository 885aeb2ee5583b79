"""The OpenAPI 3.1 document of a route table: what the edge really serves.

It is made from the same routes and descriptors that requests go by, so the two cannot
disagree. Comments of the contracts become descriptions.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from edge import aip193
from edge.answer import NO_CONTENT, Answers, answers_of
from edge.codec import CodecOptions
from edge.contracts import Contracts
from edge.fields import descriptor_of, is_map, map_fields, message_type
from edge.forwarding import Crossing, Forwarding
from edge.idempotency import BARE_KEY, QUOTED_KEY
from edge.problem import CONTENT_TYPE
from edge.query import is_json_leaf, is_text_leaf
from edge.routes import ANY_METHOD, DEFAULT_JSON, Route, RouteTable
from edge.schemas import NULL, Schema, Schemas, is_required
from edge.shapes import shape_of
from edge.template import DOUBLE_STAR, STAR, Template, Variable
from edge.transcode import plan_of
from shared.rpc.policy import REQUEST_ID_FIELD, Access, Idempotency

# How deep query parameters of nested messages are listed; the edge itself goes deeper.
QUERY_LEVELS_MAX = 3

_OPENAPI_METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
_EVERY_METHOD = ("GET", "PUT", "POST", "DELETE", "PATCH")
# OpenAPI ignores header parameters of these names: they are described elsewhere.
_HEADERS_DESCRIBED_ELSEWHERE = {"accept", "content-type", "content-length", "authorization"}
_HTML_EVENTS = "https://html.spec.whatwg.org/multipage/server-sent-events.html"

_ABOUT = """\
A REST call becomes one gRPC call. JSON follows the proto3 mapping: names in lowerCamelCase
(names of the contracts are read too), 64-bit integers as strings (bare numbers are read
too), times by RFC 3339, bytes in base64. Unknown fields and parameters, and a field
given twice, are refused. """
_ABOUT_NAMES = {
    False: "",
    True: """Answers name fields as the contracts do, not in lowerCamelCase. """,
}
_ABOUT_DEFAULTS = {
    False: """Answers leave out fields at their default, such as "" and 0.
""",
    True: """Answers hold fields at their default, such as "" and 0; unset
messages and optional fields are left out.
""",
}
_IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "schema": {"type": "string"},
    "description": "One entity tag: refused with 412 if the resource has changed since.",
}
_IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "schema": {"type": "string"},
    "description": "Entity tags that the client has: answered with 304 if nothing has changed.",
}
_ETAG = {"schema": {"type": "string"}, "description": "The entity tag of the resource."}
_LOCATION = {"schema": {"type": "string"}, "description": "Where the new resource is served."}
_BYTES: Schema = {"*/*": {"schema": {"type": "string", "format": "binary"}}}


def openapi_document(
    route_table: RouteTable,
    contracts: Contracts,
    *,
    title: str,
    version: str,
    json: CodecOptions = DEFAULT_JSON,
    is_google: bool = False,
    forwarding: Forwarding | None = None,
) -> dict[str, Any]:
    """Describe every route.

    Args:
        route_table: made from these contracts.
        contracts: for comments; without source info there are no descriptions.
        title: of the API.
        version: of the API, not of OpenAPI.
        json: how answers are written.
        is_google: whether errors are told as AIP-193 has them, not as problem documents.
        forwarding: which headers cross; None for what the contracts list.

    Returns:
        The document, made of plain dicts and lists, in a stable order.
    """
    schemas = Schemas(contracts, proto_names=json.proto_names)
    forwarding = forwarding or Forwarding(route.method for route in route_table.routes)
    paths: dict[str, dict[str, Any]] = {}
    tags: dict[str, str] = {}
    operation_ids: dict[str, int] = {}
    for route in route_table.routes:
        service = route.method.service
        tags.setdefault(service, contracts.comment(service))
        path, parameters = openapi_path(route.template)
        crossing = forwarding.of(route.method)
        operation = _Operation(route, contracts, schemas, crossing).describe(path, parameters)
        is_any = route.http_method == ANY_METHOD
        for http_method in _EVERY_METHOD if is_any else (route.http_method,):
            own = dict(operation, operationId=_operation_id(route, operation_ids))
            paths.setdefault(path, {})[_path_item_key(http_method)] = own
    operations = [operation for item in paths.values() for operation in item.values()]
    has_security = any(operation["security"] for operation in operations)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": _about(json)},
        "tags": [_with_description({"name": name}, text) for name, text in sorted(tags.items())],
        "paths": dict(sorted(paths.items())),
        "components": _components(schemas, is_google=is_google, has_security=has_security),
    }


def _about(json: CodecOptions) -> str:
    return _ABOUT + _ABOUT_NAMES[json.proto_names] + _ABOUT_DEFAULTS[json.emit_defaults]


def openapi_path(template: Template) -> tuple[str, list[tuple[str, Variable]]]:
    """A template as OpenAPI writes it, and its parameters with the variable of each.

    OpenAPI has no multi-segment variables: "/v1/{name=accounts/*}" is
    "/v1/accounts/{account}", named after the collection before it.
    """
    parts: list[str] = []
    parameters: list[tuple[str, Variable]] = []
    taken: set[str] = set()
    for index, segment in enumerate(template.segments):
        if isinstance(segment, bytes):
            parts.append(_literal(segment))
            continue
        variable = _variable_at(template, index)
        name = _parameter_name(template, index, variable)
        while name in taken:
            name += "_"
        taken.add(name)
        parts.append("{" + name + "}")
        if variable is not None:
            parameters.append((name, variable))
    verb = ":" + _literal(template.verb) if template.verb else ""
    return "/" + "/".join(parts) + verb, parameters


def _literal(decoded: bytes) -> str:
    """A literal as a target has it; so no brace of it looks like a variable, no slash like one."""
    return quote(decoded, safe="-._~!$&'()*+,;=@")


def _variable_at(template: Template, index: int) -> Variable | None:
    for variable in template.variables:
        if variable.start <= index and (variable.end is None or index < variable.end):
            return variable
    return None


def _parameter_name(template: Template, index: int, variable: Variable | None) -> str:
    # Many tools that fill a path in take a dot for the way into an object.
    own = variable.field_path.replace(".", "_") if variable is not None else ""
    if variable is not None and not variable.is_multi_segment:
        return own
    before = template.segments[index - 1] if index else b""
    if template.segments[index] == STAR and isinstance(before, bytes) and before.endswith(b"s"):
        return re.sub(r"ies$|s$", _singular_ending, before.decode())
    if variable is not None and template.segments[index] != DOUBLE_STAR:
        return own
    return "rest" if template.segments[index] == DOUBLE_STAR else "any"


def _singular_ending(plural: re.Match[str]) -> str:
    return "y" if plural.group() == "ies" else ""


def _path_item_key(http_method: str) -> str:
    """Where a path tells of a method; OpenAPI 3.1 has no place for any but its own eight."""
    name = http_method.lower()
    return name if name in _OPENAPI_METHODS else f"x-{name}"


def _operation_id(route: Route, seen: dict[str, int]) -> str:
    name = f"{route.method.service.rpartition('.')[2]}_{route.method.name}"
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else f"{name}{seen[name]}"


class _Operation:
    """Describes one route."""

    def __init__(
        self, route: Route, contracts: Contracts, schemas: Schemas, crossing: Crossing
    ) -> None:
        self.route, self.contracts, self.schemas = route, contracts, schemas
        self.crossing = crossing
        self.method, self.policy = route.method, route.method.policy
        self.request = descriptor_of(route.method.input)
        self.answer = descriptor_of(route.method.output)
        self.captured = {v.field_path.partition(".")[0] for v in route.template.variables}
        self.answers = None if route.raw else answers_of(route)
        takes_key = self.policy.idempotency in {Idempotency.KEYED, Idempotency.OPTIONAL}
        # The header Idempotency-Key fills it, where the contract says that this is its use.
        self.filled = {REQUEST_ID_FIELD} if takes_key else set()

    def describe(self, path: str, parameters: list[tuple[str, Variable]]) -> dict[str, Any]:
        comment = self.contracts.comment(f"{self.method.service}.{self.method.name}")
        operation: dict[str, Any] = {"tags": [self.method.service]}
        if comment:
            operation["summary"] = comment.split("\n\n")[0].replace("\n", " ")
            operation["description"] = comment
        if self.method.options.ignore_unknown:
            text = f"{comment}\n\nUnknown fields, enum names and parameters are ignored."
            operation["description"] = text.strip()
        listed = [self.path_parameter(name, variable) for name, variable in parameters]
        listed += [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"\{(\w+)\}", path)
            if name not in {known for known, _ in parameters}
        ]
        operation["parameters"] = [*listed, *self.query_parameters(), *self.header_parameters()]
        body = self.raw_body() if self.route.raw is not None else self.request_body()
        if body is not None:
            operation["requestBody"] = body
        operation["responses"] = self.responses()
        operation["security"] = self.security()
        operation["x-rpc"] = self.method.full_name
        return operation

    # --- parameters

    def path_parameter(self, name: str, variable: Variable) -> Schema:
        schema: Schema = {"type": "string"}
        comment = ""
        if self.route.raw is None:
            field = _field_at(self.request, variable.field_path)
            comment = self.contracts.comment(field.full_name)
            if not variable.is_multi_segment:
                schema = self.schemas.of_field(field)
                schema.pop("description", None)
        parameter = {"name": name, "in": "path", "required": True, "schema": schema}
        return _with_description(parameter, comment)

    def query_parameters(self) -> Iterator[Schema]:
        if self.route.raw is not None or self.route.body == "*":
            return
        skipped = self.captured | self.filled | {self.route.body}
        for field in self.request.fields:
            if field.name not in skipped:
                yield from self.parameters_of_field(field, "", 1)

    def parameters_of_field(
        self, field: FieldDescriptor, prefix: str, level: int
    ) -> Iterator[Schema]:
        name = prefix + self.schemas.name_of(field)
        if is_map(field):
            if is_text_leaf(map_fields(field)[1]):
                schema = self.schemas.of_field(field)
                yield {"name": name, "in": "query", "style": "deepObject", "schema": schema}
        elif is_text_leaf(field):
            schema = self.schemas.of_field(field)
            comment = schema.pop("description", "")
            parameter: Schema = {"name": name, "in": "query", "schema": schema}
            if is_json_leaf(field):
                content = {"application/json": {"schema": parameter.pop("schema")}}
                parameter["content"] = content
            if is_required(field) and level == 1:
                parameter["required"] = True
            yield _with_description(parameter, comment)
        elif not field.is_repeated and level < QUERY_LEVELS_MAX:
            for inner in message_type(field).fields:
                yield from self.parameters_of_field(inner, f"{name}.", level + 1)

    def header_parameters(self) -> Iterator[Schema]:
        yield {"$ref": "#/components/parameters/RequestId"}
        if self.policy.idempotency is Idempotency.KEYED:
            yield {"$ref": "#/components/parameters/IdempotencyKeyRequired"}
        elif self.policy.idempotency is Idempotency.OPTIONAL:
            yield {"$ref": "#/components/parameters/IdempotencyKey"}
        raw = self.route.raw.request_headers if self.route.raw is not None else ()
        described = {*_HEADERS_DESCRIBED_ELSEWHERE, "idempotency-key"}
        for name in sorted({*raw, *self.crossing.entering} - described):
            yield {"name": _header_case(name), "in": "header", "schema": {"type": "string"}}
        if self.may_resume:
            yield {"$ref": "#/components/parameters/LastEventId"}
        if self.takes_if_match:
            yield _IF_MATCH
        if self.may_be_unchanged:
            yield _IF_NONE_MATCH

    @property
    def may_resume(self) -> bool:
        is_read_only = self.method.server_streaming and not self.method.client_streaming
        return is_read_only and shape_of(self.route).cursor is not None

    @property
    def takes_if_match(self) -> bool:
        is_unary = not self.policy.is_stream
        return is_unary and self.answers is not None and bool(self.answers.etags.request_fields)

    @property
    def may_be_unchanged(self) -> bool:
        etags = self.answers.etags if self.answers is not None else None
        return etags is not None and etags.is_answered and etags.is_read

    # --- bodies

    def request_body(self) -> Schema | None:
        if not self.route.body:
            return None
        if self.route.body == "*":
            skipped = self.captured | self.filled
            fields = [field for field in self.request.fields if field.name not in skipped]
            schema = self.schemas.of_object(self.request, fields)
            schema.pop("description", None)  # the operation's own says it
            required = bool(schema.get("required"))
        else:
            field = self.request.fields_by_name[self.route.body]
            schema, required = self.schemas.of_field(field), is_required(field)
        plan = plan_of(self.route)
        if plan.takes_any_body:
            return {"required": required, "content": _BYTES}
        # A PATCH that names nothing to change is refused.
        required = required or (plan.update_mask is not None and plan.update_mask.is_made)
        if self.method.client_streaming:
            return {"required": False, "content": {"application/x-ndjson": _lines_of(schema)}}
        return {"required": required, "content": {"application/json": {"schema": schema}}}

    def raw_body(self) -> Schema | None:
        if self.route.http_method in {"GET", "HEAD", "OPTIONS", "DELETE"}:
            return None
        return {"content": _BYTES}

    def responses(self) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        if self.answers is None:
            answers |= self.raw_responses()
        else:
            ok: Schema = {"description": "Done.", "headers": self.response_headers(self.answers)}
            if self.answers.status != NO_CONTENT:
                ok["content"] = self.response_content(self.answers)
            answers[str(self.answers.status)] = ok
        if self.may_be_unchanged:
            answers["304"] = {"description": "Nothing has changed.", "headers": {"ETag": _ETAG}}
        for status in self.error_statuses():
            answers[status] = {"$ref": "#/components/responses/Problem"}
        answers["default"] = {"$ref": "#/components/responses/Problem"}
        return answers

    def response_headers(self, answers: Answers) -> dict[str, Any]:
        headers: dict[str, Any] = {"X-Request-Id": {"$ref": "#/components/headers/XRequestId"}}
        if self.policy.has_request_id:
            replayed = {"$ref": "#/components/headers/IdempotencyReplayed"}
            headers["Idempotency-Replayed"] = replayed
        if answers.etags.is_answered:
            headers["ETag"] = _ETAG
        if self.route.served_at:
            headers["Location"] = _LOCATION
        return headers | _text_headers(name.decode() for name in self.crossing.leaving)

    def response_content(self, answers: Answers) -> dict[str, Any]:
        schema = self.schemas.of_message(self.answer)
        if self.route.response_body:
            field = self.answer.fields_by_name[self.route.response_body]
            schema = self.schemas.of_field(field)
            if field.has_presence:
                schema = {"anyOf": [schema, NULL]}
        if not answers.is_json:
            return _BYTES
        if not self.method.server_streaming:
            return {"application/json": {"schema": schema}}
        return {
            "application/x-ndjson": _lines_of(schema, "; an error ends the stream with a problem"),
            "text/event-stream": {
                "schema": schema,
                "x-stream": f"Server-sent events ({_HTML_EVENTS}): data is the JSON document, id "
                "its cursor; send it as Last-Event-ID to go on from there.",
            },
        }

    def raw_responses(self) -> dict[str, Any]:
        """Its service chooses the status; what it answers with 204 has no content."""
        assert self.route.raw is not None
        names = self.route.raw.response_headers
        answer: dict[str, Any] = {"description": "Done.", "headers": _text_headers(names)}
        has_content = self.route.http_method in {"GET", "POST"}
        with_content = answer | {"content": _BYTES} if has_content else answer
        return {"204": answer, "2XX": with_content}

    def error_statuses(self) -> list[str]:
        """What a client may have to deal with; "default" is for what it can do nothing about.

        A service may answer any code of gRPC, whatever the method is for, and a bad credential
        is refused even where none is needed. That of a raw binding answers what it likes.
        """
        if self.answers is None:
            return ["4XX"]
        statuses = {400, 401, 403, 404, 409, 414, 429, 431}
        if self.answers.status != NO_CONTENT:
            statuses.add(406)
        if self.route.body:
            statuses |= {408, 413, 415}
        if self.takes_if_match:
            statuses.add(412)
        if self.policy.has_request_id:
            statuses.add(422)
        return [str(status) for status in sorted(statuses)]

    def security(self) -> list[dict[str, list[str]]]:
        if self.policy.access is Access.PUBLIC:
            return []
        return [{"bearer": sorted(self.policy.scopes)}]


def _field_at(message: Descriptor, field_path: str) -> FieldDescriptor:
    *parents, last = field_path.split(".")
    for name in parents:
        message = message_type(message.fields_by_name[name])
    return message.fields_by_name[last]


def _lines_of(schema: Schema, end: str = "") -> Schema:
    return {"schema": schema, "x-stream": f"One JSON document per line{end}."}


def _text_headers(names: Iterable[str]) -> dict[str, Any]:
    return {_header_case(name): {"schema": {"type": "string"}} for name in names}


def _header_case(name: str) -> str:
    return "-".join(part.capitalize() for part in name.split("-"))


def _with_description(thing: Schema, description: str) -> Schema:
    return thing | {"description": description} if description else thing


def _components(schemas: Schemas, *, is_google: bool, has_security: bool) -> dict[str, Any]:
    # A table: everything that operations refer to.
    error_type, error = (
        (aip193.CONTENT_TYPE, _GOOGLE_ERROR) if is_google else (CONTENT_TYPE, _PROBLEM)
    )
    key_schema = {
        "type": "string",
        "pattern": f"^({BARE_KEY}|{QUOTED_KEY})$",
        "minLength": 1,
        "maxLength": 255,
    }
    key: Schema = {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": key_schema,
        "description": "Names this request: repeated, it has one effect and the same answer. "
        "With another request it is refused (422); while the first runs, too (409).",
    }
    bearer: Schema = {
        "type": "http",
        "scheme": "bearer",
        "description": "An access token (JWT) from POST /v1/sessions, or an API key.",
    }
    return {
        "securitySchemes": {"bearer": bearer} if has_security else {},
        "parameters": {
            "IdempotencyKey": key,
            "IdempotencyKeyRequired": key | {"required": True},
            "LastEventId": {
                "name": "Last-Event-ID",
                "in": "header",
                "schema": {"type": "string"},
                "description": "The id of the last event received: the stream goes on after it.",
            },
            "RequestId": {
                "name": "X-Request-Id",
                "in": "header",
                "schema": {"type": "string", "maxLength": 128},
                "description": "Taken over into the answer and the log; made up if absent.",
            },
        },
        "headers": {
            "XRequestId": {
                "schema": {"type": "string"},
                "description": "Finds this request in the log.",
            },
            "IdempotencyReplayed": {
                "schema": {"type": "string", "enum": ["true"]},
                "description": "This is the answer of an earlier request under the same key.",
            },
        },
        "responses": {
            "Problem": {
                "description": f"What went wrong ({'AIP-193' if is_google else 'RFC 9457'}).",
                "headers": {
                    "Retry-After": {
                        "schema": {"type": "integer"},
                        "description": "Seconds after which the same request may pass.",
                    }
                },
                "content": {error_type: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            }
        },
        "schemas": dict(sorted((schemas.components | {"Problem": error}).items())),
    }


_TEXT: Schema = {"type": "string"}
_GOOGLE_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "status", "details"],
            "properties": {
                "code": {"type": "integer"},
                "message": _TEXT,
                "status": _TEXT | {"description": "The gRPC code's name: NOT_FOUND."},
                "details": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"@type": _TEXT},
                        "additionalProperties": True,
                    },
                },
            },
        },
    },
}
_PROBLEM: Schema = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "reason"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": _TEXT,
        "code": _TEXT | {"description": "The gRPC code's name: NOT_FOUND."},
        "reason": _TEXT | {"description": "For programs: INSUFFICIENT_FUNDS."},
        "request_id": _TEXT | {"description": "Absent where no request could be read."},
        "details": {"type": "object", "additionalProperties": _TEXT},
        "violations": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "description"],
                "properties": {
                    "field": _TEXT | {"description": "Its path in JSON names: entries[0].amount."},
                    "description": _TEXT,
                    "in": {"type": "string", "enum": ["path", "query", "body"]},
                    "pointer": _TEXT
                    | {
                        "description": "RFC 6901: into the body, #/entries/0; of a parameter, "
                        "from the request message, /pageSize."
                    },
                },
            },
        },
    },
}
