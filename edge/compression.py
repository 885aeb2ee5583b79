"""Which answers go out compressed, and which bodies may come in so.

An answer is sent as gzip when the client takes that, the type is text, it is long enough to
gain, and its contract marks nothing in it as sensitive. The last is for BREACH (CVE-2013-3587):
the length of a compressed answer tells what repeats in it, so a secret that stands beside text
of an attacker's choice can be guessed. That attack also needs a browser that sends the
victim's credential by itself, and the edge reads none that one would; the mark costs little
and does not lean on it. Of streams only NDJSON is compressed, each message flushed, so that
none waits for the next: events of SSE are short, and some of its readers hold them back.

Who refuses an answer as it is (`identity;q=0`) gets gzip whatever the length, or 406 where
there is none. Errors and the edge's own pages are sent as they are.

A body may come as gzip where it is read whole; what it unpacks to is bounded like a body that
came as it is. All else is 415: another coding, a coding in a coding, and any coding of a
stream, where a small body could stand for hours of work.
"""

import asyncio

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from tenfold.options.v1 import policy_pb2

from edge.answer import Answer
from edge.etags import tag_of_gzip
from edge.exchange import Exchange
from edge.gzipped import COMPRESSED_BYTES_MIN, compress, decompress
from edge.http1_text import HeaderList
from edge.negotiation import NO_CODINGS, Codings, codings_of
from edge.refusals import NotAcceptable, UnsupportedMediaType

# A millisecond or two; longer ones go to a thread, so that others are served meanwhile.
INLINE_BYTES_MAX = 256 * 1024

VARY = (b"vary", b"accept-encoding")

_TEXT_TYPES = ("text/", "application/json", "application/xml", "application/javascript")
_TEXT_SUFFIXES = ("+json", "+xml")
_IDENTITY = {"", "identity"}
_GZIP = {"gzip", "x-gzip"}


def codings_for(exchange: Exchange, *, may_compress: bool) -> Codings:
    """Which codings the client takes; found before the call, so that a 406 has no effect.

    Args:
        exchange: the request.
        may_compress: whether its answer could be gzip.

    Raises:
        NotAcceptable: it can be sent in none of them.
    """
    header = exchange.headers.get(b"accept-encoding")
    if header is None:
        return NO_CODINGS
    codings = codings_of(header)
    if not (may_compress or codings.takes_identity):
        raise NotAcceptable("This answer is never compressed.")
    return codings


def may_gain(body: bytes, codings: Codings) -> bool:
    """Whether to look at an answer's coding at all: short ones are sent as they are."""
    return len(body) >= COMPRESSED_BYTES_MIN or not codings.takes_identity


def headers_of_coding(codings: Codings) -> HeaderList:
    """What says that an answer depends on Accept-Encoding, and what became of it."""
    return [VARY, (b"content-encoding", b"gzip")] if codings.likes_gzip else [VARY]


async def coded(answer: Answer, codings: Codings) -> Answer:
    """A whole answer in the coding that its client likes best.

    Args:
        answer: as it is; it may gain, and its contract lets it be compressed.
        codings: from `codings_for`.
    """
    body = answer.body
    if not body or (codings.takes_identity and not _is_text(answer.headers)):
        return answer
    headers = [*answer.headers, *headers_of_coding(codings)]
    if not codings.likes_gzip:
        return Answer(answer.status, headers, body)
    is_short = len(body) <= INLINE_BYTES_MAX
    packed = compress(body) if is_short else await asyncio.to_thread(compress, body)
    return Answer(answer.status, _with_own_tag(headers), packed)


def _with_own_tag(headers: HeaderList) -> HeaderList:
    return [
        (name, tag_of_gzip(value.decode()).encode() if name == b"etag" else value)
        for name, value in headers
    ]


def _is_text(headers: HeaderList) -> bool:
    """Whether the type gains by compression; pictures, films and archives have had theirs."""
    content_type = dict(headers).get(b"content-type", b"").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type.startswith(_TEXT_TYPES) or media_type.endswith(_TEXT_SUFFIXES)


def decoded(body: bytes, content_encoding: str, *, bytes_max: int) -> bytes:
    """A request body without its coding.

    Args:
        body: as it came.
        content_encoding: the header; "" if absent.
        bytes_max: what it may unpack to; no more is ever unpacked.

    Raises:
        UnsupportedMediaType: the coding is not gzip, or there are several.
        HttpRefusal: the body is not one whole gzip member.
        BodyTooLarge: it unpacks to more than bytes_max.
    """
    coding = content_encoding.strip().lower()
    if coding in _IDENTITY:
        return body
    if coding not in _GZIP:
        raise _unsupported("gzip")
    return decompress(body, bytes_max=bytes_max)


def require_identity(content_encoding: str) -> None:
    """Refuse any coding of a body that is read as a stream.

    Raises:
        UnsupportedMediaType: it has one.
    """
    if content_encoding.strip().lower() not in _IDENTITY:
        raise _unsupported("identity")


def _unsupported(taken: str) -> UnsupportedMediaType:
    # The header says what would be taken (RFC 9110 §12.5.3).
    headers = {"accept-encoding": taken}
    return UnsupportedMediaType(f"The only coding taken here is {taken}.", headers=headers)


def carries_secrets(message: Descriptor, field: str = "") -> bool:
    """Whether a message may hold a field that its contract marks as sensitive.

    Args:
        message: of an answer.
        field: only this one of its fields is sent; "" for all.
    """
    waiting = [message.fields_by_name[field]] if field else list(message.fields)
    seen = {message.full_name}
    while waiting:
        one = waiting.pop()
        if _is_sensitive(one):
            return True
        inner = one.message_type
        if inner is not None and inner.full_name not in seen:
            seen.add(inner.full_name)
            waiting += inner.fields
    return False


def _is_sensitive(field: FieldDescriptor) -> bool:
    options = field.GetOptions()
    has_policy: bool = options.HasExtension(policy_pb2.field)
    return has_policy and bool(options.Extensions[policy_pb2.field].sensitive)
