"""Parameters in text, from a query or a path, into the fields of a message.

http.proto: a parameter's name is the field path in the request message; fields are
primitive, repeated primitive, or messages whose fields are parameters of their own.
Beyond that text, every well-known type is a leaf: what JSON writes as one string or
number (times, masks, wrappers) is written bare, and the others (Struct, Value, ListValue,
Any, Empty) as a JSON document. A map of leaves is written labels[key]=value, as
grpc-gateway does. Names may be JSON names or proto names; a field under two spellings
is given twice.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote_to_bytes

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from edge import well_known
from edge.codec import codecs_of
from edge.compiled import compiled
from edge.fields import (
    AnyMessage,
    JsonValue,
    fields_by_any_name,
    is_map,
    is_null_value,
    map_fields,
    message_type,
)
from edge.ignored import Ignored
from edge.json_text import Wrong
from edge.scalars import decode_bool_text, map_key_decoder, scalar_decoder

QUERY_PARAMETERS_MAX = 1000
PATH_PARTS_MAX = 32
CACHED_NAME_MAX, LEAVES_MAX, DECODERS_MAX = 64, 4096, 4096

_NUMBER = re.compile(r"-?[0-9]{1,10}")

TextDecode = Callable[[str], Any]

_TEXT_LEAVES = {
    f"google.protobuf.{name}": well_known.CODECS[f"google.protobuf.{name}"][0]
    for name in ("Timestamp", "Duration", "FieldMask")
}
# What JSON writes as an object, an array or anything at all.
_JSON_LEAVES = frozenset(
    f"google.protobuf.{name}" for name in ("Struct", "Value", "ListValue", "Any", "Empty")
)


class UnknownParameter(Wrong):
    """A parameter names no field."""

    def __init__(self, name: str) -> None:
        super().__init__("is no parameter of this method")
        self._field_text = name[:CACHED_NAME_MAX]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A field that text can fill.

    Attributes:
        fields: from the message's own field down to it.
        map_key: the key in labels[key], or None.
    """

    fields: tuple[FieldDescriptor, ...]
    map_key: str | None

    @cached_property
    def path(self) -> tuple[str, ...]:
        """Proto names, for comparison."""
        return tuple(field.name for field in self.fields)

    @cached_property
    def json_path(self) -> str:
        """As callers write it: "filter.labels[a]"."""
        text = ".".join(field.json_name for field in self.fields)
        return text if self.map_key is None else f"{text}[{self.map_key}]"

    @cached_property
    def decode(self) -> TextDecode | None:
        """For the usual leaf, one plain scalar of the message itself; None for all others."""
        field = self.fields[0]
        is_plain = len(self.fields) == 1 and not field.is_repeated and field.message_type is None
        return text_decoder(field) if is_plain and field.containing_oneof is None else None


def parse_query(query: bytes) -> list[tuple[str, str]]:
    """Split and decode a query string ("a=1&b=2"); "+" is a space, as browsers send it.

    Raises:
        Wrong: too many parameters, or one that is not percent-encoded UTF-8.
    """
    if query.count(b"&") >= QUERY_PARAMETERS_MAX:
        raise Wrong(f"has more than {QUERY_PARAMETERS_MAX} parameters")
    pairs = []
    if b"%" not in query and b"+" not in query and query.isascii():
        for text in query.decode("ascii").split("&"):
            if text:
                name_text, _, value_text = text.partition("=")
                pairs.append((name_text, value_text))
        return pairs
    for part in query.split(b"&"):
        if part:
            name, _, value = part.partition(b"=")
            key = _decode_part(name, "a parameter's name")
            pairs.append((key, _decode_part(value, key)))
    return pairs


def _decode_part(part: bytes, what: str) -> str:
    plain = part.replace(b"+", b" ")
    if b"%" in plain:
        decoded = unquote_to_bytes(plain)
        # Each good escape turns three bytes into one; what is left over is a broken one.
        if len(plain) - len(decoded) != 2 * plain.count(b"%"):
            raise Wrong.of_field(what[:64], "is not percent-encoded")
        plain = decoded
    try:
        return plain.decode()
    except UnicodeDecodeError:
        raise Wrong.of_field(what[:64], "must be UTF-8 text") from None


def find_leaf(message: Descriptor, name: str) -> Leaf:
    """Find the field that a parameter names.

    Raises:
        Wrong: there is none, or text can not fill it.
    """
    # Long names are made up by someone: they must not fill the memory behind the cache.
    return _find_leaf(message, name) if len(name) > CACHED_NAME_MAX else _known_leaf(message, name)


@compiled(LEAVES_MAX)
def _known_leaf(message: Descriptor, name: str) -> Leaf:
    return _find_leaf(message, name)


def _find_leaf(message: Descriptor, name: str) -> Leaf:
    path, bracket, rest = name.partition("[")
    parts = path.split(".")
    if (bracket and not rest.endswith("]")) or len(parts) > PATH_PARTS_MAX:
        raise UnknownParameter(name)
    fields: list[FieldDescriptor] = []
    descriptor: Descriptor | None = message
    for part in parts:
        field = fields_by_any_name(descriptor).get(part) if descriptor is not None else None
        if field is None:
            raise UnknownParameter(name)
        fields.append(field)
        descriptor = None if field.is_repeated or is_text_leaf(field) else field.message_type
    leaf = Leaf(tuple(fields), rest[:-1] if bracket else None)
    _check_leaf(leaf)
    return leaf


def is_text_leaf(field: FieldDescriptor) -> bool:
    """Whether one text (or, repeated, several) can fill the field."""
    if field.message_type is None:
        return True
    name = field.message_type.full_name
    return name in _TEXT_LEAVES or name in well_known.WRAPPERS or name in _JSON_LEAVES


def is_json_leaf(field: FieldDescriptor) -> bool:
    """Whether the text that fills the field is a JSON document."""
    return field.message_type is not None and field.message_type.full_name in _JSON_LEAVES


def _check_leaf(leaf: Leaf) -> None:
    field = leaf.fields[-1]
    if is_map(field):
        if leaf.map_key is None or not is_text_leaf(map_fields(field)[1]):
            raise Wrong.of_field(leaf.json_path, f"is a map: write {field.json_name}[key]=value")
    elif leaf.map_key is not None:
        raise Wrong.of_field(leaf.json_path, "is no map")
    elif not is_text_leaf(field):
        raise Wrong.of_field(leaf.json_path, "is a message: name one of its fields")


def set_leaf(message: AnyMessage, leaf: Leaf, texts: list[str]) -> None:
    """Fill a field from text.

    Args:
        message: the root message.
        leaf: of its type.
        texts: one text, or more for a repeated field.

    Raises:
        Wrong: a text does not fit, or another member of its oneof is set.
    """
    try:
        if leaf.decode is not None:
            setattr(message, leaf.fields[0].name, leaf.decode(_only(texts)))
            return
        target = message
        for field in leaf.fields[:-1]:
            _check_oneof(target, field)
            target = getattr(target, field.name)
        field = leaf.fields[-1]
        _check_oneof(target, field)
        if is_map(field):
            _set_map_entry(target, field, leaf.map_key or "", _only(texts))
        elif field.is_repeated:
            for text in texts:
                _append(getattr(target, field.name), field, text)
        else:
            _set_single(target, field, _only(texts))
    except Wrong as wrong:
        inside = wrong.field
        joint = "." if inside and not inside.startswith("[") else ""
        raise Wrong.of_field(leaf.json_path + joint + inside, wrong.description) from None


def _only(texts: list[str]) -> str:
    if len(texts) > 1:
        raise Wrong("is given twice")
    return texts[0]


def _set_single(target: AnyMessage, field: FieldDescriptor, text: str) -> None:
    if field.message_type is None:
        setattr(target, field.name, text_decoder(field)(text))
    else:
        _fill(getattr(target, field.name), field, text)


def _append(values: AnyMessage, field: FieldDescriptor, text: str) -> None:
    if field.message_type is None:
        values.append(text_decoder(field)(text))
    else:
        _fill(values.add(), field, text)


def _fill(inner: AnyMessage, field: FieldDescriptor, text: str) -> None:
    inner.SetInParent()
    descriptor = message_type(field)
    into = _TEXT_LEAVES.get(descriptor.full_name)
    if into is not None:
        into(inner, text)
    elif descriptor.full_name in _JSON_LEAVES:
        codecs_of(descriptor.file.pool).of(descriptor).reader.read(inner, text.encode())
    else:
        inner.value = text_decoder(descriptor.fields_by_name["value"])(text)


def _set_map_entry(target: AnyMessage, field: FieldDescriptor, key: str, text: str) -> None:
    key_field, value_field = map_fields(field)
    map_key = map_key_decoder(key_field)(key)
    values = getattr(target, field.name)
    if map_key in values:  # "0" and "-0"
        raise Wrong("is given twice")
    if value_field.message_type is None:
        values[map_key] = text_decoder(value_field)(text)
    else:
        _fill(values[map_key], value_field, text)


def _check_oneof(target: AnyMessage, field: FieldDescriptor) -> None:
    oneof = field.containing_oneof
    if oneof is None:
        return
    before = target.WhichOneof(oneof.name)
    if before is not None and before != field.name:
        other = next(member.json_name for member in oneof.fields if member.name == before)
        raise Wrong(f"excludes {other}: only one of {oneof.name} may be set")


@compiled(DECODERS_MAX)
def text_decoder(field: FieldDescriptor) -> TextDecode:
    """The decoder of a scalar field from text."""
    if field.type == FieldDescriptor.TYPE_BOOL:
        return decode_bool_text
    decode = scalar_decoder(field)
    if field.type != FieldDescriptor.TYPE_ENUM:
        return decode

    if is_null_value(field):
        return lambda text: decode(None if text == "null" else text)

    # An enum's number arrives as text; no name looks like a number.
    def decode_enum(text: str) -> JsonValue:
        return decode(int(text) if _NUMBER.fullmatch(text) else text)

    return decode_enum


def gather(
    pairs: Iterable[tuple[str, str]], message: Descriptor, ignored: Ignored | None = None
) -> list[tuple[Leaf, list[str]]]:
    """Bring together what names the same field, under whichever spelling.

    Args:
        pairs: names and texts, from parse_query.
        message: of the request.
        ignored: learns of parameters that name no field; None refuses them.

    Raises:
        Wrong: a parameter names no field that text can fill.
    """
    gathered: dict[str, tuple[Leaf, list[str]]] = {}
    leaves: dict[str, Leaf] = {}
    for name, text in pairs:
        leaf = leaves.get(name)
        if leaf is None:
            try:
                leaf = leaves[name] = find_leaf(message, name)
            except UnknownParameter:
                if ignored is None:
                    raise
                ignored.note(message.full_name, name)
                continue
        gathered.setdefault(leaf.json_path, (leaf, []))[1].append(text)
    return list(gathered.values())
