"""Field masks of updates: made from the body where the client gave none (AIP-134, AIP-161).

A PATCH whose request has a FieldMask changes what its body names and nothing else: a value
sets, null clears. Paths descend into plain messages; maps, lists and well-known types are
changed as a whole, so this is no JSON merge patch (RFC 7396). What the path of the URL
binds and the etag say which resource is meant, not what shall change, and are left out.

A mask that the client gives counts as it is, once each of its paths names a field: a service
that skips a misspelt path would answer success and change nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from edge import well_known
from edge.compiled import compiled
from edge.fields import (
    AnyMessage,
    JsonValue,
    descriptor_of,
    fields_by_any_name,
    message_type,
)
from edge.json_text import Wrong
from edge.routes import Route

UPDATE_MASK, READ_MASK = "update_mask", "read_mask"
ETAG, ALLOW_MISSING = "etag", "allow_missing"
# What a request says about the call beside the resource (AIP-134, 154, 155, 163).
_ABOUT_THE_CALL = frozenset({ETAG, ALLOW_MISSING, "request_id", "validate_only"})
# A deep body names many long paths; a service is not sent more than these.
PATHS_MAX = 1000
PATH_CHARACTERS_TOLD_MAX = 64
_MESSAGES_MAX = 4096


@dataclass(frozen=True)
class UpdateMask:
    """How the mask of one route is checked, and made.

    Attributes:
        field: the request's field that holds the mask.
        resource: what the mask's paths start from.
        resource_field: where in the document the resource is; None if it is the document.
        left_out: proto paths that are never changed.
        is_made: whether a missing mask is made from the body.
    """

    field: FieldDescriptor
    resource: Descriptor
    resource_field: FieldDescriptor | None
    left_out: frozenset[str]
    is_made: bool

    def complete(self, request: AnyMessage, document: JsonValue) -> None:
        """Check the mask of a request, or make it.

        Args:
            request: complete but for its mask.
            document: the JSON of the body; None for no body.

        Raises:
            Wrong: a path names no field, or the body has nothing that could change.
        """
        mask = getattr(request, self.field.name)
        if mask.paths:
            paths = [self._checked(path, alone=len(mask.paths) == 1) for path in mask.paths]
        elif self.is_made:
            paths = self._paths_of(document)
        else:
            return
        mask.paths[:] = paths

    def _paths_of(self, document: JsonValue) -> list[str]:
        if self.resource_field is not None and type(document) is dict:
            names = self.resource_field.json_name, self.resource_field.name
            document = next((document[name] for name in names if name in document), None)
        named = _paths(document, self.resource, "") if type(document) is dict else iter(())
        paths = []
        for path in named:
            if path not in self.left_out:
                paths.append(path)
            if len(paths) > PATHS_MAX:
                raise Wrong(f"names more than {PATHS_MAX} fields to change")
        if not paths:
            # An empty mask would mean "all fields" to many services (field_mask.proto).
            raise Wrong("names no field to change")
        return paths

    def _checked(self, path: str, *, alone: bool) -> str:
        """The path in proto names, if it names a field; "*" is the whole resource."""
        if path == "*" and alone:
            return path
        names = []
        message: Descriptor | None = self.resource
        for part in path.split("."):
            field = _fields_by_mask_name(message).get(part) if message is not None else None
            if field is None:
                told = well_known.mask_path_json(path)[:PATH_CHARACTERS_TOLD_MAX]
                what = f"{told!r} names no field of {self.resource.full_name}"
                raise Wrong.of_field(self.field.json_name, what)
            names.append(field.name)
            # A list or a map is changed as a whole (field_mask.proto).
            message = None if field.is_repeated else field.message_type
        return ".".join(names)


def update_mask_of(route: Route) -> UpdateMask | None:
    """How the mask of a route works; None for a route without one."""
    request = descriptor_of(route.method.input)
    field = _mask_field(request, is_patch=route.http_method == "PATCH")
    if field is None or not route.body or route.raw is not None:
        return None
    resource_field = resource_field_of(route)
    if route.body != "*" and resource_field is None:
        return None  # the body is no message of plain fields: there is nothing to descend into
    resource = request if resource_field is None else message_type(resource_field)
    prefix = "" if resource_field is None else resource_field.name + "."
    bound = (variable.field_path for variable in route.template.variables)
    left_out = {path.removeprefix(prefix) for path in bound if path.startswith(prefix)} | {ETAG}
    if resource_field is None:
        left_out |= _ABOUT_THE_CALL | {field.name}
    return UpdateMask(
        field=field,
        resource=resource,
        resource_field=resource_field if route.body == "*" else None,
        left_out=frozenset(left_out),
        is_made=route.http_method == "PATCH",
    )


def resource_field_of(route: Route) -> FieldDescriptor | None:
    """The field of the request that holds the resource which the route's body is about.

    It is the body's field. Where the body is the whole request, it is the field of the
    answer's type, or the only field that tells of more than the call.
    None if the request itself is the resource, or there is none.
    """
    request = descriptor_of(route.method.input)
    plain = [field for field in request.fields if plain_message(field) is not None]
    if route.body != "*":
        return next((field for field in plain if field.name == route.body), None)
    answer = descriptor_of(route.method.output)
    of_answer_type = [field for field in plain if field.message_type is answer]
    if len(of_answer_type) == 1:
        return of_answer_type[0]
    bound = {variable.field_path for variable in route.template.variables}
    others = [field for field in request.fields if field not in plain and not is_mask(field)]
    has_others = any(field.name not in _ABOUT_THE_CALL | bound for field in others)
    return plain[0] if len(plain) == 1 and not has_others else None


def plain_message(field: FieldDescriptor) -> Descriptor | None:
    """The message of a field whose own fields may be changed one by one."""
    message = field.message_type
    if message is None or field.is_repeated or well_known.is_well_known(message):
        return None
    return message


def is_mask(field: FieldDescriptor) -> bool:
    """Whether the field is one FieldMask."""
    message = field.message_type
    is_one = message is not None and message.full_name == well_known.FIELD_MASK
    return is_one and not field.is_repeated


def _mask_field(request: Descriptor, *, is_patch: bool) -> FieldDescriptor | None:
    """The mask of an update: by its name, or the only mask of a PATCH (but for AIP-157's)."""
    masks = {field.name: field for field in request.fields if is_mask(field)}
    masks.pop(READ_MASK, None)
    if is_patch and len(masks) == 1:
        return next(iter(masks.values()))
    return masks.get(UPDATE_MASK)


@compiled(_MESSAGES_MAX)
def _fields_by_mask_name(message: Descriptor) -> Mapping[str, FieldDescriptor]:
    """Fields by the names that masks hold: proto names, and what JSON names become in a mask."""
    of_json = {well_known.mask_path_of_json(f.json_name): f for f in message.fields}
    return of_json | dict(message.fields_by_name)


def _paths(document: JsonValue, message: Descriptor, prefix: str) -> Iterator[str]:
    fields = fields_by_any_name(message)
    for name, value in document.items():
        field = fields.get(name)
        if field is None:  # an extension, or what the contract has ignored: no mask names it
            continue
        path, inner = prefix + field.name, plain_message(field)
        if inner is not None and type(value) is dict and value:
            yield from _paths(value, inner, path + ".")
        else:
            yield path
