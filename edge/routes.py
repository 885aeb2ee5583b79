"""The route table: which method answers an HTTP method and path.

Built once from the contracts into a tree of segments. Precedence is by how specific a
path is, segment by segment from the left: literal, then "*", then "**", with a way
back. Order of registration never matters; two routes that can not be told apart are
refused when the table is built.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from google.api import http_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tenfold.options.v1.policy_pb2 import RawBinding

from edge.codec import CodecOptions
from edge.contracts import ContractError, Contracts, MethodInfo
from edge.fields import descriptor_of, has_one_text
from edge.template import DOT_SEGMENTS, DOUBLE_STAR, STAR, Template, TemplateError
from shared.errors import InvalidRequest
from shared.rpc.policy import Access

# Longer targets are refused by the server with 414; here they simply match nothing.
PATH_BYTES_MAX = 8192
ANY_METHOD = "*"
DEFAULT_JSON = CodecOptions()

# What a resource is called by (AIP-122).
NAME_FIELD = "name"

_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, eq=False)
class Route:
    """One HTTP binding of a method.

    Attributes:
        http_method: upper case; "*" answers every method.
        template: the path.
        method: what it calls.
        body: the request field that the body fills; "*" for all that the path leaves, "" for
            no body.
        response_body: the answer field that is sent; "" for the whole message.
        raw: set for a raw binding, whose variables are metadata and not request fields.
        is_connect: whether it is answered in the Connect protocol, at the method's RPC path.
        json: how answers are written.
        served_at: of a standard Create: the GET paths that may serve what it makes.
    """

    http_method: str
    template: Template
    method: MethodInfo
    body: str = ""
    response_body: str = ""
    raw: RawBinding | None = None
    is_connect: bool = False
    json: CodecOptions = DEFAULT_JSON
    served_at: tuple[Template, ...] = ()

    def __str__(self) -> str:
        """The binding and its method, for error texts."""
        return f"{self.http_method} {self.template.text} ({self.method.full_name})"

    @property
    def takes_request_id(self) -> bool:
        """Whether the request has the field that Idempotency-Key fills."""
        return self.method.policy.has_request_id


class Match(NamedTuple):
    """A route, and what its path captured: field path in proto names -> decoded text."""

    route: Route
    captures: dict[str, str]


@dataclass(frozen=True)
class NoMatch:
    """No route. With allowed methods it is 405 and they are its Allow header; else 404."""

    allowed_methods: tuple[str, ...] = ()


@dataclass
class _Node:
    """A place in the tree. Leaves are kept by verb, then by HTTP method."""

    literals: dict[bytes, "_Node"] = field(default_factory=dict)
    star: "_Node | None" = None
    ends: dict[bytes, dict[str, Route]] = field(default_factory=dict)
    rests: dict[bytes, dict[str, Route]] = field(default_factory=dict)  # by "**"


class RouteTable:
    """All routes of the contracts.

    Args:
        routes: what REST answers; bindings are not checked against their messages here.
        connect_routes: what is answered in the Connect protocol.

    Raises:
        ContractError: two routes match the same requests; both are named.
    """

    def __init__(self, routes: Iterable[Route], connect_routes: Iterable[Route] = ()) -> None:
        self._root = _Node()
        self._verbs: set[bytes] = set()
        self.routes = tuple(routes)
        self.connect_routes = tuple(connect_routes)
        for route in self.routes:
            self._insert(route)
        for route in self.connect_routes:
            self._refuse_shadow(route)
        for route in self.connect_routes:
            self._insert(route)

    @classmethod
    def of_contracts(
        cls,
        contracts: Contracts | FileDescriptorSet,
        methods: Iterable[MethodInfo] | None = None,
        *,
        serves_connect: bool = True,
        json: CodecOptions = DEFAULT_JSON,
    ) -> "RouteTable":
        """Read every http rule and raw binding that REST may reach, and every RPC path.

        Args:
            contracts: what is served.
            methods: those of them that are; None for all.
            serves_connect: whether RPC paths are answered, in the Connect protocol.
            json: how answers of REST are written; Connect's are always the default.

        Raises:
            ContractError: a template, a variable or a body does not fit its message, or two
                routes conflict.
        """
        if isinstance(contracts, FileDescriptorSet):
            contracts = Contracts(contracts)
        methods = contracts.methods() if methods is None else methods
        reachable = [method for method in methods if method.is_reachable]
        routes = [route for method in reachable for route in _routes_of(method)]
        connect_routes = (route for method in reachable for route in _connect_routes_of(method))
        return cls(
            [replace(route, json=json, served_at=_served_at(route, routes)) for route in routes],
            connect_routes if serves_connect else (),
        )

    @property
    def all_routes(self) -> tuple[Route, ...]:
        """Those of REST, then those of Connect."""
        return self.routes + self.connect_routes

    def match(self, http_method: str, raw_path: bytes | str) -> Match | NoMatch:
        """Find the route of a request.

        Args:
            http_method: upper case.
            raw_path: the undecoded target without its query.

        Returns:
            The most specific route; HEAD is answered by a GET where no route names it. A path
            whose last segment ends in a verb that some route of that path declares is always
            read with the verb.

        Raises:
            InvalidRequest: the path is not percent-encoded, or a captured part does not decode to
                UTF-8 text, or holds NUL.
        """
        path = raw_path.encode() if isinstance(raw_path, str) else raw_path
        if len(path) > PATH_BYTES_MAX or not path.startswith(b"/"):
            return NoMatch()
        # "/" has no segment at all: "**", which matches zero of them, may stand for it.
        raw = path[1:].split(b"/") if len(path) > 1 else []
        if b"%" in path and _BROKEN_ESCAPE.search(path):
            raise InvalidRequest("The path is not percent-encoded (RFC 3986, section 2.1).")
        decoded = [unquote_to_bytes(s) for s in raw] if b"%" in path else raw
        # RFC 3986 6.2.2.3: a client removes dot segments before it sends; "%2e" is no disguise.
        if not DOT_SEGMENTS.isdisjoint(decoded):
            return NoMatch()
        last, colon, verb = raw[-1].rpartition(b":") if raw else (b"", b"", b"")
        if colon and b"%" in verb:
            verb = unquote_to_bytes(verb)
        if colon and verb in self._verbs:
            stem = [*decoded[:-1], unquote_to_bytes(last)]
            found = self._look_up(http_method, [*raw[:-1], last], stem, verb)
            if isinstance(found, Match) or found.allowed_methods:
                return found
        return self._look_up(http_method, raw, decoded, b"")

    def _look_up(
        self, http_method: str, raw: list[bytes], decoded: list[bytes], verb: bytes
    ) -> Match | NoMatch:
        # The usual case without a way back: the most specific segment each time.
        leaf = _straight_to(self._root, decoded, verb)
        route = leaf.get(http_method) if leaf is not None else None
        if route is not None:
            return Match(route, _captures(route, raw))
        allowed: list[str] = []
        # RFC 9110, section 9.3.2: HEAD is the same as GET, so they never part ways.
        methods = (
            (http_method, "GET", ANY_METHOD) if http_method == "HEAD" else (http_method, ANY_METHOD)
        )
        for by_method in _candidates(self._root, decoded, 0, verb):
            route = next((by_method[name] for name in methods if name in by_method), None)
            if route is not None:
                return Match(route, _captures(route, raw))
            allowed += by_method
        return NoMatch(tuple(sorted(set(allowed))))

    def _refuse_shadow(self, route: Route) -> None:
        """Refuse an RPC path that some path of REST matches, however loosely.

        By precedence the RPC path would win, and take requests from a method that says it
        answers them.
        """
        found = self.match(route.http_method, route.template.text)
        if isinstance(found, Match):
            remedy = "TENFOLD_EDGE_CONNECT=false serves REST alone"
            raise ContractError(f"these routes conflict: {found.route} and {route}; {remedy}")

    def _insert(self, route: Route) -> None:
        node = self._root
        template = route.template
        for segment in template.segments:
            if segment == DOUBLE_STAR:
                break
            if segment == STAR:
                node.star = node.star or _Node()
                node = node.star
            else:
                assert isinstance(segment, bytes)
                node = node.literals.setdefault(segment, _Node())
        is_open = template.segments[-1] == DOUBLE_STAR
        by_method = (node.rests if is_open else node.ends).setdefault(template.verb, {})
        if route.http_method in by_method:
            first = by_method[route.http_method]
            raise ContractError(f"these routes conflict: {first} and {route}")
        by_method[route.http_method] = route
        if template.verb:
            self._verbs.add(template.verb)


def _straight_to(node: _Node, segments: list[bytes], verb: bytes) -> dict[str, Route] | None:
    """The first that _candidates would yield, if no step back is needed."""
    for segment in segments:
        child = node.literals.get(segment) or (node.star if segment else None)
        if child is None:
            return None
        node = child
    return node.ends.get(verb)


def _candidates(
    node: _Node, segments: list[bytes], at: int, verb: bytes
) -> Iterator[dict[str, Route]]:
    """The leaves that match the path, most specific first; each node is visited at most once."""
    if at == len(segments):
        if verb in node.ends:
            yield node.ends[verb]
    else:
        segment = segments[at]
        literal = node.literals.get(segment)
        if literal is not None:
            yield from _candidates(literal, segments, at + 1, verb)
        # "*" is a segment: an empty one ("//" or a slash at the end) is none.
        if node.star is not None and segment:
            yield from _candidates(node.star, segments, at + 1, verb)
    # "**" matches zero or more segments.
    if verb in node.rests and all(segments[at:]):
        yield node.rests[verb]


def _captures(route: Route, raw: list[bytes]) -> dict[str, str]:
    captures = {}
    for variable in route.template.variables:
        try:
            text = variable.capture(raw).decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest.of_field(variable.field_path, "must be UTF-8 text") from error
        if "\0" in text:
            raise InvalidRequest.of_field(variable.field_path, "must not hold NUL")
        captures[variable.field_path] = text
    return captures


def _routes_of(method: MethodInfo) -> Iterator[Route]:
    for raw in method.options.raw:
        yield Route(raw.method.upper(), _template(raw.path, method), method, raw=raw)
    if method.rule is None:
        return
    yield _route_of_rule(method.rule, method)
    for extra in method.rule.additional_bindings:
        if extra.additional_bindings:
            raise ContractError(f"{method.full_name}: additional_bindings must not be nested")
        yield _route_of_rule(extra, method)


def _connect_routes_of(method: MethodInfo) -> Iterator[Route]:
    """The RPC path: by POST, and by GET if the method is unary and changes nothing.

    A method needs no http rule for this if it has a policy of ours: that says who may call.
    Of a stranger's contract, only what is meant for HTTP is served.
    """
    if not method.is_bound and method.policy.access is Access.NOBODY:
        return
    template = _template(method.full_name, method)
    yield Route("POST", template, method, body="*", is_connect=True)
    is_unary = not (method.client_streaming or method.server_streaming)
    if is_unary and not method.has_side_effects:
        yield Route("GET", template, method, is_connect=True)


def _route_of_rule(rule: http_pb2.HttpRule, method: MethodInfo) -> Route:
    pattern = rule.WhichOneof("pattern")
    if pattern is None:
        raise ContractError(f"{method.full_name}: the http rule names no path")
    if pattern == "custom":
        http_method, path = rule.custom.kind.upper(), rule.custom.path
    else:
        http_method, path = pattern.upper(), getattr(rule, pattern)
    template = _template(path, method)
    _check_variables(template, method)
    _check_body("body", rule.body if rule.body != "*" else "", descriptor_of(method.input), method)
    _check_body("response_body", rule.response_body, descriptor_of(method.output), method)
    return Route(http_method, template, method, rule.body, rule.response_body)


def _served_at(created: Route, routes: Iterable[Route]) -> tuple[Template, ...]:
    """Where a standard Create's resource is read (AIP-131, AIP-133): by its name, by a GET."""
    is_create = created.http_method == "POST" and created.method.name.startswith("Create")
    resource = answered_message(created)
    if not is_create or resource is None or not has_one_text(resource, NAME_FIELD):
        return ()
    return tuple(
        route.template
        for route in routes
        if route.http_method == "GET"
        and answered_message(route) is resource
        and route.template.is_of_one_variable
        and route.template.variables[0].field_path == NAME_FIELD
    )


def answered_message(route: Route) -> Descriptor | None:
    """The message that a unary route answers with; None for streams and for other values."""
    if route.method.server_streaming or route.raw is not None:
        return None
    answer = descriptor_of(route.method.output)
    if not route.response_body:
        return answer
    field = answer.fields_by_name[route.response_body]
    return None if field.is_repeated else field.message_type


def _template(path: str, method: MethodInfo) -> Template:
    try:
        return Template.parse(path)
    except TemplateError as error:
        raise ContractError(f"{method.full_name}: {error}") from error


def _check_body(option: str, name: str, message: Descriptor, method: MethodInfo) -> None:
    if name and name not in message.fields_by_name:
        what = f"{option} {name!r} is no field of {message.full_name}"
        raise ContractError(f"{method.full_name}: {what}")


def _check_variables(template: Template, method: MethodInfo) -> None:
    for variable in template.variables:
        problem = _variable_problem(variable.field_path, descriptor_of(method.input))
        if problem:
            raise ContractError(f"{method.full_name}: variable {variable.field_path!r} {problem}")


def _variable_problem(field_path: str, message: Descriptor) -> str:
    """Why a variable can not fill this field; "" if it can."""
    descriptor: Descriptor | None = message
    leaf: FieldDescriptor | None = None
    for name in field_path.split("."):
        if descriptor is None:
            return "goes through a field that is no message"
        leaf = descriptor.fields_by_name.get(name)
        if leaf is None:
            return f"is no field of {message.full_name}"
        if leaf.is_repeated:
            return "is or goes through a repeated field"
        descriptor = leaf.message_type
    return "" if descriptor is None else "is a message; only primitive fields fit a path"
