"""Canonical proto3 JSON <-> messages, compiled once per message type.

Compiling walks a message's descriptor and leaves small functions behind: one setter
per JSON name, and one pass that reads all plain fields at once. Nothing is looked up
in descriptors while a request is served.

Stricter than google.protobuf.json_format, which misses 12 cases of the conformance
suite: booleans are never numbers or enums, one field under two spellings is refused,
times follow RFC 3339 to the letter. Duplicate keys and NUL in strings are refused, and so
are unknown fields unless the contract has them ignored. Extensions that the contracts know
are read and written under "[their.full.name]".
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import orjson
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.message_factory import GetMessageClass

from edge import straight_line, well_known
from edge.compiled import compiled
from edge.contracts import ContractError
from edge.fields import (
    AnyMessage,
    JsonValue,
    fields_by_any_name,
    is_map,
    is_null_value,
    map_fields,
    may_not_parse,
)
from edge.ignored import Ignored
from edge.json_text import InexactNumberError, Wrong, parse_json, says_no_more
from edge.scalars import (
    decode_string,
    map_key_decoder,
    scalar_decoder,
    scalar_encoder,
)
from edge.well_known import Into, ToJson

# An Any inside an Any inside ...: each level is a message of its own, beyond protobuf's limit.
ANY_LEVELS_MAX = 8

_ANY = "google.protobuf.Any"
_VALUE = "google.protobuf.Value"

Setter = Callable[[Any, Any], None]


@dataclass(frozen=True)
class CodecOptions:
    """How answers are written, and what is taken in requests.

    Attributes:
        emit_defaults: whether fields without presence are written when they hold their default
            ("" , 0, [] ...). REST callers expect a field to be there, so this is the default;
            canonical proto JSON leaves them out. Unset messages, optional fields and members
            of a oneof are left out either way.
        proto_names: whether answers carry proto names ("display_name") in place of JSON names
            ("displayName"); requests may use both either way.
        pretty: whether unary answers are indented; a stream's messages stay on one line each.
        ignore_unknown: whether unknown fields and enum names in requests are ignored.
    """

    emit_defaults: bool = True
    proto_names: bool = False
    pretty: bool = False
    ignore_unknown: bool = False


class MessageCodec:
    """Reads and writes one message type.

    Attributes:
        into: fills a message from a JSON value; raises Wrong.
        to_json: makes the JSON value of a message; raises ValueError for what JSON cannot write.
        may_not_parse: whether a filled message must still be proved by `require_parsable`.
    """

    into: Into
    to_json: ToJson

    def __init__(self, descriptor: Descriptor, fillers: straight_line.Fillers) -> None:
        self.descriptor = descriptor
        self._fillers = fillers
        self.message_class: type[Message] = GetMessageClass(descriptor)
        self.may_not_parse = may_not_parse(descriptor)

    @cached_property
    def reader(self) -> "JsonReader":
        """Reads documents; ask for it at start, so that no request pays for compiling."""
        return JsonReader(self.into, self._fillers.of(self.descriptor))

    def message_of_json(self, text: bytes) -> Message:
        """Read one JSON document.

        Raises:
            Wrong: text is no JSON, or does not fit the message; its path names the field.
        """
        message = self.message_class()
        self.reader.read(message, text)
        if self.may_not_parse:
            require_parsable(message)
        return message

    def json_of_message(self, message: Message) -> bytes:
        """Write a message as one JSON document without line breaks.

        Raises:
            ValueError: the message holds what JSON cannot write, such as a time out of range.
        """
        return write_json(self.to_json(message))


class Codecs:
    """The codecs of one pool's messages; each is compiled when first asked for, by any thread.

    Args:
        pool: where the types inside an Any are found.
        options: how answers are written, and what is taken in requests.

    Attributes:
        ignored: what was ignored, if the options allow it.
    """

    def __init__(self, pool: DescriptorPool, options: CodecOptions | None = None) -> None:
        self._pool = pool
        self._options = options or CodecOptions()
        self.ignored = Ignored()
        self._codecs: dict[tuple[str, int], MessageCodec] = {}
        # Of whoever compiles now: known before they are complete, so that a recursive type finds
        # itself, and to nobody else.
        self._incomplete: dict[tuple[str, int], MessageCodec] = {}
        self._compiling = threading.RLock()
        self._fillers = straight_line.Fillers(self.of, self._compiling)

    def of(self, descriptor: Descriptor, *, any_level: int = 0) -> MessageCodec:
        """The codec of a message type.

        Args:
            descriptor: of a message in the pool.
            any_level: how many Anys stand around it.
        """
        key = (descriptor.full_name, any_level)
        codec = self._codecs.get(key)
        if codec is not None:
            return codec
        with self._compiling:
            codec = self._codecs.get(key) or self._incomplete.get(key)
            return codec or self._complete(key, descriptor, any_level)

    def _complete(
        self, key: tuple[str, int], descriptor: Descriptor, any_level: int
    ) -> MessageCodec:
        is_outermost = not self._incomplete
        codec = self._incomplete[key] = MessageCodec(descriptor, self._fillers)
        try:
            codec.into, codec.to_json = self._compile(descriptor, any_level)
            if is_outermost:
                self._codecs |= self._incomplete
        finally:
            if is_outermost:
                self._incomplete.clear()
        return codec

    def value_of(self, field: FieldDescriptor) -> tuple["JsonReader", ToJson]:
        """What fills one field from a document, and makes its JSON value from the message.

        For body and response_body, whose document is a field and not a message. A field that
        is not set is null, where its descriptor can tell.
        """
        encode = self._value_encoder(field, 0)
        name, has_presence = field.name, field.has_presence

        def read(message: AnyMessage) -> JsonValue:
            if has_presence and not message.HasField(name):
                return None
            value = getattr(message, name)
            return value if encode is None else encode(value)

        return JsonReader(self._setter(field, 0), self._fillers.of_field(field)), read

    def _compile(self, descriptor: Descriptor, any_level: int) -> tuple[Into, ToJson]:
        name = descriptor.full_name
        if name in well_known.CODECS:
            return well_known.CODECS[name]
        if name in well_known.WRAPPERS:
            return well_known.wrapper_codec(descriptor)
        if name == _ANY:
            return self._any_codec(any_level)
        into = self._object_decoder(descriptor, any_level)
        return into, self._object_encoder(descriptor, any_level)

    # --- JSON -> message

    def _object_decoder(self, descriptor: Descriptor, any_level: int) -> Into:
        _refuse_shared_json_names(descriptor)
        # By each spelling; the second one knows the first, under which errors are told.
        setters: dict[str, tuple[Setter, str | None]] = {}
        for field in descriptor.fields:
            setters[field.json_name] = self._setter(field, any_level), None
        for name, field in fields_by_any_name(descriptor).items():
            if name not in setters:
                setters[name] = setters[field.json_name][0], field.json_name
        for extension in self._extensions_of(descriptor):
            setters[_extension_key(extension)] = self._extension_setter(extension, any_level), None
        ignored = self.ignored if self._options.ignore_unknown else None

        def into(message: AnyMessage, value: JsonValue) -> None:
            if type(value) is not dict:
                raise Wrong("must be an object")
            for key, item in value.items():
                entry = setters.get(key)
                if entry is None:
                    if ignored is None:
                        raise Wrong("is no field of this message", key)
                    ignored.note(descriptor.full_name, key)
                    continue
                setter, first_name = entry
                if first_name is not None and first_name in value:
                    raise Wrong(f"is given twice, as {key} too", first_name)
                try:
                    setter(message, item)
                except Wrong as wrong:
                    raise wrong.within(first_name or key) from None

        return into

    def _extensions_of(self, descriptor: Descriptor) -> list[FieldDescriptor]:
        return self._pool.FindAllExtensions(descriptor) if descriptor.is_extendable else []

    def _extension_setter(self, extension: FieldDescriptor, any_level: int) -> Setter:
        setter = self._setter(extension, any_level)
        return lambda message, value: setter(_ExtensionAsField(message, extension), value)

    def _setter(self, field: FieldDescriptor, any_level: int) -> Setter:
        setter = self._strict_setter(field, any_level)
        enum = (map_fields(field)[1] if is_map(field) else field).enum_type
        if enum is None or not self._options.ignore_unknown:
            return setter
        return self._without_unknown_names(field, enum, setter)

    def _without_unknown_names(
        self, field: FieldDescriptor, enum: EnumDescriptor, setter: Setter
    ) -> Setter:
        """Take unknown names of an enum away before the setter sees them.

        The JSON mapping says so for parsers that ignore unknown fields: alone such a name
        leaves its field unset, in an array or a map it is left out.
        """
        names, ignored = set(enum.values_by_name), self.ignored

        def is_known(value: JsonValue) -> bool:
            if type(value) is not str or value in names or not value.isidentifier():
                return True  # of another kind: the setter judges it
            ignored.note(enum.full_name, value)
            return False

        def set_known(message: AnyMessage, value: JsonValue) -> None:
            if is_map(field) and type(value) is dict:
                setter(message, {key: item for key, item in value.items() if is_known(item)})
            elif field.is_repeated and type(value) is list:
                setter(message, [item for item in value if is_known(item)])
            elif is_known(value):
                setter(message, value)

        return set_known

    def _strict_setter(self, field: FieldDescriptor, any_level: int) -> Setter:
        if is_map(field):
            return self._map_setter(field, any_level)
        if field.is_repeated:
            return self._repeated_setter(field, any_level)
        setter = self._single_setter(field, any_level)
        oneof = field.containing_oneof
        # The compiler makes a oneof around each proto3 optional field; it restricts nothing.
        if oneof is not None and len(oneof.fields) > 1:
            return _only_member(oneof.name, setter, takes_null=_takes_null(field))
        return setter

    def _single_setter(self, field: FieldDescriptor, any_level: int) -> Setter:
        name, takes_null = field.name, _takes_null(field)
        if field.message_type is None:
            decode = scalar_decoder(field)
            if field.type == FieldDescriptor.TYPE_STRING:
                return _string_setter(name)

            def set_scalar(message: AnyMessage, value: JsonValue) -> None:
                if value is not None or takes_null:
                    setattr(message, name, decode(value))

            return set_scalar
        codec = self.of(field.message_type, any_level=any_level)

        def set_message(message: AnyMessage, value: JsonValue) -> None:
            if value is not None or takes_null:
                inner = getattr(message, name)
                inner.SetInParent()
                codec.into(inner, value)

        return set_message

    def _repeated_setter(self, field: FieldDescriptor, any_level: int) -> Setter:
        name = field.name
        if field.message_type is None:
            return _repeated_scalar_setter(name, scalar_decoder(field))
        codec = self.of(field.message_type, any_level=any_level)

        def set_messages(message: AnyMessage, value: JsonValue) -> None:
            if value is None:
                return
            if type(value) is not list:
                raise Wrong("must be an array")
            target = getattr(message, name)
            for index, item in enumerate(value):
                try:
                    codec.into(target.add(), item)
                except Wrong as wrong:
                    raise wrong.within(index) from None

        return set_messages

    def _map_setter(self, field: FieldDescriptor, any_level: int) -> Setter:
        name = field.name
        key_field, value_field = map_fields(field)
        decode_key = map_key_decoder(key_field)
        codec = decode = None
        if value_field.message_type is not None:
            codec = self.of(value_field.message_type, any_level=any_level)
        else:
            decode = scalar_decoder(value_field)

        def set_map(message: AnyMessage, value: JsonValue) -> None:
            if value is None:
                return
            if type(value) is not dict:
                raise Wrong("must be an object")
            target = getattr(message, name)
            for key, item in value.items():
                try:
                    map_key = decode_key(key)
                    if map_key in target:  # "0" and "-0"
                        raise Wrong("is given twice")
                    if decode is not None:
                        target[map_key] = decode(item)
                    elif codec is not None:
                        codec.into(target[map_key], item)
                except Wrong as wrong:
                    raise wrong.within(key) from None

        return set_map

    # --- message -> JSON

    def _name_of(self, field: FieldDescriptor) -> str:
        return field.name if self._options.proto_names else field.json_name

    def _object_encoder(self, descriptor: Descriptor, any_level: int) -> ToJson:
        if not self._options.emit_defaults:
            return self._sparse_encoder(descriptor, any_level)
        to_json = straight_line.encoder(descriptor, self._name_of, self._codecs_at(any_level))
        return self._with_extensions(descriptor, any_level, to_json)

    def _with_extensions(self, descriptor: Descriptor, any_level: int, to_json: ToJson) -> ToJson:
        """Write extensions too, which have no default to be written."""
        extensions = self._encoders(self._extensions_of(descriptor), any_level)
        if not extensions:
            return to_json

        def extended_to_json(message: AnyMessage) -> dict[str, Any]:
            out: dict[str, Any] = to_json(message)
            for field, value in message.ListFields():
                if field.is_extension:
                    key, encode = extensions[field.number]
                    out[key] = value if encode is None else encode(value)
            return out

        return extended_to_json

    def _sparse_encoder(self, descriptor: Descriptor, any_level: int) -> ToJson:
        fields = [*descriptor.fields, *self._extensions_of(descriptor)]
        by_number = self._encoders(fields, any_level)

        def to_json(message: AnyMessage) -> dict[str, Any]:
            out = {}
            for field, value in message.ListFields():
                key, encode = by_number[field.number]
                out[key] = value if encode is None else encode(value)
            return out

        return to_json

    def _encoders(
        self, fields: Sequence[FieldDescriptor], any_level: int
    ) -> dict[int, tuple[str, ToJson | None]]:
        """By field number, under which name and how a field or an extension is written."""
        return {
            field.number: (
                _extension_key(field) if field.is_extension else self._name_of(field),
                self._value_encoder(field, any_level),
            )
            for field in fields
        }

    def _value_encoder(self, field: FieldDescriptor, any_level: int) -> ToJson | None:
        """How the whole value of a field is written; None if orjson takes it as it is."""
        if is_map(field):
            return straight_line.map_encoder(field, self._codecs_at(any_level))
        single = self._single_encoder(field, any_level)
        if not field.is_repeated:
            return single
        if single is None:
            return list
        return lambda values: [single(value) for value in values]

    def _single_encoder(self, field: FieldDescriptor, any_level: int) -> ToJson | None:
        if field.message_type is None:
            return scalar_encoder(field)
        codec = self.of(field.message_type, any_level=any_level)
        if field.message_type.full_name in well_known.CODECS:
            return codec.to_json
        # The codec may still be compiling (a recursive type): look its function up when called.
        return lambda message: codec.to_json(message)  # noqa: PLW0108

    def _codecs_at(self, any_level: int) -> straight_line.CodecOf:
        return partial(self.of, any_level=any_level)

    # --- Any

    def _any_codec(self, any_level: int) -> tuple[Into, ToJson]:
        def inner_codec(type_url: str) -> MessageCodec | None:
            try:
                descriptor = self._pool.FindMessageTypeByName(type_url.rpartition("/")[2])
            except KeyError:
                return None
            return self.of(descriptor, any_level=any_level + 1)

        def into(message: AnyMessage, value: JsonValue) -> None:
            if type(value) is not dict:
                raise Wrong("must be an object")
            if not value:
                return
            if any_level >= ANY_LEVELS_MAX:
                raise Wrong(f"has more than {ANY_LEVELS_MAX} Anys inside each other")
            type_url = value.get("@type")
            codec = inner_codec(type_url) if type(type_url) is str and "/" in type_url else None
            if codec is None:
                raise Wrong("must be the URL of a type of these contracts", "@type")
            inner = codec.message_class()
            codec.into(inner, _any_content(codec, value))
            if codec.may_not_parse:
                require_parsable(inner)
            message.type_url = type_url
            message.value = inner.SerializePartialToString(deterministic=True)

        def to_json(message: AnyMessage) -> dict[str, Any]:
            if not message.type_url:
                return {}
            codec = inner_codec(message.type_url) if any_level < ANY_LEVELS_MAX else None
            if codec is None:
                raise ValueError("an Any holds a type that these contracts do not have")
            inner = codec.message_class()
            try:
                inner.ParseFromString(message.value)
            except DecodeError as error:
                raise ValueError("an Any holds bytes that do not parse") from error
            content = codec.to_json(inner)
            head = {"@type": message.type_url}
            return head | ({"value": content} if _has_own_json(codec.descriptor) else content)

        return into, to_json


class JsonReader(NamedTuple):
    """Fills empty messages from documents: straight, or else the long way.

    Attributes:
        into: takes any document, and says what is wrong with it.
        fill: takes the usual document; None if there is no such thing.
    """

    into: Into
    fill: straight_line.Fill | None

    def read(self, message: AnyMessage, text: bytes) -> JsonValue:
        """Fill an empty message from one JSON document.

        Returns:
            The document, for whoever wants to know what it names.

        Raises:
            Wrong: text is no JSON, or does not fit.
        """
        if self.fill is not None:
            try:
                document = orjson.loads(text)
                key_count = self.fill(message, document)
            except (orjson.JSONDecodeError, Wrong, InexactNumberError):
                key_count = straight_line.UNUSUAL
            if key_count != straight_line.UNUSUAL and says_no_more(text, key_count):
                return document
            message.Clear()
        document = parse_json(text)
        try:
            self.into(message, document)
        except InexactNumberError:
            message.Clear()
            document = parse_json(text, exact=True)
            self.into(message, document)
        return document


@compiled(16)
def codecs_of(pool: DescriptorPool, options: CodecOptions | None = None) -> Codecs:
    """The codecs of a pool, shared by its routes."""
    return Codecs(pool, options)


def write_json(value: JsonValue, *, pretty: bool = False) -> bytes:
    """Write what a ToJson made.

    Args:
        value: the document.
        pretty: whether it is indented; else it is one line.

    Raises:
        ValueError: the message holds what JSON cannot write.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2 if pretty else None)
    except TypeError as error:
        # Where a contract has text unchecked (proto2, utf8_validation = NONE), protobuf hands
        # over the bytes of what is none.
        raise ValueError("a string holds what is no UTF-8") from error


class _ExtensionAsField:
    """Reaches one extension of a message by attribute, whatever its name, as setters do."""

    __slots__ = ("_extension", "_message")

    def __init__(self, message: AnyMessage, extension: FieldDescriptor) -> None:
        object.__setattr__(self, "_message", message)
        object.__setattr__(self, "_extension", extension)

    def __getattr__(self, name: str) -> AnyMessage:
        return self._message.Extensions[self._extension]

    def __setattr__(self, name: str, value: object) -> None:
        self._message.Extensions[self._extension] = value


def _extension_key(extension: FieldDescriptor) -> str:
    return f"[{extension.full_name}]"


def _refuse_shared_json_names(descriptor: Descriptor) -> None:
    """Refuse what protoc lets pass in proto2: one of the two fields would be lost.

    Raises:
        ContractError: two fields have one JSON name.
    """
    taken: dict[str, FieldDescriptor] = {}
    for field in descriptor.fields:
        other = taken.setdefault(field.json_name, field)
        if other is not field:
            both = f"{other.full_name} and {field.full_name}"
            raise ContractError(f"{both} have one JSON name: give one of them another json_name")


def require_parsable(message: AnyMessage) -> None:
    """Refuse what the service could not read, before it is sent.

    Raises:
        Wrong: a required field is missing (told in proto names), or it is too deep.
    """
    missing = message.FindInitializationErrors()
    if missing:
        raise Wrong.of_field(missing[0], "is required")
    try:
        type(message).FromString(message.SerializeToString())
    except (EncodeError, DecodeError):
        raise Wrong("is nested deeper than messages may be") from None


def _any_content(codec: MessageCodec, value: dict[str, Any]) -> JsonValue:
    """The JSON of the message inside an Any: beside "@type", or under "value"."""
    rest = {key: item for key, item in value.items() if key != "@type"}
    if not _has_own_json(codec.descriptor):
        return rest
    if rest.keys() != {"value"}:
        raise Wrong('must hold "@type" and "value"')
    return rest["value"]


def _has_own_json(descriptor: Descriptor) -> bool:
    name = descriptor.full_name
    return name in well_known.CODECS or name in well_known.WRAPPERS or name == _ANY


def _takes_null(field: FieldDescriptor) -> bool:
    """Whether JSON null is a value of this field; elsewhere it means that the field is unset."""
    if field.message_type is not None:
        return field.message_type.full_name == _VALUE
    return is_null_value(field)


def _only_member(oneof: str, setter: Setter, *, takes_null: bool) -> Setter:
    """Refuse a second member of a oneof; the first would be lost without a word."""

    def set_member(message: AnyMessage, value: JsonValue) -> None:
        before = message.WhichOneof(oneof)
        if before is not None and (value is not None or takes_null):
            name = message.DESCRIPTOR.fields_by_name[before].json_name
            raise Wrong(f"excludes {name}: only one of {oneof} may be set")
        setter(message, value)

    return set_member


def _string_setter(name: str) -> Setter:
    def set_string(message: AnyMessage, value: JsonValue) -> None:
        # The usual field of the usual message: one call less.
        if type(value) is str and "\0" not in value:
            setattr(message, name, value)
        elif value is not None:
            decode_string(value)

    return set_string


def _repeated_scalar_setter(name: str, decode: Callable[[Any], Any]) -> Setter:
    def set_scalars(message: AnyMessage, value: JsonValue) -> None:
        if value is None:
            return
        if type(value) is not list:
            raise Wrong("must be an array")
        target = getattr(message, name)
        for index, item in enumerate(value):
            try:
                target.append(decode(item))
            except Wrong as wrong:
                raise wrong.within(index) from None

    return set_scalars
