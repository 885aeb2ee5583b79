"""How a route's bodies travel: found once, when the contracts are loaded, by its descriptors."""

from dataclasses import dataclass
from enum import Enum

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from edge.compiled import compiled
from edge.compression import carries_secrets
from edge.fields import descriptor_of
from edge.query import Leaf, find_leaf, is_text_leaf
from edge.routes import Route
from edge.transcode import HTTP_BODY, answer_type, plan_of

# As many as there are plans.
_SHAPES_MAX = 4096
CURSOR_FIELD = "cursor"


class BodyKind(Enum):
    """What the body of a request is."""

    NONE = "none"
    JSON = "json"
    BYTES = "bytes"


@dataclass(frozen=True, eq=False)
class Shape:
    """How a route's requests and answers travel.

    Attributes:
        body_kind: of its requests.
        answers_bytes: whether answers are the bytes of an HttpBody; else they are JSON.
        may_compress: whether answers may be compressed at all.
        cursor: the request field that Last-Event-ID fills; None if there is none.
        first_only: path variables that fill only the first message of a client stream.
    """

    body_kind: BodyKind
    answers_bytes: bool
    may_compress: bool
    cursor: Leaf | None
    first_only: frozenset[str]

    def later_captures(self, captures: dict[str, str]) -> dict[str, str]:
        """What of a path fills the messages after the first."""
        if not self.first_only:
            return captures
        return {name: text for name, text in captures.items() if name not in self.first_only}


@compiled(_SHAPES_MAX)
def shape_of(route: Route) -> Shape:
    """The shape of a route; call it for each route at start, so that no request pays."""
    request, answer = descriptor_of(route.method.input), descriptor_of(route.method.output)
    plan = plan_of(route)
    body_kind = BodyKind.JSON if route.body else BodyKind.NONE
    return Shape(
        body_kind=BodyKind.BYTES if plan.takes_any_body else body_kind,
        answers_bytes=answer_type(route) == HTTP_BODY,
        may_compress=not carries_secrets(answer, route.response_body),
        cursor=_cursor(request),
        first_only=frozenset(
            path
            for path, leaf in plan.variables.items()
            if any(_has_rivals(field) for field in leaf.fields)
        ),
    )


def _cursor(request: Descriptor) -> Leaf | None:
    field = request.fields_by_name.get(CURSOR_FIELD)
    if field is None or field.is_repeated or not is_text_leaf(field):
        return None
    return find_leaf(request, CURSOR_FIELD)


def _has_rivals(field: FieldDescriptor) -> bool:
    # The compiler makes a oneof around each proto3 optional field; it restricts nothing.
    return field.containing_oneof is not None and len(field.containing_oneof.fields) > 1
