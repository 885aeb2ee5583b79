"""What descriptors say about fields, in the types that the rest of the edge uses.

Messages are made at run time from descriptors, so the type checker cannot know their
fields: AnyMessage and JsonValue mark where that is meant.
"""

from typing import Any, TypeAlias, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

AnyMessage: TypeAlias = Any
JsonValue: TypeAlias = Any  # dict, list, str, int, float, bool or None


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


def map_fields(field: FieldDescriptor) -> tuple[FieldDescriptor, FieldDescriptor]:
    """The key and the value of a map field."""
    entry = message_type(field).fields_by_name
    return entry["key"], entry["value"]
