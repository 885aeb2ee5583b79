"""What we encode, another implementation reads back; what servers send, we read."""

import base64

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.rpc import header_block
from shared.rpc.header_block import BlockDecoder

names = st.from_regex(r"[0-9a-z_.-]{1,40}", fullmatch=True).filter(
    lambda name: not header_block._OWN_NAME.fullmatch(name) and not name.endswith("-bin")
)
visible = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=400)


def read_back(block: bytes) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in hpack.Decoder().decode(block)]


@given(st.lists(st.tuples(names, visible), max_size=10))
def test_metadata_is_read_back_in_its_order(metadata: list[tuple[str, str]]) -> None:
    block = b"".join(header_block.metadata_field(name, value) for name, value in metadata)
    assert read_back(block) == metadata


@given(st.binary(max_size=40_000))
def test_a_string_of_any_length_is_read_back(value: bytes) -> None:
    [(_, read)] = hpack.Decoder(max_header_list_size=10**6).decode(
        header_block.field(b"x", value), raw=True
    )
    assert read == value


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254, 255, 256, 16_510, 16_511, 65_000])
def test_the_lengths_where_the_encoding_changes_are_read_back(size: int) -> None:
    block = header_block.field(b"x" * (size or 1), b"y" * size)
    [(name, value)] = hpack.Decoder(max_header_list_size=10**6).decode(block)
    assert (len(name), len(value)) == (size or 1, size)


@given(st.binary(max_size=300))
def test_binary_metadata_travels_in_base_64_and_comes_back(value: bytes) -> None:
    [(name, text)] = read_back(header_block.metadata_field("x-bin", value))
    assert name == "x-bin"
    assert base64.b64decode(text + "=" * (-len(text) % 4)) == value
    assert header_block.binary_value(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [(b"AQI", b"\1\2"), (b"AQI=", b"\1\2"), (b"AQ==,Ag==", b"\1"), (b"AQ,Ag", b"\1"), (b"", b""),
     (b"A", None), (b"*", None), (b"A\xffQ=", None)],
    ids=["unpadded", "padded", "two padded", "two", "empty", "one digit", "no digit", "bytes"],
)  # fmt: skip
def test_a_binary_value_is_read_or_is_none(text: bytes, value: bytes | None) -> None:
    assert header_block.binary_value(text) == value


def test_the_headers_of_a_call_are_what_grpc_asks_for() -> None:
    block = header_block.call_block("/a.B/C", "[::1]:50051", "tenfold-grpc/1")
    assert read_back(block) == [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/a.B/C"),
        (":authority", "[::1]:50051"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "tenfold-grpc/1"),
    ]


def test_no_table_is_a_table_of_no_bytes() -> None:
    decoder = hpack.Decoder()
    decoder.decode(header_block.NO_TABLE + header_block.field(b"a", b"b"))
    assert decoder.header_table_size == 0


@pytest.mark.parametrize("name", ["tenfold-identity", "authorization", "cookie"])
def test_a_secret_may_be_put_into_nobody_s_table(name: str) -> None:
    [secret] = hpack.Decoder().decode(header_block.metadata_field(name, "x"))
    [other] = hpack.Decoder().decode(header_block.metadata_field("x-request-id", "x"))
    assert (secret.indexable, other.indexable) == (False, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("X-Upper", "a"), ("", "a"), ("a b", "a"), (":path", "/"), ("x\r\n", "a"), ("ümlaut", "a"),
     ("te", "a"), ("content-type", "a"), ("user-agent", "a"), ("grpc-timeout", "1S"),
     ("x", "a\r\nb"), ("x", "a\0"), ("x", "ü"), ("x", "\x7f"), ("x", b"\xff"), ("x", "\t")],
)  # fmt: skip
def test_what_metadata_cannot_say_is_refused_by_name(name: str, value: str | bytes) -> None:
    with pytest.raises(ValueError, match="metadata") as refusal:
        header_block.metadata_field(name, value)
    assert name in str(refusal.value) or repr(name) in str(refusal.value)


def test_names_are_remembered_up_to_a_bound() -> None:
    for number in range(2 * header_block._NAMES_MAX):
        header_block.metadata_field(f"x-{number}", "a")
    assert len(header_block._names) <= header_block._NAMES_MAX
    assert read_back(header_block.metadata_field("x-never-seen", "a")) == [("x-never-seen", "a")]


UNITS = {"S": 1.0, "m": 1e-3, "u": 1e-6}


@given(st.floats(min_value=1e-9, max_value=1e12))
def test_a_timeout_is_never_longer_than_asked_and_never_nothing(timeout_s: float) -> None:
    text = header_block.timeout_text(timeout_s).decode()
    digits, unit = text[:-1], text[-1]
    assert digits.isdigit()
    assert 1 <= len(digits) <= 8
    assert 0 < int(digits) * UNITS[unit] <= max(timeout_s, 1e-6) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("timeout_s", "text"),
    [(10, b"10000m"), (0.0015, b"1m"), (0.0009, b"900u"), (1e-9, b"1u"), (99_999.999, b"99999999m"),
     (100_000, b"100000S"), (1e12, b"99999999S")],
)  # fmt: skip
def test_timeouts_take_the_finest_unit_that_holds_them(timeout_s: float, text: bytes) -> None:
    assert header_block.timeout_text(timeout_s) == text
    assert read_back(header_block.timeout_field(timeout_s)) == [("grpc-timeout", text.decode())]


def encoder() -> hpack.Encoder:
    """That of a server which has read our SETTINGS: it keeps no table."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder


@given(st.lists(st.tuples(names, visible), max_size=10, unique_by=lambda pair: pair[0]))
def test_answers_are_read_with_and_without_huffman(metadata: list[tuple[str, str]]) -> None:
    decoder, wanted = BlockDecoder(), {n.encode(): v.encode() for n, v in metadata}
    for huffman in (True, False):
        block = encoder().encode(metadata, huffman=huffman)
        for _ in range(2):  # the second time from memory
            assert decoder.decode(block) == (header_block.TRAILERS, wanted)


def test_what_comes_several_times_is_joined() -> None:
    block = header_block.field(b"a", b"1") + header_block.field(b"a", b"2")
    assert BlockDecoder().decode(block)[1] == {b"a": b"1,2"}


@pytest.mark.parametrize(
    ("headers", "kind"),
    [([(":status", "200"), ("content-type", "application/grpc")], header_block.ANSWER),
     ([(":status", "200"), ("content-type", "application/grpc+proto")], header_block.ANSWER),
     ([(":status", "200"), ("content-type", "text/html")], header_block.FOREIGN),
     ([(":status", "200")], header_block.FOREIGN),
     ([(":status", "503"), ("content-type", "application/grpc")], header_block.FOREIGN),
     ([(":status", "103")], header_block.INFORMATION),
     ([("grpc-status", "0")], header_block.TRAILERS),
     ([("x", "y" * 17_000)], header_block.TOO_LONG),
     ([(f"x-{n}", "") for n in range(1000)], header_block.TOO_LONG)],
    ids=["grpc", "grpc+proto", "html", "no type", "503", "early hints", "trailers", "long", "many"],
)  # fmt: skip
def test_a_block_is_told_by_its_status_and_type(headers: list[tuple[str, str]], kind: int) -> None:
    assert BlockDecoder().decode(encoder().encode(headers))[0] == kind


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",
        b"\xff\xff\xff\xff\xff\xff",
        b"\x3f\xe1\x1f",
        b"\xbe",
        b"\x00\x05ab",
        b"\x00\x81\xff",
    ],
    ids=["index 0", "endless number", "a table of 4096", "index of a table", "cut", "Huffman"],
)
def test_a_block_that_does_not_decode_is_an_error(block: bytes) -> None:
    with pytest.raises(ValueError, match="does not decode"):
        BlockDecoder().decode(block)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_an_error(block: bytes) -> None:
    decoder = BlockDecoder()
    try:
        first = decoder.decode(block)
    except ValueError:
        return
    assert decoder.decode(block) == first


def test_what_is_remembered_of_answers_is_bounded() -> None:
    decoder = BlockDecoder()
    for number in range(2 * header_block.BLOCKS_KEPT_MAX):
        decoder.decode(header_block.field(b"x", b"%d" % number))
    decoder.decode(header_block.field(b"x", b"y" * header_block.BLOCK_KEPT_BYTES_MAX))
    kept = decoder._known
    assert len(kept) <= header_block.BLOCKS_KEPT_MAX
    assert max(map(len, kept)) <= header_block.BLOCK_KEPT_BYTES_MAX
