import contextlib
import gzip
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.gzipped import GzipStream, compress, decompress, is_worth_compressing
from edge.refusals import BodyTooLarge, HttpRefusal


@given(st.binary(max_size=3000))
def test_what_is_compressed_comes_back(data):
    packed = compress(data)
    assert decompress(packed, bytes_max=len(data)) == gzip.decompress(packed) == data
    assert compress(data) == packed


def test_nothing_holds_nothing():
    assert decompress(b"", bytes_max=0) == b""


@given(st.binary(max_size=200))
def test_any_bytes_are_unpacked_or_refused(data):
    with contextlib.suppress(HttpRefusal):
        assert len(decompress(data, bytes_max=100)) <= 100


def test_no_more_is_unpacked_than_may_be():
    with pytest.raises(BodyTooLarge, match="99 bytes"):
        decompress(gzip.compress(b"x" * 100), bytes_max=99)


@pytest.mark.parametrize(("length", "is_worth"), [(0, False), (1024, True), (10**6, False)])
def test_short_and_very_long_answers_go_as_they_are(length, is_worth):
    assert is_worth_compressing(b"x" * length) is is_worth


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8))
def test_each_chunk_of_a_stream_can_be_read_before_the_next(chunks):
    stream, unpacker = GzipStream(), zlib.decompressobj(31)
    for chunk in chunks:
        assert unpacker.decompress(stream.pack(chunk)) == chunk
    assert unpacker.decompress(stream.finish()) == b""
    assert unpacker.eof


def test_what_repeats_from_message_to_message_is_sent_once():
    stream = GzipStream()
    message = random.Random(1).randbytes(200)
    first, second = stream.pack(message), stream.pack(message)
    assert len(second) < len(first) / 5
