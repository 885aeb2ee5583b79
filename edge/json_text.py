"""JSON text -> values, strictly: what orjson checks, and what it leaves.

orjson refuses broken UTF-8, lone surrogates, NaN, comments, trailing commas and
anything after the document (RFC 8259). Added here, at the price of a few byte counts
for the usual document: a depth cap, duplicate keys, "-0" with its sign, and, when asked,
numbers with the text they were written in.
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
# orjson reads a bare -0 as the integer 0, which has no sign.
_NEGATIVE_ZERO = re.compile(rb"-0(?![0-9.eE])")


class Wrong(Exception):
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


_IDENT = re.compile(r"[A-Za-z_@][A-Za-z0-9_]{0,63}")


def json_path(parts: list[str | int]) -> str:
    """Join keys and indexes: ["entries", 0, "amount"] is "entries[0].amount"."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _IDENT.fullmatch(part):
            text += f".{part}" if text else part
        else:
            # Told back, but not at any length.
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


class InexactNumberError(Exception):
    """A float came to an integer field: parse the document again, with exact=True."""


def parse_json(text: bytes, *, exact: bool = False, depth_max: int = DEPTH_MAX) -> JsonValue:
    """Parse one JSON document.

    Args:
        text: the whole document, UTF-8.
        exact: whether floats remember their text (ExactFloat); slower.
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
        raise Wrong(f"is not valid JSON: {error.msg} at character {error.pos}") from None
    key_count, depth = _shape(value)
    if depth > depth_max:
        raise Wrong(f"is nested deeper than {depth_max} levels")
    if exact or not says_no_more(text, key_count):
        return _parse_slowly(text)
    return value


def says_no_more(text: bytes, key_count: int) -> bool:
    """Whether a document is all that its text says: no key twice, and no zero with a sign.

    Args:
        text: that orjson has parsed.
        key_count: keys in the parsed document.
    """
    return _has_each_key_once(text, key_count) and not _has_negative_zero(text)


def _has_negative_zero(text: bytes) -> bool:
    if b"-0" not in text or not _NEGATIVE_ZERO.search(text):
        return False
    return _NEGATIVE_ZERO.search(_without_strings(text)) is not None


def _has_each_key_once(text: bytes, key_count: int) -> bool:
    """Whether the text has as many keys as the parsed document, where equal keys are one.

    Every key has one colon outside strings. Three counts, each dearer than the one before
    and each never below the number of keys, so that one that is equal settles it.
    """
    if text.count(b":") == key_count:
        return True
    # Without escapes, and without space before a colon, a key is what ends in '":'.
    is_plain = text.count(b'":') == key_count and b"\\" not in text
    if is_plain and not _has_space_before_colon(text):
        return True
    return _without_strings(text).count(b":") == key_count


def _has_space_before_colon(text: bytes) -> bool:
    # Four plain searches are several times faster than one pattern.
    return b" :" in text or b"\n:" in text or b"\t:" in text or b"\r:" in text


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
        return ExactFloat.of_text(text)
    return int(text) if len(text) <= 20 else ExactFloat.of_text(text)


def _dict_of_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Wrong("is given twice", key)
        found[key] = value
    return found
