"""Scalar values between JSON and messages, as the proto3 JSON mapping says.

A decoder takes a JSON value and returns what the message field takes, or raises Wrong.
An encoder is the way back; None stands for "the value as it is". Booleans are never
numbers, and no number is ever rounded into an integer field.
"""

import base64
import binascii
import math
import re
import struct
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

from edge.fields import JsonValue
from edge.json_text import ExactFloat, InexactNumberError, Wrong

Decode = Callable[[Any], Any]
Encode = Callable[[Any], Any] | None

INTEGER_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: ("int32", -(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: ("uint32", 0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: ("int64", -(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: ("uint64", 0, 2**64 - 1),
}
_INTEGER_TEXT = re.compile(r"-?(?:0|[1-9][0-9]{0,19})")
# JSON's number grammar inside a string, with up to 40 digits after the point.
_NUMBER_TEXT = re.compile(r"-?(?:0|[1-9][0-9]{0,400})(?:\.[0-9]{1,1100})?(?:[eE][+-]?[0-9]{1,5})?")
_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BASE64_URL = str.maketrans("-_", "+/")


def decode_string(value: JsonValue) -> str:
    """A JSON string; NUL is refused, since no database text holds it."""
    if type(value) is not str:
        raise Wrong("must be a string")
    if "\0" in value:
        raise Wrong("must not hold the character NUL")
    return value


def decode_bool(value: JsonValue) -> bool:
    """True or false, and nothing like it."""
    if value is True or value is False:
        return value
    raise Wrong("must be true or false")


def decode_bytes(value: JsonValue) -> bytes:
    """Base64 in the standard or the URL alphabet, with or without padding (RFC 4648)."""
    if type(value) is not str:
        raise Wrong("must be a base64 string")
    text = value.translate(_BASE64_URL).rstrip("=")
    padding = len(value) - len(text)
    if padding > 2 or (padding and len(value) % 4):
        raise Wrong("must be base64")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Wrong("must be base64") from None


def encode_bytes(value: bytes) -> str:
    """Standard base64 with padding."""
    return binascii.b2a_base64(value, newline=False).decode()


def integer_decoder(cpp_type: int) -> Decode:
    """A decoder of one integer type: numbers, or strings of digits, exact up to the range's end."""
    name, low, high = INTEGER_RANGES[cpp_type]

    def decode(value: JsonValue) -> int:
        if type(value) is int and low <= value <= high:
            return value
        number = _integer_of(value)
        if number is None:
            raise Wrong(f"must be an integer ({name})")
        if not low <= number <= high:
            raise Wrong(f"must be an integer from {low} to {high}")
        return number

    return decode


def _integer_of(value: JsonValue) -> int | None:
    """The exact integer that value stands for, or None."""
    if type(value) is int:
        return value
    if type(value) is str:
        if _INTEGER_TEXT.fullmatch(value):
            return int(value)
        # proto JSON takes "1.0" and "1e2" as well, as it does bare.
        return ExactFloat.of_text(value).as_integer() if _NUMBER_TEXT.fullmatch(value) else None
    if type(value) is ExactFloat:
        return value.as_integer()
    if type(value) is float:
        # 1.00000000000000000001 has become 1.0 by now: only the text can tell.
        raise InexactNumberError
    return None


def decode_double(value: JsonValue) -> float:
    """A number, a string that holds one, "NaN", "Infinity" or "-Infinity"."""
    if type(value) is float or type(value) is int:
        return float(value)
    if type(value) is ExactFloat:
        return float(value)
    if type(value) is str:
        if value in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[value]
        if _NUMBER_TEXT.fullmatch(value):
            number = float(value)
            if math.isfinite(number):
                return number
            raise Wrong("is out of the range of a double")
    raise Wrong("must be a number")


def decode_float(value: JsonValue) -> float:
    """As decode_double, within the range of 32-bit floats after rounding."""
    number = decode_double(value)
    try:
        struct.pack("<f", number)
    except OverflowError:
        raise Wrong("is out of the range of a float") from None
    return number


def encode_double(value: float) -> float | str:
    """The number, or the name of one that JSON cannot write."""
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def encode_float(value: float) -> float | str:
    """The shortest decimal that gives the same 32-bit float back."""
    if not math.isfinite(value):
        return encode_double(value)
    wanted = struct.pack("<f", value)
    for digits in range(6, 9):
        shorter = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", shorter) == wanted:
                return shorter
        except OverflowError:  # rounded up beyond the largest float
            continue
    return float(f"{value:.9g}")


def enum_decoder(enum: EnumDescriptor) -> Decode:
    """A decoder of an enum: its names, or numbers (any int32 if the enum is open)."""
    if enum.full_name == "google.protobuf.NullValue":
        return _decode_null_value
    numbers = {value.name: value.number for value in enum.values}
    known = set(numbers.values())
    is_closed = enum.is_closed

    def decode(value: JsonValue) -> int:
        if type(value) is str:
            number = numbers.get(value)
            if number is not None:
                return number
        else:
            integer = _integer_of(value)
            if integer is not None and (
                integer in known if is_closed else -(2**31) <= integer < 2**31
            ):
                return integer
        raise Wrong(f"must be one of {', '.join(list(numbers)[:20])}")

    return decode


def _decode_null_value(value: JsonValue) -> int:
    if value is None or value == "NULL_VALUE" or (type(value) is int and value == 0):
        return 0
    raise Wrong("must be null")


def enum_encoder(enum: EnumDescriptor) -> Encode:
    """An encoder of an enum: the name, or the number of a value this edge does not know."""
    if enum.full_name == "google.protobuf.NullValue":
        return lambda _: None
    # With aliases, the first name of a number stands for it.
    return _EnumNames((value.number, value.name) for value in reversed(enum.values)).__getitem__


class _EnumNames(dict[int, str | int]):
    """Names by number; a number that is not known stands for itself."""

    def __missing__(self, number: int) -> int:
        return number


def scalar_decoder(field: FieldDescriptor) -> Decode:
    """The decoder of a field that is no message."""
    if field.cpp_type in INTEGER_RANGES:
        return integer_decoder(field.cpp_type)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return enum_decoder(_enum(field))
    return _DECODERS[field.type]


def scalar_encoder(field: FieldDescriptor) -> Encode:
    """The encoder of a field that is no message; None where JSON takes the value as it is."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return enum_encoder(_enum(field))
    return _ENCODERS[field.type]


def _enum(field: FieldDescriptor) -> EnumDescriptor:
    assert field.enum_type is not None
    return field.enum_type


_INTEGERS_32 = (
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_SINT32,
    FieldDescriptor.TYPE_SFIXED32,
    FieldDescriptor.TYPE_UINT32,
    FieldDescriptor.TYPE_FIXED32,
)
_INTEGERS_64 = (
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_SINT64,
    FieldDescriptor.TYPE_SFIXED64,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_FIXED64,
)
_DECODERS: dict[int, Decode] = {
    FieldDescriptor.TYPE_STRING: decode_string,
    FieldDescriptor.TYPE_BYTES: decode_bytes,
    FieldDescriptor.TYPE_BOOL: decode_bool,
    FieldDescriptor.TYPE_DOUBLE: decode_double,
    FieldDescriptor.TYPE_FLOAT: decode_float,
}
_ENCODERS: dict[int, Encode] = {
    FieldDescriptor.TYPE_STRING: None,
    FieldDescriptor.TYPE_BYTES: encode_bytes,
    FieldDescriptor.TYPE_BOOL: None,
    FieldDescriptor.TYPE_DOUBLE: encode_double,
    FieldDescriptor.TYPE_FLOAT: encode_float,
    **dict.fromkeys(_INTEGERS_32),
    **dict.fromkeys(_INTEGERS_64, str),
}


def map_key_decoder(field: FieldDescriptor) -> Decode:
    """The decoder of a map's key, which JSON always writes as a string."""
    if field.type != FieldDescriptor.TYPE_BOOL:
        return scalar_decoder(field)
    return decode_bool_text


def decode_bool_text(value: str) -> bool:
    """The words true and false."""
    if value not in {"true", "false"}:
        raise Wrong("must be true or false")
    return value == "true"


def encode_map_key(value: JsonValue) -> str:
    """A map's key as a JSON string."""
    if type(value) is str:
        return value
    if value is True or value is False:
        return "true" if value else "false"
    if type(value) is bytes:  # text that protobuf had to leave unchecked
        raise ValueError("a map's key is no UTF-8")
    return str(value)
