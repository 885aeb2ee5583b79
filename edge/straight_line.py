"""Straight-line code for one message type: no call per field, where Python allows it.

The long way of `edge.codec` has a closure per field, and calling them is most of what it costs.
Here the same steps are written out as Python source and compiled once, at start, as dataclasses
do it. Names and values of contracts enter the source as `repr`, never as code.

A filler takes only the usual document: each key known and given once, nothing null, nothing
inside itself. Of anything else it says no, and the long way reads the document again; only that
one has words for what is wrong, so the two can never disagree about what is right.
"""

import keyword
import threading
from collections.abc import Callable
from typing import Any, Protocol

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from edge import well_known
from edge.fields import AnyMessage, JsonValue, is_map, is_null_value, map_fields, message_type
from edge.scalars import INTEGER_RANGES, encode_map_key, scalar_decoder, scalar_encoder
from edge.well_known import ToJson

# Fills a message from a JSON value; the number of keys in it, or UNUSUAL.
Fill = Callable[[Any, Any], int]
UNUSUAL = -1

# Absent fields cost a look each: with many of them, going by what is there is cheaper.
FIELDS_MAX = 40
_JSON_IS_ONE_SCALAR = (
    frozenset(f"google.protobuf.{name}" for name in ("Timestamp", "Duration", "FieldMask"))
    | well_known.WRAPPERS
)


class Codec(Protocol):
    """The codec of a message type, which may still be compiling: look up, then call."""

    into: well_known.Into
    to_json: ToJson


CodecOf = Callable[[Descriptor], Codec]
NameOf = Callable[[FieldDescriptor], str]


class _Source:
    """A function's source while it is written, and the objects it names."""

    def __init__(self, head: str) -> None:
        self._lines = [head]
        self._names: dict[str, Any] = {}

    def add(self, *lines: str) -> None:
        """Append lines of the function's body, indented by one level already."""
        self._lines += [f"    {line}" for line in lines]

    def name(self, value: object) -> str:
        """A name for an object, inside the source."""
        name = f"_{len(self._names)}"
        self._names[name] = value
        return name

    def function(self) -> Any:  # noqa: ANN401 - what was written is known to the writer alone
        """Compile it."""
        namespace = dict(self._names)
        exec("\n".join(self._lines), namespace)  # noqa: S102 - all that enters is a repr
        return namespace["function"]


# --- JSON -> message


class Fillers:
    """The fillers of one pool's messages; each is compiled when first asked for, by any thread.

    Args:
        codec_of: gives the codecs of types whose JSON is one scalar.
        lock: held while one is compiled; codec_of may take it, too.
    """

    def __init__(self, codec_of: CodecOf, lock: threading.RLock) -> None:
        self._codec_of = codec_of
        self._lock = lock
        self._fillers: dict[str, Fill | None] = {}
        self._compiling: set[str] = set()

    def of(self, descriptor: Descriptor) -> Fill | None:
        """The filler of a message type; None where the usual document is not simple enough."""
        name = descriptor.full_name
        if name in self._fillers:
            return self._fillers[name]
        with self._lock:
            if name in self._compiling:  # a type that holds itself: others bound its depth
                return None
            if name not in self._fillers:
                self._compiling.add(name)
                self._fillers[name] = self._compile(descriptor)
                self._compiling.discard(name)
            return self._fillers[name]

    def of_field(self, field: FieldDescriptor) -> Fill | None:
        """Fills one field that is a message, from the JSON value of that field."""
        if field.is_repeated or field.message_type is None:
            return None
        fill, name = self.of(field.message_type), field.name

        def fill_field(message: AnyMessage, value: JsonValue) -> int:
            assert fill is not None
            inner = getattr(message, name)
            inner.SetInParent()
            return fill(inner, value)

        return None if fill is None else fill_field

    def _compile(self, descriptor: Descriptor) -> Fill | None:
        if _has_own_json(descriptor) or len(descriptor.fields) > FIELDS_MAX:
            return None
        source = _Source("def function(message, value):")
        source.add("if type(value) is not dict: return -1", "get = value.get", "found = keys = 0")
        for field in descriptor.fields:
            self._add_field(source, descriptor, field)
        # An unknown key, a null, or one field under two names: the counts part.
        source.add("return found + keys if found == len(value) else -1")
        fill: Fill = source.function()
        return fill

    def _add_field(self, source: _Source, message: Descriptor, field: FieldDescriptor) -> None:
        source.add(f"item = get({field.json_name!r})")
        if not _is_json_name(field.name, message):
            source.add(f"if item is None: item = get({field.name!r})")
        source.add("if item is not None:", "    found += 1")
        source.add(*[f"    {line}" for line in self._lines_of(source, field)])

    def _lines_of(self, source: _Source, field: FieldDescriptor) -> list[str]:
        oneof = field.containing_oneof
        if is_null_value(field) or (oneof is not None and len(oneof.fields) > 1):
            return ["return -1"]
        if is_map(field):
            return self._map_lines(source, field)
        if field.is_repeated:
            return self._repeated_lines(source, field)
        if field.message_type is not None:
            return self._message_lines(source, field)
        return [*_checks(field, "item"), _set(field, _decoded(source, field, "item"))]

    def _message_lines(self, source: _Source, field: FieldDescriptor) -> list[str]:
        message = message_type(field)
        begin = [f"inner = {_get(field)}", "inner.SetInParent()"]
        if message.full_name in _JSON_IS_ONE_SCALAR:
            return [*begin, f"{source.name(self._codec_of(message))}.into(inner, item)"]
        fill = self.of(message)
        if fill is None:
            return ["return -1"]
        return [*begin, *_filled(source.name(fill), "inner", "item")]

    def _repeated_lines(self, source: _Source, field: FieldDescriptor) -> list[str]:
        check = "if type(item) is not list: return -1"
        if field.message_type is None:
            decoded = _decoded(source, field, "each")
            loop = [f"    {line}" for line in _checks(field, "each")]
            loops = ["for each in item:", *loop] if loop else []
            values = "item" if decoded == "each" else f"[{decoded} for each in item]"
            return [check, *loops, f"{_get(field)}.extend({values})"]
        fill = self.of(field.message_type)
        if fill is None:
            return ["return -1"]
        lines = _filled(source.name(fill), "add()", "each")
        add = f"add = {_get(field)}.add"
        return [check, add, "for each in item:", *[f"    {line}" for line in lines]]

    def _map_lines(self, source: _Source, field: FieldDescriptor) -> list[str]:
        key, value = map_fields(field)
        # "0" and "-0" may be one key.
        if key.type != FieldDescriptor.TYPE_STRING or is_null_value(value):
            return ["return -1"]
        begin = [
            "if type(item) is not dict: return -1",
            "keys += len(item)",
            f"entries = {_get(field)}",
            "for key, each in item.items():",
            r"    if '\0' in key: return -1",
        ]
        if value.message_type is None:
            lines = [*_checks(value, "each"), f"entries[key] = {_decoded(source, value, 'each')}"]
        else:
            fill = self.of(value.message_type)
            if fill is None:
                return ["return -1"]
            lines = _filled(source.name(fill), "entries[key]", "each")
        return [*begin, *[f"    {line}" for line in lines]]


def _checks(field: FieldDescriptor, value: str) -> list[str]:
    """What is checked in place, beside what `_decoded` checks."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return [rf"if type({value}) is not str or '\0' in {value}: return -1"]
    if field.type == FieldDescriptor.TYPE_BOOL:
        return [f"if {value} is not True and {value} is not False: return -1"]
    return []


def _decoded(source: _Source, field: FieldDescriptor, value: str) -> str:
    """An expression that decodes a value which has passed its checks; it may raise Wrong."""
    if field.type in {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BOOL}:
        return value
    decode = source.name(scalar_decoder(field))
    if field.cpp_type in INTEGER_RANGES:
        _, low, high = INTEGER_RANGES[field.cpp_type]
        is_plain = f"type({value}) is int and {low} <= {value} <= {high}"
        return f"{value} if {is_plain} else {decode}({value})"
    return f"{decode}({value})"


def _filled(fill: str, message: str, value: str) -> list[str]:
    return [f"count = {fill}({message}, {value})", "if count < 0: return -1", "keys += count"]


def _get(field: FieldDescriptor) -> str:
    is_word = keyword.iskeyword(field.name)  # "from" is a fine name for a field
    return f"getattr(message, {field.name!r})" if is_word else f"message.{field.name}"


def _set(field: FieldDescriptor, value: str) -> str:
    if keyword.iskeyword(field.name):
        return f"setattr(message, {field.name!r}, {value})"
    return f"message.{field.name} = {value}"


def _is_json_name(name: str, message: Descriptor) -> bool:
    return any(field.json_name == name for field in message.fields)


def _has_own_json(descriptor: Descriptor) -> bool:
    return descriptor.full_name.startswith("google.protobuf.")


# --- message -> JSON


def encoder(descriptor: Descriptor, name_of: NameOf, codec_of: CodecOf) -> ToJson:
    """Makes the JSON value of a message, with its defaults; extensions are left out.

    Args:
        descriptor: of a message whose JSON is an object.
        name_of: the key that a field is written under.
        codec_of: gives the codecs of the messages inside.
    """
    source = _Source("def function(message):")
    plain = [field for field in descriptor.fields if not field.has_presence]
    pairs = [f"{name_of(field)!r}: {_value(source, field, codec_of)}" for field in plain]
    source.add(f"out = {{{', '.join(pairs)}}}")
    for field in descriptor.fields:
        if field.has_presence:
            value = _value(source, field, codec_of)
            source.add(f"if message.HasField({field.name!r}):")
            source.add(f"    out[{name_of(field)!r}] = {value}")
    source.add("return out")
    encode: ToJson = source.function()
    return encode


def _value(source: _Source, field: FieldDescriptor, codec_of: CodecOf) -> str:
    """An expression for the whole value of a field."""
    values = _get(field)
    if is_map(field):
        return f"{source.name(map_encoder(field, codec_of))}({values})"
    if not field.is_repeated:
        return _encoded(source, field, values, codec_of)
    each = _encoded(source, field, "each", codec_of)
    return f"list({values})" if each == "each" else f"[{each} for each in {values}]"


def _encoded(source: _Source, field: FieldDescriptor, value: str, codec_of: CodecOf) -> str:
    if field.message_type is not None:
        codec = codec_of(field.message_type)
        if field.message_type.full_name in well_known.CODECS:
            return f"{source.name(codec.to_json)}({value})"
        return f"{source.name(codec)}.to_json({value})"
    encode = scalar_encoder(field)
    return value if encode is None else f"{source.name(encode)}({value})"


def map_encoder(field: FieldDescriptor, codec_of: CodecOf) -> ToJson:
    """Writes a map; it has no order of its own, and sorted, equal ones have equal documents."""
    key, value = map_fields(field)
    source = _Source("def function(entries):")
    is_text = key.type == FieldDescriptor.TYPE_STRING
    written = "key" if is_text else f"{source.name(encode_map_key)}(key)"
    each = _encoded(source, value, "entries[key]", codec_of)
    source.add(f"return {{{written}: {each} for key in sorted(entries)}}")
    encode: ToJson = source.function()
    return encode
