"""The well-known types whose JSON is no plain object: times, wrappers, Struct, masks.

Each has a decoder that fills a message from a JSON value, and an encoder that makes
the value. Any is in codec.py, since it holds any other message.
"""

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from google.protobuf.descriptor import Descriptor

from edge.fields import AnyMessage, JsonValue
from edge.json_text import ExactFloat, Wrong
from edge.scalars import decode_string, scalar_decoder, scalar_encoder

# Descriptors are made at run time, so messages have no static fields here.
Into = Callable[[Any, Any], None]
ToJson = Callable[[Any], Any]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIMESTAMP_S_MIN, TIMESTAMP_S_MAX = -62_135_596_800, 253_402_300_799  # years 0001 to 9999
DURATION_S_MAX = 315_576_000_000  # about 10,000 years, by duration.proto

_TIMESTAMP = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})"
    r"(?:\.([0-9]{1,9}))?(?:Z|([+-])([0-9]{2}):([0-9]{2}))"
)
_DURATION = re.compile(r"(-?)([0-9]{1,12})(?:\.([0-9]{1,9}))?s")
_MASK_PATH = re.compile(r"\*|[a-z][A-Za-z0-9]*(?:\.[a-z][A-Za-z0-9]*)*")
_CAPITAL = re.compile(r"[A-Z]")
_PROTO_PATH = re.compile(
    r"\*|[a-z][a-z0-9]*(?:_[a-z][a-z0-9]*)*(?:\.[a-z][a-z0-9]*(?:_[a-z][a-z0-9]*)*)*"
)
_UNDERSCORE = re.compile(r"_([a-z])")


def timestamp_into(message: AnyMessage, value: JsonValue) -> None:
    """RFC 3339 with capital T and Z, or an offset; at most nine digits of a second."""
    found = _TIMESTAMP.fullmatch(value) if type(value) is str else None
    if found is None:
        raise Wrong('must be a time like "2026-01-31T12:30:00Z"')
    *parts, fraction, sign, hours, minutes = found.groups()
    zone = UTC
    try:
        if sign:
            offset = timedelta(hours=int(hours), minutes=_sixty(minutes))
            zone = timezone(offset if sign == "+" else -offset)
        moment = datetime(*map(int, parts), tzinfo=zone)  # type: ignore[misc,arg-type] # six ints
        seconds = (moment - EPOCH) // timedelta(seconds=1)
    except (ValueError, OverflowError):
        raise Wrong("is no time of the calendar") from None
    if not TIMESTAMP_S_MIN <= seconds <= TIMESTAMP_S_MAX:
        raise Wrong("must be within the years 0001 to 9999")
    message.seconds = seconds
    message.nanos = int(fraction.ljust(9, "0")) if fraction else 0
    message.SetInParent()


def _sixty(minutes: str) -> int:
    if int(minutes) > 59:
        raise ValueError(minutes)
    return int(minutes)


def timestamp_json(message: AnyMessage) -> str:
    """RFC 3339 in UTC, with 0, 3, 6 or 9 digits of a second."""
    seconds, nanos = message.seconds, message.nanos
    if not TIMESTAMP_S_MIN <= seconds <= TIMESTAMP_S_MAX or not 0 <= nanos < 10**9:
        raise ValueError("a Timestamp is out of range")
    moment = EPOCH + timedelta(seconds=seconds)
    return f"{moment.isoformat()[:19]}{_fraction(nanos)}Z"


def duration_into(message: AnyMessage, value: JsonValue) -> None:
    """Seconds with an "s": "3.5s", "-1s"."""
    found = _DURATION.fullmatch(value) if type(value) is str else None
    if found is None:
        raise Wrong('must be a duration like "3.5s"')
    sign, digits, fraction = found.groups()
    seconds, nanos = int(digits), int(fraction.ljust(9, "0")) if fraction else 0
    if seconds > DURATION_S_MAX or (seconds == DURATION_S_MAX and nanos):
        raise Wrong(f"must be from -{DURATION_S_MAX}s to {DURATION_S_MAX}s")
    factor = -1 if sign else 1
    message.seconds, message.nanos = factor * seconds, factor * nanos
    message.SetInParent()


def duration_json(message: AnyMessage) -> str:
    """Seconds with 0, 3, 6 or 9 digits after the point."""
    seconds, nanos = message.seconds, message.nanos
    if abs(seconds) > DURATION_S_MAX or abs(nanos) >= 10**9 or seconds * nanos < 0:
        raise ValueError("a Duration is out of range")
    sign = "-" if seconds < 0 or nanos < 0 else ""
    return f"{sign}{abs(seconds)}{_fraction(abs(nanos))}s"


def _fraction(nanos: int) -> str:
    if nanos == 0:
        return ""
    if nanos % 1_000_000 == 0:
        return f".{nanos // 1_000_000:03d}"
    if nanos % 1_000 == 0:
        return f".{nanos // 1_000:06d}"
    return f".{nanos:09d}"


def field_mask_into(message: AnyMessage, value: JsonValue) -> None:
    """Paths in JSON names, joined by commas: "displayName,address.city"."""
    if type(value) is not str:
        raise Wrong('must be paths in one string, like "displayName,address.city"')
    for path in value.split(",") if value else ():
        if not _MASK_PATH.fullmatch(path):
            raise Wrong(f"{path[:64]!r} is no path of field names in lowerCamelCase")
        message.paths.append(mask_path_of_json(path))
    message.SetInParent()


def field_mask_json(message: AnyMessage) -> str:
    """The paths in lowerCamelCase, joined by commas."""
    for path in message.paths:
        if not _PROTO_PATH.fullmatch(path):
            raise ValueError("a FieldMask holds a path that JSON cannot write")
    return ",".join(map(mask_path_json, message.paths))


def mask_path_json(path: str) -> str:
    """A path of a mask in lowerCamelCase."""
    return _UNDERSCORE.sub(lambda found: found.group(1).upper(), path)


def mask_path_of_json(path: str) -> str:
    """A path in lowerCamelCase as masks hold it; the way back is not unique."""
    return _CAPITAL.sub(lambda found: "_" + found.group().lower(), path)


def value_into(message: AnyMessage, value: JsonValue) -> None:
    """Any JSON value."""
    kind = type(value)
    if value is None:
        message.null_value = 0
    elif kind is bool:
        message.bool_value = value
    elif kind is str:
        message.string_value = decode_string(value)
    elif kind is int or kind is float or kind is ExactFloat:
        message.number_value = float(value)
    elif kind is dict:
        struct_into(message.struct_value, value)
    else:
        list_into(message.list_value, value)


def struct_into(message: AnyMessage, value: JsonValue) -> None:
    """A JSON object."""
    if type(value) is not dict:
        raise Wrong("must be an object")
    message.SetInParent()
    fields = message.fields
    for key, item in value.items():
        try:
            value_into(fields[decode_string(key)], item)
        except Wrong as wrong:
            raise wrong.within(key) from None


def list_into(message: AnyMessage, value: JsonValue) -> None:
    """A JSON array."""
    if type(value) is not list:
        raise Wrong("must be an array")
    message.SetInParent()
    for index, item in enumerate(value):
        try:
            value_into(message.values.add(), item)
        except Wrong as wrong:
            raise wrong.within(index) from None


def value_json(message: AnyMessage) -> JsonValue:
    """The JSON value that a Value holds."""
    kind = message.WhichOneof("kind")
    if kind == "struct_value":
        return struct_json(message.struct_value)
    if kind == "list_value":
        return list_json(message.list_value)
    if kind == "null_value":
        return None
    if kind is None:
        raise ValueError("a Value holds nothing")
    value = getattr(message, kind)
    if kind == "number_value":
        if not math.isfinite(value):
            raise ValueError("a Value holds a number that JSON cannot write")
        # protobuf prints whole numbers without a point; a Struct's 1 stays 1.
        return int(value) if value.is_integer() and abs(value) < 2**53 and value else value
    return value


def struct_json(message: AnyMessage) -> dict[str, Any]:
    """The object that a Struct holds, keys sorted."""
    fields = message.fields
    return {key: value_json(fields[key]) for key in sorted(fields)}


def list_json(message: AnyMessage) -> list[Any]:
    """The array that a ListValue holds."""
    return [value_json(value) for value in message.values]


def wrapper_codec(descriptor: Descriptor) -> tuple[Into, ToJson]:
    """How a wrapper (Int64Value and its like) reads and writes its bare value."""
    field = descriptor.fields_by_name["value"]
    decode, encode = scalar_decoder(field), scalar_encoder(field)

    def into(message: AnyMessage, value: JsonValue) -> None:
        message.value = decode(value)
        message.SetInParent()

    def to_json(message: AnyMessage) -> JsonValue:
        return message.value if encode is None else encode(message.value)

    return into, to_json


WRAPPERS = frozenset(
    f"google.protobuf.{name}Value"
    for name in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
)
FIELD_MASK, ANY, EMPTY = (f"google.protobuf.{name}" for name in ("FieldMask", "Any", "Empty"))
CODECS: dict[str, tuple[Into, ToJson]] = {
    "google.protobuf.Timestamp": (timestamp_into, timestamp_json),
    "google.protobuf.Duration": (duration_into, duration_json),
    "google.protobuf.FieldMask": (field_mask_into, field_mask_json),
    "google.protobuf.Value": (value_into, value_json),
    "google.protobuf.Struct": (struct_into, struct_json),
    "google.protobuf.ListValue": (list_into, list_json),
}


def is_well_known(message: Descriptor) -> bool:
    """Whether JSON writes the message in a way of its own, or it stands for a whole value."""
    name = message.full_name
    return name in CODECS or name in WRAPPERS or name in {ANY, EMPTY}
