"""Random messages of any descriptor, for property tests."""

import math
import string

from google.protobuf.descriptor import FieldDescriptor as F
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NAME = st.text(string.ascii_lowercase, min_size=1, max_size=8)
LARGEST_FLOAT_32 = 3.4028234663852886e38
# One NaN only: JSON has no other. The largest float has its own case: the reference cannot read
# the shortest text of it.
NAN = st.just(math.nan)
FLOAT_32 = st.floats(width=32, allow_nan=False).filter(lambda x: abs(x) != LARGEST_FLOAT_32) | NAN
DOUBLE = st.floats(allow_nan=False) | NAN

SCALARS = {
    F.TYPE_STRING: TEXT,
    F.TYPE_BYTES: st.binary(max_size=12),
    F.TYPE_BOOL: st.booleans(),
    F.TYPE_FLOAT: FLOAT_32,
    F.TYPE_DOUBLE: DOUBLE,
}
INTEGERS = {
    F.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    F.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    F.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    F.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def scalars(field):
    """Values of a field that is no message."""
    if field.enum_type is not None:
        if field.enum_type.full_name == "google.protobuf.NullValue":
            return st.just(0)
        unknown = [] if field.enum_type.is_closed else [77]
        return st.sampled_from([value.number for value in field.enum_type.values] + unknown)
    return INTEGERS[field.cpp_type] if field.cpp_type in INTEGERS else SCALARS[field.type]


@st.composite
def messages(draw, descriptor, levels=3):
    """Messages of a type; below `levels` of nesting only scalars are set."""
    message = GetMessageClass(descriptor)()
    fill(draw, message, levels)
    return message


def fill(draw, message, levels):
    known = FILLERS.get(message.DESCRIPTOR.full_name)
    if known is not None:
        known(draw, message)
        return
    fields = fields_of(message.DESCRIPTOR)
    chosen = draw(st.sets(st.sampled_from(fields), max_size=8)) if fields else set()
    for field in fields:
        if field.is_required or (field in chosen and (field.message_type is None or levels > 0)):
            fill_field(draw, message, field, levels - 1)


def fields_of(descriptor):
    """Fields and known extensions."""
    pool = descriptor.file.pool
    extensions = pool.FindAllExtensions(descriptor) if descriptor.is_extendable else []
    return [*descriptor.fields, *extensions]


def fill_field(draw, message, field, levels):
    value = message.Extensions[field] if field.is_extension else getattr(message, field.name)
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if is_map:
        entry = field.message_type.fields_by_name
        for key in draw(st.sets(scalars(entry["key"]), max_size=3)):
            if entry["value"].message_type is None:
                value[key] = draw(scalars(entry["value"]))
            else:
                fill(draw, value[key], levels)
    elif field.is_repeated and field.message_type is None:
        value.extend(draw(st.lists(scalars(field), max_size=3)))
    elif field.is_repeated:
        for _ in range(draw(st.integers(0, 2))):
            fill(draw, value.add(), levels)
    elif field.message_type is None:
        set_scalar(message, field, draw(scalars(field)))
    else:
        value.SetInParent()
        fill(draw, value, levels)


def set_scalar(message, field, value):
    if field.is_extension:
        message.Extensions[field] = value
    else:
        setattr(message, field.name, value)


def fill_timestamp(draw, message):
    message.seconds = draw(st.integers(-62135596800, 253402300799))
    message.nanos = draw(st.sampled_from([0, 1, 1000, 120_000_000, 999_999_999]))


def fill_duration(draw, message):
    sign = draw(st.sampled_from([-1, 1]))
    message.seconds = sign * draw(st.integers(0, 315_576_000_000 - 1))
    message.nanos = sign * draw(st.sampled_from([0, 1, 1000, 120_000_000, 999_999_999]))


def fill_mask(draw, message):
    path = st.lists(NAME, min_size=1, max_size=3).map("_".join)
    message.paths.extend(draw(st.lists(st.lists(path, min_size=1, max_size=2).map(".".join))))


def fill_any(draw, message):
    """An Any of a Timestamp, or nothing at all."""
    if draw(st.booleans()):
        pool = message.DESCRIPTOR.file.pool
        inner = GetMessageClass(pool.FindMessageTypeByName("google.protobuf.Timestamp"))()
        fill_timestamp(draw, inner)
        message.Pack(inner)


def set_json_value(message, value):
    if value is None:
        message.null_value = 0
    elif isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, (int, float)):
        assert math.isfinite(value)
        message.number_value = value
    elif isinstance(value, str):
        message.string_value = value
    elif isinstance(value, list):
        message.list_value.SetInParent()
        for item in value:
            set_json_value(message.list_value.values.add(), item)
    else:
        message.struct_value.SetInParent()
        for key, item in value.items():
            set_json_value(message.struct_value.fields[key], item)


def fill_struct(draw, message):
    for key, value in draw(st.dictionaries(TEXT, JSON_VALUES, max_size=3)).items():
        set_json_value(message.fields[key], value)


def fill_list(draw, message):
    for value in draw(st.lists(JSON_VALUES, max_size=3)):
        set_json_value(message.values.add(), value)


FILLERS = {
    "google.protobuf.Timestamp": fill_timestamp,
    "google.protobuf.Duration": fill_duration,
    "google.protobuf.FieldMask": fill_mask,
    "google.protobuf.Any": fill_any,
    "google.protobuf.Value": lambda draw, message: set_json_value(message, draw(JSON_VALUES)),
    "google.protobuf.Struct": fill_struct,
    "google.protobuf.ListValue": fill_list,
}
