"""Binary messages from outside, held to what JSON is held to: text without NUL.

Fields that these contracts do not know are kept and passed on, as protobuf means it: a client
may be newer than this edge.
"""

from collections.abc import Iterator

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from edge.fields import AnyMessage, descriptor_of, is_map
from edge.json_text import Wrong
from edge.scalars import decode_string


def message_of_bytes(message_class: type[Message], data: bytes) -> Message:
    """Read one message.

    Raises:
        Wrong: data is no message of this type, or text in it holds NUL; its path names the field.
    """
    message = message_class()
    try:
        message.ParseFromString(data)
    except DecodeError:
        name = descriptor_of(message_class).full_name
        raise Wrong(f"is not a binary {name}") from None
    if b"\0" in data:
        _refuse_nul(message)
    return message


def _refuse_nul(message: AnyMessage) -> None:
    for field, value in message.ListFields():
        for keys, item in _items(field, value):
            try:
                if type(item) is str:
                    decode_string(item)
                elif isinstance(item, Message):
                    _refuse_nul(item)
            except Wrong as wrong:
                for key in reversed(keys):
                    wrong.within(key)
                raise


def _items(field: FieldDescriptor, value: AnyMessage) -> Iterator[tuple[list[str | int], object]]:
    """Each single value of a field, with its path from the message; of a map, keys as well."""
    name = field.json_name
    if is_map(field):
        for key, item in value.items():
            yield [name], key
            yield [name, str(key)], item
    elif field.is_repeated:
        for index, item in enumerate(value):
            yield [name, index], item
    else:
        yield [name], value
