"""JSON schemas of messages, as the codec reads and writes them.

Written in the part of JSON Schema that OpenAPI 3.0 and 3.1 share, so that viewers of
either version can show the document. Rules of buf.validate become keywords where JSON
Schema has one.
"""

import re
from collections.abc import Sequence
from typing import Any

from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from tenfold.options.v1 import policy_pb2

from edge import well_known
from edge.contracts import Contracts
from edge.fields import is_map, is_null_value, map_fields, message_type

Schema = dict[str, Any]

_COMPONENTS = "#/components/schemas/"
_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
    "google.protobuf.FieldMask": {
        "type": "string",
        "description": "Field paths in JSON names, joined by commas.",
    },
    "google.protobuf.Struct": {"type": "object", "additionalProperties": True},
    "google.protobuf.ListValue": {"type": "array", "items": {}},
    "google.protobuf.Value": {},
    "google.protobuf.Empty": {"type": "object"},
    "google.protobuf.Any": {
        "type": "object",
        "properties": {"@type": {"type": "string"}},
        "additionalProperties": True,
    },
}
_INTEGER_32: Schema = {"type": "integer", "format": "int32"}
_UNSIGNED_32: Schema = {"type": "integer", "format": "int64", "minimum": 0, "maximum": 2**32 - 1}
# What JSON has no number for is a string.
_NO_NUMBERS: Schema = {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}
_FLOAT: Schema = {"anyOf": [{"type": "number", "format": "float"}, _NO_NUMBERS]}
_DOUBLE: Schema = {"anyOf": [{"type": "number", "format": "double"}, _NO_NUMBERS]}
# proto JSON writes 64-bit integers as strings; bare numbers are read as well.
_INTEGER_64: Schema = {
    "type": "string",
    "format": "int64",
    "pattern": "^(0|-?[1-9][0-9]{0,18})$",
}
_UNSIGNED_64: Schema = {"type": "string", "format": "uint64", "pattern": "^(0|[1-9][0-9]{0,19})$"}
# Written so, for OpenAPI 3.0 has no type null.
NULL: Schema = {"enum": [None]}

_SCALARS: dict[int, Schema] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "byte"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_FLOAT: _FLOAT,
    FieldDescriptor.TYPE_DOUBLE: _DOUBLE,
    FieldDescriptor.TYPE_INT32: _INTEGER_32,
    FieldDescriptor.TYPE_SINT32: _INTEGER_32,
    FieldDescriptor.TYPE_SFIXED32: _INTEGER_32,
    FieldDescriptor.TYPE_UINT32: _UNSIGNED_32,
    FieldDescriptor.TYPE_FIXED32: _UNSIGNED_32,
    FieldDescriptor.TYPE_INT64: _INTEGER_64,
    FieldDescriptor.TYPE_SINT64: _INTEGER_64,
    FieldDescriptor.TYPE_SFIXED64: _INTEGER_64,
    FieldDescriptor.TYPE_UINT64: _UNSIGNED_64,
    FieldDescriptor.TYPE_FIXED64: _UNSIGNED_64,
}


class Schemas:
    """Collects the schemas that a document refers to.

    Args:
        contracts: for comments.
        proto_names: whether fields are named as the contracts do.

    Attributes:
        components: by name; complete once every reference has been asked for.
    """

    def __init__(self, contracts: Contracts, *, proto_names: bool = False) -> None:
        self._contracts = contracts
        self._proto_names = proto_names
        self.components: dict[str, Schema] = {}

    def of_message(self, message: Descriptor) -> Schema:
        """A reference to a message's schema; the schema itself for well-known types."""
        if message.full_name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[message.full_name])
        if message.full_name in well_known.WRAPPERS:
            return self._of_single(message.fields_by_name["value"])
        if message.full_name not in self.components:
            self.components[message.full_name] = {}  # a recursive message finds itself
            self.components[message.full_name] = self.of_object(message, message.fields)
        return {"$ref": _COMPONENTS + message.full_name}

    def of_object(self, message: Descriptor, fields: Sequence[FieldDescriptor]) -> Schema:
        """The schema of a message with these of its fields only."""
        schema: Schema = {"type": "object"}
        comment = self._contracts.comment(message.full_name)
        if comment:
            schema["description"] = comment
        schema["properties"] = {self.name_of(field): self.of_field(field) for field in fields}
        required = [self.name_of(field) for field in fields if is_required(field)]
        if required:
            schema["required"] = required
        return schema

    def name_of(self, field: FieldDescriptor) -> str:
        """What answers call a field; requests may use its JSON name and its proto name."""
        return field.name if self._proto_names else field.json_name

    def of_field(self, field: FieldDescriptor) -> Schema:
        """The schema of a field, with its comment and rules."""
        schema = self._of_type(field)
        comment = self._contracts.comment(field.full_name)
        if "$ref" in schema:
            # OpenAPI 3.0 ignores what stands beside a reference.
            return {"allOf": [schema], "description": comment} if comment else schema
        if comment:
            schema["description"] = comment
        schema |= _rules(field)
        if field.GetOptions().Extensions[policy_pb2.field].sensitive:
            schema["format"] = "password"
        return schema

    def _of_type(self, field: FieldDescriptor) -> Schema:
        if is_map(field):
            return {"type": "object", "additionalProperties": self._of_single(map_fields(field)[1])}
        if field.is_repeated:
            return {"type": "array", "items": self._of_single(field)}
        return self._of_single(field)

    def _of_single(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None:
            return self.of_message(message_type(field))
        if is_null_value(field):
            return dict(NULL)
        if field.enum_type is not None:
            return self._of_enum(field.enum_type)
        return dict(_SCALARS[field.type])

    def _of_enum(self, enum: EnumDescriptor) -> Schema:
        if enum.full_name not in self.components:
            lines = [self._contracts.comment(enum.full_name)]
            for value in enum.values:
                comment = self._contracts.comment(f"{enum.full_name}.{value.name}")
                lines.append(f"- `{value.name}`: {comment}" if comment else "")
            schema: Schema = {"type": "string", "enum": [value.name for value in enum.values]}
            description = "\n".join(line for line in lines if line)
            self.components[enum.full_name] = schema | (
                {"description": description} if description else {}
            )
        return {"$ref": _COMPONENTS + enum.full_name}


def is_required(field: FieldDescriptor) -> bool:
    """Whether a request without this field is refused by the contract's rules."""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    if rules.required or field.is_required:
        return True
    if field.has_presence or rules.ignore != validate_pb2.IGNORE_UNSPECIFIED:
        return False
    if field.is_repeated:
        return bool(rules.repeated.min_items)
    # Without presence, a field that is left out is "" or 0: refused where that is.
    if rules.string.min_len or rules.string.min_bytes or 0 in rules.enum.not_in:
        return True
    return not _matches(rules.string.pattern, "")


def _matches(pattern: str, text: str) -> bool:
    """Whether a pattern of RE2 finds something in a text; True where Python cannot say."""
    try:
        return re.search(pattern, text) is not None
    except re.error:
        return True


def _rules(field: FieldDescriptor) -> Schema:
    """The keywords of the field's buf.validate rules."""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    if field.is_repeated:
        return _limits(rules.repeated, min_items="minItems", max_items="maxItems")
    if field.type == FieldDescriptor.TYPE_STRING:
        return _limits(rules.string, min_len="minLength", max_len="maxLength", pattern="pattern")
    if field.type == FieldDescriptor.TYPE_INT32:
        return _limits(rules.int32, gte="minimum", lte="maximum")
    if field.type == FieldDescriptor.TYPE_UINT32:
        return _limits(rules.uint32, gte="minimum", lte="maximum")
    return {}


def _limits(rules: Any, **keywords: str) -> Schema:  # noqa: ANN401 - one of many rule messages
    return {
        keyword: getattr(rules, name) for name, keyword in keywords.items() if rules.HasField(name)
    }
