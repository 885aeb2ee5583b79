"""The Connect protocol's words: content types, envelopes, errors, the end of a stream.

Facts are from the Connect Protocol Reference (connectrpc.com/docs/protocol), version 1.
`edge.connect_calls` makes the calls. Where the text leaves a choice:

- a request without Connect-Protocol-Version is taken, so that curl needs one header less;
- JSON is read as strictly as over REST: unknown fields and duplicate keys are refused;
- compression is gzip, asked for with or without quality values;
- a server stream that is sent no message, or two, is `unimplemented`, as gRPC says of a
  request with the wrong number of messages.
"""

import base64
import re
import struct
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from google.protobuf import json_format
from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from edge.binary import message_of_bytes
from edge.exchange import Exchange
from edge.fields import descriptor_of
from edge.gzipped import compress, decompress, is_worth_compressing
from edge.http1_text import HeaderList
from edge.json_text import Wrong
from edge.problem import INTERNAL_DETAIL, headers_of, json_field
from edge.query import parse_query
from edge.refusals import BodyTooLarge, HttpRefusal, RequestTimeout, UnsupportedMediaType
from edge.routes import Route
from edge.scalars import decode_bytes
from edge.transcode import complete, invalid_request, plan_of, response_json
from shared.errors import Internal, InvalidRequest, TenfoldError, Unimplemented, Violation
from shared.rpc.status import code_of, status_of

PROTOCOL_VERSION = "1"
GZIP = "gzip"

# An envelope: flags and the length of what follows, five bytes.
_HEAD = struct.Struct(">BI")
HEAD_BYTES = _HEAD.size
IS_COMPRESSED, IS_END = 0b01, 0b10

_CHARSET = re.compile(r'\s*charset\s*=\s*"?utf-?8"?\s*', re.IGNORECASE)

# The table "Error Codes", by gRPC's name of the code; the codes that this edge answers with.
_STATUS: Mapping[str, int] = {
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "UNAUTHENTICATED": 401,
    "OUT_OF_RANGE": 400,
    "UNKNOWN": 500,
    "DATA_LOSS": 500,
}
# What HTTP has a status for and gRPC another code than that of its class.
_CODES: Mapping[type[TenfoldError], str] = {
    BodyTooLarge: "RESOURCE_EXHAUSTED",
    RequestTimeout: "DEADLINE_EXCEEDED",
}


class Codec(Protocol):
    """How messages are written."""

    name: str

    def decode(self, route: Route, data: bytes) -> Message:
        """The request message of a route.

        Raises:
            InvalidRequest: data does not fit; violations name fields by JSON name.
        """
        ...

    def encode(self, route: Route, message: Message) -> bytes:
        """An answer of a route.

        Raises:
            Internal: the answer holds what cannot be written.
        """
        ...


class JsonCodec:
    """See Codec. The canonical JSON mapping, as REST has it."""

    name = "json"

    def decode(self, route: Route, data: bytes) -> Message:
        """See Codec.decode."""
        plan = plan_of(route)
        try:
            message = plan.request.message_class()
            plan.request.reader.read(message, data)
            complete(plan, message)
        except Wrong as wrong:
            raise invalid_request(wrong) from None
        return message

    def encode(self, route: Route, message: Message) -> bytes:
        """See Codec.encode."""
        return response_json(route, message)


class BinaryCodec:
    """See Codec. Protobuf's own format."""

    name = "proto"

    def decode(self, route: Route, data: bytes) -> Message:
        """See Codec.decode."""
        try:
            message = message_of_bytes(route.method.input, data)
            complete(plan_of(route), message)
        except Wrong as wrong:
            raise invalid_request(wrong) from None
        return message

    def encode(self, _: Route, message: Message) -> bytes:
        """See Codec.encode."""
        return message.SerializeToString()


CODECS: Mapping[str, Codec] = {"json": JsonCodec(), "proto": BinaryCodec()}
UNARY_TYPES = {f"application/{name}": codec for name, codec in CODECS.items()}
STREAM_TYPES = {f"application/connect+{name}": codec for name, codec in CODECS.items()}


def codec_of(content_type: str, known: Mapping[str, Codec]) -> Codec:
    """The codec that a content type names.

    Args:
        content_type: of the request.
        known: UNARY_TYPES or STREAM_TYPES, whichever the method takes.

    Raises:
        UnsupportedMediaType: it names none of these, or a charset that is not UTF-8.
    """
    media_type, _, parameters = content_type.partition(";")
    codec = known.get(media_type.strip().lower())
    if codec is None or (parameters and not _CHARSET.fullmatch(parameters)):
        accepted = ", ".join(known)
        raise UnsupportedMediaType(
            f"This method takes {' or '.join(known)}.", headers={"accept-post": accepted}
        )
    return codec


def require_version(version: str) -> None:
    """Refuse another version of the protocol; "" is none stated, and taken.

    Raises:
        HttpRefusal: it is not ours.
    """
    if version not in {"", PROTOCOL_VERSION}:
        raise HttpRefusal(f"connect-protocol-version must be {PROTOCOL_VERSION!r}.")


# Compression
def is_gzip(encoding: str) -> bool:
    """Whether a message's encoding is gzip; else it is none.

    Raises:
        Unimplemented: it is another one.
    """
    if encoding in {"", "identity"}:
        return False
    if encoding != GZIP:
        raise Unimplemented(f"The encoding {encoding[:32]!r} is not supported; gzip is.")
    return True


def takes_gzip(accept_encoding: str, request_encoding: str) -> bool:
    """Whether an answer may be gzip: asked for, or else the request is gzip itself."""
    if not accept_encoding:
        return request_encoding == GZIP
    codings = [coding.replace(" ", "").partition(";") for coding in accept_encoding.split(",")]
    return any(name == GZIP and weight not in {"q=0", "q=0.0"} for name, _, weight in codings)


# A unary GET
@dataclass(frozen=True)
class GetRequest:
    """What the query of a unary GET says.

    Attributes:
        codec: of the message, and of its answer.
        encoding: of the message: "", "identity", "gzip" or what is not supported.
        message: as it was encoded.
    """

    codec: Codec
    encoding: str
    message: bytes

    @classmethod
    def of_query(cls, query: bytes) -> "GetRequest":
        """Read a query; parameters that are not Connect's are ignored, as its text demands.

        Raises:
            InvalidRequest: a parameter is missing, doubled or malformed.
            UnsupportedMediaType: the codec is not known.
        """
        try:
            given = _only_once(parse_query(query))
            for name in ("encoding", "message"):
                if name not in given:
                    raise Wrong.of_field(name, "this parameter is needed")
            if given.get("connect", "v1") != f"v{PROTOCOL_VERSION}":
                raise Wrong.of_field("connect", f"must be v{PROTOCOL_VERSION}")
            message = given["message"]
            is_base64 = given.get("base64") == "1"
            data = _bytes_of_base64(message) if is_base64 else message.encode()
        except Wrong as wrong:
            raise invalid_request(wrong) from None
        codec = CODECS.get(given["encoding"])
        if codec is None:
            raise UnsupportedMediaType(f"The parameter encoding is {' or '.join(CODECS)}.")
        return cls(codec, given.get("compression", ""), data)


_GET_PARAMETERS = ("connect", "base64", "compression", "encoding", "message")


def _only_once(pairs: list[tuple[str, str]]) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in pairs:
        if name in _GET_PARAMETERS and name in given:
            raise Wrong.of_field(name, "is given twice")
        given[name] = value
    return given


def _bytes_of_base64(text: str) -> bytes:
    try:
        return decode_bytes(text)
    except Wrong as wrong:
        raise Wrong.of_field("message", wrong.description) from None


# Envelopes
def envelope(data: bytes, *, flags: int = 0) -> bytes:
    """A message of a stream, with its head."""
    return _HEAD.pack(flags, len(data)) + data


def only_message(body: bytes, *, gzip: bool, bytes_max: int) -> bytes:
    """The one message that a server-streaming method is sent.

    Args:
        body: the whole body: one envelope.
        gzip: whether the request says that its messages may be gzip.
        bytes_max: of the message, unpacked.

    Raises:
        HttpRefusal: the envelope breaks off, or its flags are not those of a request.
        BodyTooLarge: it says that it is longer.
        Unimplemented: there is no message, or a second one.
    """
    if not body:
        raise Unimplemented("This method takes one message, and there is none.")
    if len(body) < HEAD_BYTES:
        raise HttpRefusal("The envelope breaks off within its five bytes of flags and length.")
    flags, length = _HEAD.unpack_from(body)
    if flags & ~IS_COMPRESSED or (flags and not gzip):
        raise HttpRefusal(f"The envelope's flags 0x{flags:02x} do not fit this request.")
    if length > bytes_max:
        raise BodyTooLarge(f"The message is longer than {bytes_max} bytes.")
    data = body[HEAD_BYTES : HEAD_BYTES + length]
    if len(data) < length:
        raise HttpRefusal(f"The envelope breaks off: {length} bytes said, {len(data)} sent.")
    if len(body) > HEAD_BYTES + length:
        raise Unimplemented("This method takes one message, and there is more.")
    return decompress(data, bytes_max=bytes_max) if flags else data


class ConnectFraming:
    """See streams.Framing. One envelope a message; the last one says how the stream ended.

    There is no heartbeat: the protocol has no envelope that means nothing.

    Args:
        codec: of the messages.
        gzip: whether the client takes messages in gzip.
    """

    def __init__(self, codec: Codec, *, gzip: bool) -> None:
        self.content_type = f"application/connect+{codec.name}".encode()
        self.may_compress = False  # each envelope says that of itself
        self._gzip = gzip

    def opening(self) -> bytes:
        """See Framing.opening."""
        return b""

    def message(self, cursor: str, document: bytes) -> bytes:
        """See Framing.message."""
        if self._gzip and is_worth_compressing(document):
            return envelope(compress(document), flags=IS_COMPRESSED)
        return envelope(document)

    def heartbeat(self) -> bytes:
        """See Framing.heartbeat."""
        return b""

    def error(self, problem: bytes) -> bytes:
        """See Framing.error; problem is `error_json`."""
        return end_of_stream(problem)

    def end(self) -> bytes:
        """See Framing.end."""
        return end_of_stream()


def end_of_stream(error: bytes = b"", metadata: HeaderList | None = None) -> bytes:
    """The last envelope of a stream.

    Args:
        error: from `error_json`; b"" if there was none.
        metadata: what of the service's trailing metadata leaves.
    """
    members = [b'"error":' + error] if error else []
    if metadata:
        named = {name.decode("ascii"): [value.decode("ascii")] for name, value in metadata}
        members.append(b'"metadata":' + orjson.dumps(named))
    return envelope(b"{" + b",".join(members) + b"}", flags=IS_END)


# Errors
@dataclass(frozen=True)
class Refusal:
    """An answer that tells of an error, before anything else was sent.

    Attributes:
        status: the HTTP status.
        headers: in lower case, beside content-length.
        body: its bytes.
    """

    status: int
    headers: dict[str, str]
    body: bytes


def refusal_of(error: TenfoldError, exchange: Exchange) -> Refusal:
    """Tell of an error in the way in which the client of this exchange reads it.

    A stream is always 200, with the error in its last envelope; only a content type that is no
    stream's has a status, so that nobody takes that 200 for success.
    """
    route = exchange.call
    headers = headers_of(error)
    document = error_json(error, request_id=exchange.request_id, route=route)
    stream = _stream_codec_of(exchange)
    if stream is None:
        headers |= {"content-type": "application/json", "accept-encoding": GZIP}
        return Refusal(_status_of(error), headers, document)
    framing = ConnectFraming(stream, gzip=False)
    headers |= {
        "content-type": framing.content_type.decode(),
        "connect-accept-encoding": GZIP,
    }
    return Refusal(200, headers, framing.error(document))


def error_json(error: TenfoldError, *, request_id: str, route: Route) -> bytes:
    """An error as Connect's JSON.

    Args:
        error: what went wrong; of an Internal, only the request id is told.
        request_id: the correlation id of the request.
        route: gives the fields of violations their JSON names.
    """
    told = _told(error, route)
    status = status_pb2.Status.FromString(status_of(told, request_id=request_id).details)
    return orjson.dumps(
        {
            "code": _code_of(error).lower(),
            "message": status.message,
            "details": [_detail(detail) for detail in status.details],
        }
    )


def _told(error: TenfoldError, route: Route) -> TenfoldError:
    if isinstance(error, Internal):
        return Internal(INTERNAL_DETAIL, reason=error.error_reason)
    if isinstance(error, InvalidRequest) and error.violations:
        return _in_json_names(error, route)
    return error


def _in_json_names(error: InvalidRequest, route: Route) -> InvalidRequest:
    message = descriptor_of(route.method.input)
    violations = [
        Violation(json_field(violation.field, message)[0], violation.description)
        for violation in error.violations
    ]
    told, prefix = copy(error), f"{error.violations[0].field}: "
    told.violations = tuple(violations)
    if error.message.startswith(prefix):  # InvalidRequest.of_field
        told.message = f"{violations[0].field}: {error.message.removeprefix(prefix)}"
    return told


def _detail(packed: AnyProto) -> dict[str, Any]:
    name = packed.type_url.rpartition("/")[2]
    detail = getattr(error_details_pb2, name.rpartition(".")[2])()
    packed.Unpack(detail)
    return {
        "type": name,
        "value": base64.b64encode(packed.value).rstrip(b"=").decode(),
        # For people with curl; programs read the value.
        "debug": json_format.MessageToDict(detail),
    }


def _code_of(error: TenfoldError) -> str:
    return _CODES.get(type(error)) or code_of(error).name


def _status_of(error: TenfoldError) -> int:
    if isinstance(error, UnsupportedMediaType):
        return error.http_status
    return _STATUS[_code_of(error)]


def _stream_codec_of(exchange: Exchange) -> Codec | None:
    """The codec of an exchange whose client reads a stream; None if it does not."""
    method = exchange.call.method
    if not (method.client_streaming or method.server_streaming):
        return None
    try:
        return codec_of(exchange.header("content-type"), STREAM_TYPES)
    except HttpRefusal:
        return None
