"""A request message against its contract: bytes -> a message that may be believed, or a refusal.

How long its lists are is looked at before anything else. The rules of protovalidate cost
microseconds per element, and it looks at every element also of a list that is too long: one
message of 4 MiB with two million empty entries held the loop for minutes (spec S84).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import protovalidate
from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from shared.errors import InvalidRequest, Violation

# For a list or map whose contract sets no bound; ten times what any of ours needs.
ITEMS_MAX = 1000

# One for all: it keeps the compiled rules of every message type.
_validator = protovalidate.Validator()


class RequestReader:
    """Reads requests of one method.

    Everything is prepared here, at start: the first request would otherwise wait 10 ms for it.

    Args:
        parse: the FromString of the request's type.
    """

    def __init__(self, parse: Callable[[bytes], Message]) -> None:
        empty = parse(b"")
        bounds = _bounds_of(cast("Descriptor", empty.DESCRIPTOR), {})
        self._parse = parse
        self._bounds = bounds if bounds.has_lists else None
        _validator.collect_violations(empty)

    def read(self, raw: bytes) -> Message:
        """The message.

        Raises:
            InvalidRequest: it is malformed, or breaks a rule; the fields are named.
        """
        try:
            message = self._parse(raw)
        except DecodeError as error:
            raise InvalidRequest("the request message is malformed") from error
        if self._bounds is not None:
            self._bounds.check(message, "")
        violations = _validator.collect_violations(message)
        if violations:
            raise _refusal_of(violations)
        return message


@dataclass
class _Bounds:
    """How long the lists in a message of one type may be, at every depth.

    Attributes:
        lists: name, most items, and the bounds inside of each item, if any.
        messages: name and bounds of the messages that hold lists.
    """

    lists: list[tuple[str, int, "_Bounds | None"]]
    messages: list[tuple[str, "_Bounds"]]

    @property
    def has_lists(self) -> bool:
        return bool(self.lists or self.messages)

    def check(self, message: Any, path: str) -> None:  # noqa: ANN401  fields are got by name
        for name, items_max, inner in self.lists:
            items = getattr(message, name)
            if len(items) > items_max:
                raise InvalidRequest.of_field(
                    path + name, f"must contain no more than {items_max} item(s)"
                )
            if inner is not None:
                self._check_items(items, inner, path + name)
        for name, inner in self.messages:
            if message.HasField(name):
                inner.check(getattr(message, name), f"{path}{name}.")

    def _check_items(self, items: Any, inner: "_Bounds", path: str) -> None:  # noqa: ANN401
        for key in items if hasattr(items, "keys") else range(len(items)):
            inner.check(items[key], f"{path}[{key!r}].")


def _bounds_of(descriptor: Descriptor, known: dict[str, _Bounds]) -> _Bounds:
    """The bounds of a type; recursive types refer to themselves."""
    if descriptor.full_name in known:
        return known[descriptor.full_name]
    bounds = known[descriptor.full_name] = _Bounds([], [])
    for field in descriptor.fields:
        held = _message_in(field)
        holds_lists = held is not None and _may_hold_lists(held, set())
        inner = _bounds_of(held, known) if held is not None and holds_lists else None
        if field.is_repeated:
            bounds.lists.append((field.name, _items_max(field), inner))
        elif inner is not None:
            bounds.messages.append((field.name, inner))
    return bounds


def _message_in(field: FieldDescriptor) -> Descriptor | None:
    """The message type that a field, an element of a list or a value of a map is of."""
    held: Descriptor | None = field.message_type
    if held is not None and held.GetOptions().map_entry:
        held = held.fields_by_name["value"].message_type
    return held


def _may_hold_lists(descriptor: Descriptor, seen: set[str]) -> bool:
    if descriptor.full_name in seen:
        return False
    seen.add(descriptor.full_name)
    return any(
        field.is_repeated
        or (field.message_type is not None and _may_hold_lists(field.message_type, seen))
        for field in descriptor.fields
    )


def _items_max(field: FieldDescriptor) -> int:
    rules = field.GetOptions().Extensions[validate_pb2.field]
    if rules.repeated.HasField("max_items"):
        return rules.repeated.max_items
    if rules.map.HasField("max_pairs"):
        return rules.map.max_pairs
    return ITEMS_MAX


def _refusal_of(violations: Sequence[protovalidate.Violation]) -> InvalidRequest:
    found = [Violation(_path_of(v), _description_of(v)) for v in violations]
    first = found[0]
    return InvalidRequest(f"{first.field}: {first.description}", violations=found)


def _path_of(violation: protovalidate.Violation) -> str:
    """The field in proto names: "entries[0].amount"."""
    path, field_path = "", violation.proto.field
    for element in field_path.elements if field_path else ():
        path += ("." if path else "") + element.field_name
        subscript = element.subscript
        if subscript is not None:
            path += f"[{subscript.value!r}]"
    return path


def _description_of(violation: protovalidate.Violation) -> str:
    return violation.proto.message or violation.proto.rule_id
