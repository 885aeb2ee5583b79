"""The tus 1.0.0 protocol's headers and status codes, pure.

Source: https://tus.io/protocols/resumable-upload (1.0.0), extensions creation,
termination, checksum and expiration.
"""

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from typing import Protocol

from shared.errors import ERROR_DOMAIN, InvalidRequest

VERSION = "1.0.0"
EXTENSIONS = "creation,termination,checksum,expiration"
CHECKSUM_ALGORITHMS = ("sha1", "sha256", "crc32")
PATCH_CONTENT_TYPE = "application/offset+octet-stream"
METADATA_CHARS_MAX = 4096
METADATA_PAIRS_MAX = 32
LENGTH_DIGITS_MAX = 18

RESUMABLE = "tus-resumable"

_TITLES: Mapping[int, str] = {
    409: "Conflict",
    410: "Gone",
    412: "Precondition Failed",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    460: "Checksum Mismatch",
}
_CODES: Mapping[int, str] = {
    409: "ABORTED",
    410: "FAILED_PRECONDITION",
    412: "FAILED_PRECONDITION",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    460: "INVALID_ARGUMENT",
}


class TusRefusal(Exception):
    """An answer whose status only tus gives a meaning to; the rest are TenfoldErrors.

    Args:
        status: the HTTP status, one of those the protocol names.
        reason: for programs.
        detail: one sentence for people.
        headers: beside Tus-Resumable.
    """

    def __init__(
        self, status: int, reason: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.headers = dict(headers or {})

    def problem(self, request_id: str) -> bytes:
        """The body: a problem document (RFC 9457) of the same shape as the edge's."""
        document = {
            "type": f"https://{ERROR_DOMAIN}/errors/{self.reason.lower().replace('_', '-')}",
            "title": _TITLES[self.status],
            "status": self.status,
            "detail": self.detail,
            "code": _CODES[self.status],
            "reason": self.reason,
            "request_id": request_id,
        }
        return json.dumps(document, separators=(",", ":")).encode()


def check_version(headers: Mapping[str, str]) -> None:
    """Refuse another version of the protocol, and none.

    Raises:
        TusRefusal: 412 with the versions that are spoken.
    """
    found = headers.get(RESUMABLE, "")
    if found != VERSION:
        detail = f"Tus-Resumable must be {VERSION}."
        raise TusRefusal(412, "TUS_VERSION_UNSUPPORTED", detail, {"tus-version": VERSION})


def check_content_type(headers: Mapping[str, str]) -> None:
    """Refuse a PATCH whose body is not declared as bytes at an offset.

    Raises:
        TusRefusal: 415.
    """
    if headers.get("content-type", "").strip().lower() != PATCH_CONTENT_TYPE:
        raise TusRefusal(
            415, "CONTENT_TYPE_UNSUPPORTED", f"Content-Type must be {PATCH_CONTENT_TYPE}."
        )


def number_of(headers: Mapping[str, str], name: str) -> int:
    """A header that must be there and is a count of bytes.

    Raises:
        InvalidRequest: it is absent, or anything but digits.
    """
    text = headers.get(name, "")
    # int() also reads signs, spaces, underscores and other scripts' digits.
    if not (text.isascii() and text.isdigit() and len(text) <= LENGTH_DIGITS_MAX):
        raise InvalidRequest.of_field(name, "must be a number of bytes, in digits")
    return int(text)


def optional_number_of(headers: Mapping[str, str], name: str) -> int | None:
    """See number_of; None when the header is absent or empty."""
    return number_of(headers, name) if headers.get(name) else None


@dataclass(frozen=True)
class Creation:
    """What a creation asks for.

    Attributes:
        size_bytes: 1 or more.
        metadata: the decoded pairs; values are bytes.
        header: Upload-Metadata as it came, sound.
    """

    size_bytes: int
    metadata: Mapping[str, bytes] = field(default_factory=dict)
    header: str = ""

    def text(self, *names: str) -> str:
        """The first of these keys that is present, as text; "" for none."""
        found = next((self.metadata[name] for name in names if name in self.metadata), b"")
        return found.decode(errors="replace")


def creation_of(headers: Mapping[str, str]) -> Creation:
    """Read the headers of a creation.

    Raises:
        InvalidRequest: a header is absent or malformed, or the length is deferred.
    """
    if headers.get("upload-defer-length"):
        raise InvalidRequest.of_field(
            "upload-defer-length", "is not supported: send Upload-Length instead"
        )
    size_bytes = number_of(headers, "upload-length")
    if size_bytes < 1:
        raise InvalidRequest.of_field("upload-length", "must be 1 or more")
    header = headers.get("upload-metadata", "")
    return Creation(size_bytes, parse_metadata(header), header)


def parse_metadata(header: str) -> dict[str, bytes]:
    """Read Upload-Metadata: "key base64,key base64,key".

    Strict, since it is given back as a header by HEAD: what is malformed could smuggle one.

    Raises:
        InvalidRequest: a key is empty, doubled or not visible ASCII, a value is not
            canonical base64, or there is too much.
    """
    if not header:
        return {}
    if len(header) > METADATA_CHARS_MAX:
        raise _metadata_wrong(f"has more than {METADATA_CHARS_MAX} characters")
    pairs = header.split(",")
    if len(pairs) > METADATA_PAIRS_MAX:
        raise _metadata_wrong(f"has more than {METADATA_PAIRS_MAX} pairs")
    found: dict[str, bytes] = {}
    for pair in pairs:
        key, _, value = pair.strip(" ").partition(" ")
        if not key or any(not "!" <= char <= "~" for char in key):
            raise _metadata_wrong("has a key that is empty or not visible ASCII")
        if key in found:
            raise _metadata_wrong(f"has the key {key[:40]!r} twice")
        found[key] = _decode_base64(value, "upload-metadata", f"the value of {key[:40]!r}")
    return found


def _metadata_wrong(description: str) -> InvalidRequest:
    return InvalidRequest.of_field("upload-metadata", description)


def _decode_base64(text: str, header: str, what: str) -> bytes:
    try:
        decoded = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InvalidRequest.of_field(header, f"{what} is not base64") from error
    if base64.b64encode(decoded).decode() != text:
        raise InvalidRequest.of_field(header, f"{what} is not canonical base64")
    return decoded


class Digest(Protocol):
    """A running checksum."""

    def update(self, data: bytes, /) -> None:
        """Take in more bytes."""
        ...

    def digest(self) -> bytes:
        """The checksum so far."""
        ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


@dataclass(frozen=True)
class Checksum:
    """Upload-Checksum: what the body of one PATCH must add up to."""

    algorithm: str
    expected: bytes

    def new_digest(self) -> Digest:
        """A checksum to run over the body."""
        if self.algorithm == "crc32":
            return _Crc32()
        return hashlib.new(self.algorithm, usedforsecurity=False)


def checksum_of(headers: Mapping[str, str]) -> Checksum | None:
    """Read Upload-Checksum: "sha1 base64"; None when it is absent.

    Raises:
        InvalidRequest: it is malformed, of the wrong length, or of an algorithm that is not
            in Tus-Checksum-Algorithm.
    """
    header = headers.get("upload-checksum", "")
    if not header:
        return None
    algorithm, _, value = header.partition(" ")
    if algorithm not in CHECKSUM_ALGORITHMS:
        known = ", ".join(CHECKSUM_ALGORITHMS)
        raise InvalidRequest.of_field("upload-checksum", f"the algorithm must be one of {known}")
    expected = _decode_base64(value, "upload-checksum", "the checksum")
    checksum = Checksum(algorithm, expected)
    if len(expected) != len(checksum.new_digest().digest()):
        raise InvalidRequest.of_field("upload-checksum", f"is not as long as {algorithm}")
    return checksum


def expires_header(moment: datetime) -> str:
    """Upload-Expires: the moment as HTTP writes it (RFC 9110)."""
    return format_datetime(moment.replace(microsecond=0), usegmt=True)
