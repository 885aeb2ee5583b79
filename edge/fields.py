"""What descriptors say about fields, in the types that the rest of the edge uses.

Messages are made at run time from descriptors, so the type checker cannot know their
fields: AnyMessage and JsonValue mark where that is meant.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from edge.compiled import compiled

AnyMessage: TypeAlias = Any
JsonValue: TypeAlias = Any  # dict, list, str, int, float, bool or None

# More message types than any contract set has; old contracts leave the cache after a swap.
_MESSAGES_MAX = 4096


def descriptor_of(message_class: type[Message]) -> Descriptor:
    """The descriptor of a message class."""
    return cast("Descriptor", message_class.DESCRIPTOR)


def message_type(field: FieldDescriptor) -> Descriptor:
    """The message type of a field that is one."""
    assert field.message_type is not None
    return field.message_type


def is_map(field: FieldDescriptor) -> bool:
    """Whether the field is a map."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def is_null_value(field: FieldDescriptor) -> bool:
    """Whether the field is the enum that has null as its only value."""
    return field.enum_type is not None and field.enum_type.full_name == "google.protobuf.NullValue"


def has_one_text(message: Descriptor, name: str) -> bool:
    """Whether the message has this field, and it is one string."""
    field = message.fields_by_name.get(name)
    return field is not None and field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated


def map_fields(field: FieldDescriptor) -> tuple[FieldDescriptor, FieldDescriptor]:
    """The key and the value of a map field."""
    entry = message_type(field).fields_by_name
    return entry["key"], entry["value"]


@compiled(_MESSAGES_MAX)
def fields_by_any_name(message: Descriptor) -> Mapping[str, FieldDescriptor]:
    """The fields of a message by JSON name and by proto name.

    Where the JSON name of one field is the proto name of another, the JSON name counts.
    """
    by_json_name = {field.json_name: field for field in message.fields}
    return {field.name: field for field in message.fields} | by_json_name


def may_not_parse(message: Descriptor) -> bool:
    """Whether a message of this type can be made that parsers refuse.

    Its bytes are refused where a required field is missing, or where messages stand deeper
    inside each other than 100 levels; only a type that holds itself can get there. What an
    extension holds is not known here.
    """
    finished: set[str] = set()

    def visit(descriptor: Descriptor, above: frozenset[str]) -> bool:
        name = descriptor.full_name
        if name in above:
            return True
        if name in finished:
            return False
        if descriptor.is_extendable:
            return True
        inside = above | {name}
        for field in descriptor.fields:
            if field.is_required or (
                field.message_type is not None and visit(field.message_type, inside)
            ):
                return True
        finished.add(name)
        return False

    return visit(message, frozenset())
