"""gzip: bounded when it comes in, worth its time when it goes out."""

import zlib

from edge.refusals import BodyTooLarge, HttpRefusal

# Below this a message fits into one packet anyway. Above the other it would hold up every
# other request of this process for longer than the network saves.
COMPRESSED_BYTES_MIN = 1024
COMPRESSED_BYTES_MAX = 512 * 1024
# Higher levels cost several times as much, for JSON a tenth smaller.
LEVEL = 1

_GZIP = 16 + zlib.MAX_WBITS
# A stream keeps its window while it is open: 32 KiB so, and 264 KiB with zlib's own sizes.
_STREAM_GZIP, _STREAM_MEMORY_LEVEL = 16 + 12, 5


def is_worth_compressing(data: bytes) -> bool:
    """Whether an answer of this length is sent compressed, where the client takes that."""
    return COMPRESSED_BYTES_MIN <= len(data) <= COMPRESSED_BYTES_MAX


def compress(data: bytes) -> bytes:
    """One gzip member (RFC 1952) without a time, so that equal messages stay equal."""
    compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, _GZIP)
    return compressor.compress(data) + compressor.flush()


class GzipStream:
    """An answer that is compressed bit by bit, as it comes."""

    def __init__(self) -> None:
        self._compressor = zlib.compressobj(
            LEVEL, zlib.DEFLATED, _STREAM_GZIP, memLevel=_STREAM_MEMORY_LEVEL
        )

    def pack(self, chunk: bytes) -> bytes:
        """The chunk and what was held back: whoever reads this far can read all of it."""
        return self._compressor.compress(chunk) + self._compressor.flush(zlib.Z_SYNC_FLUSH)

    def finish(self) -> bytes:
        """What comes last."""
        return self._compressor.flush()


def decompress(data: bytes, *, bytes_max: int) -> bytes:
    """What one gzip member holds.

    Args:
        data: the whole member; b"" holds nothing.
        bytes_max: no more than this is ever unpacked.

    Raises:
        BodyTooLarge: it holds more.
        HttpRefusal: it is no gzip, breaks off, or something follows it.
    """
    if not data:
        return b""
    decompressor = zlib.decompressobj(_GZIP)
    try:
        unpacked = decompressor.decompress(data, bytes_max + 1)
    except zlib.error as error:
        raise HttpRefusal("The message is not gzip, as its encoding says.") from error
    if len(unpacked) > bytes_max:
        raise BodyTooLarge(f"The message unpacks to more than {bytes_max} bytes.")
    if not decompressor.eof or decompressor.unused_data:
        raise HttpRefusal("The message is not one whole gzip stream.")
    return unpacked
