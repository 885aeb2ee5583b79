"""JSON text -> values, strictly: what orjson checks, and what it leaves.

orjson refuses broken UTF-8, lone surrogates, NaN, comments, trailing commas and
anything after the document (RFC 8259). Added here, at the price of a few byte counts
for the usual document: a depth cap, duplicate keys, "-0" with its sign,
and numbers with more digits than a double keeps.
"""

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

import orjson

from edge.fields import JsonValue

# protobuf's own parsers stop at 100 as well.
DEPTH_MAX = 100

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
# A number whose value a double may not hold exactly, or that orjson reads without its sign.
_DELICATE = re.compile(rb"-0(?![\d.eE])|\d[\d.]{15,}")
_LONG_DIGITS = re.compile(rb"[\d.]{16}")


class Wrong(Exception):  # noqa: N818 - it is about a value, not about our program
    """A value that does not fit; `path` is filled from the inside out as the error passes.

    Args:
        description: what is wrong with the value, and what would fit.
        path: keys and indexes from the document's root to the value.
    """

    def __init__(self, description: str, *path: str | int) -> None:
        super().__init__(description)
        self.description = description
        self.path: list[str | int] = list(path)
        self._field_text = ""

    @classmethod
    def of_field(cls, field: str, description: str) -> "Wrong":
        """About a field whose path is known as text, such as a query parameter."""
        wrong = cls(description)
        wrong._field_text = field
        return wrong

    def within(self, part: str | int) -> "Wrong":
        """The same error, one step further out."""
        self.path.insert(0, part)
        return self

    @property
    def field(self) -> str:
        """The path as text: 'entries[0].labels["a b"]'; "" for the document itself."""
        return self._field_text or json_path(self.path)


_IDENT = re.compile(r"[A-Za-z_@][A-Za-z0-9_]*")


def json_path(parts: list[str | int]) -> str:
    """Join keys and indexes: ["entries", 0, "amount"] is "entries[0].amount"."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _IDENT.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part[:64])}]"
    return text


class ExactFloat(float):
    """A float that remembers its text, for integer fields that must not be rounded."""

    text: str

    @classmethod
    def of_text(cls, text: str) -> "ExactFloat":
        """The nearest double, and the text."""
        number = cls(text)
        number.text = text
        return number

    def as_integer(self) -> int | None:
        """The integer that the text says, if it says one of at most 20 digits."""
        try:
            exact = Decimal(self.text)
        except InvalidOperation:  # an exponent beyond what Decimal holds
            return None
        if exact.adjusted() > 20 or exact != exact.to_integral_value():
            return None
        return int(exact)


def parse_json(text: bytes, *, depth_max: int = DEPTH_MAX) -> JsonValue:
    """Parse one JSON document.

    Args:
        text: the whole document, UTF-8.
        depth_max: how many objects and arrays may stand inside each other.

    Returns:
        dict, list, str, int, float, bool or None. Integers are exact from -2^63 to 2^64-1;
        beyond, they are floats.

    Raises:
        Wrong: text is no JSON, is too deep or holds a key twice.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        # orjson stops by itself at 1,024 levels, long before any stack ends.
        if "depth" in error.msg:
            raise Wrong(f"is nested deeper than {depth_max} levels") from None
        raise Wrong(f"is not valid JSON: {error.msg} at byte {error.pos}") from None
    key_count, depth = _shape(value)
    if depth > depth_max:
        raise Wrong(f"is nested deeper than {depth_max} levels")
    if (b"-0" in text or _LONG_DIGITS.search(text)) and _DELICATE.search(_without_strings(text)):
        return _parse_slowly(text)
    # Every key has one colon outside strings; colons inside strings only add.
    if text.count(b":") != key_count and _without_strings(text).count(b":") != key_count:
        return _parse_slowly(text)
    return value


def _without_strings(text: bytes) -> bytes:
    return _STRINGS.sub(b"", text)


def _shape(value: JsonValue) -> tuple[int, int]:
    """How many keys the document has, and how deep it is; level by level, without recursion."""
    key_count = depth = 0
    level = [value]
    while level:
        below: list[JsonValue] = []
        has_containers = False
        for item in level:
            kind = type(item)
            if kind is dict:
                key_count += len(item)
                below.extend(item.values())
                has_containers = True
            elif kind is list:
                below.extend(item)
                has_containers = True
        depth += has_containers
        level = below
    return key_count, depth


def _parse_slowly(text: bytes) -> JsonValue:
    """The same document by the standard library: it shows every key and every number's text."""
    return json.loads(
        text,
        object_pairs_hook=_dict_of_unique,
        parse_int=_number_of_text,
        parse_float=ExactFloat.of_text,
    )


def _number_of_text(text: str) -> int | float:
    if text == "-0":
        return -0.0
    return int(text) if len(text) <= 20 else ExactFloat.of_text(text)


def _dict_of_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Wrong("is given twice", key)
        found[key] = value
    return found
