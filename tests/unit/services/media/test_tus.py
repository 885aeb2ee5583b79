import base64
import hashlib
import json
import zlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.media import tus
from shared.errors import InvalidRequest

KEYS = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters=","),
    min_size=1,
    max_size=20,
)


@given(st.dictionaries(KEYS, st.binary(max_size=40), max_size=10))
def test_what_a_client_encodes_is_what_we_read(pairs):
    header = ",".join(f"{key} {base64.b64encode(value).decode()}" for key, value in pairs.items())
    assert tus.parse_metadata(header) == pairs


@given(st.text(max_size=200))
def test_any_metadata_is_read_or_refused_and_cannot_smuggle_a_header(header):
    try:
        tus.parse_metadata(header)
    except InvalidRequest as refused:
        assert refused.violations[0].field == "upload-metadata"
    else:
        assert header.isascii() and header.isprintable()


@pytest.mark.parametrize(
    "header",
    [
        "a YQ==,a YQ==",
        "a !",
        "a YQ",
        "a YQ=",
        " ",
        "a  YQ==",
        "ä YQ==",
        "a YR==",
        ",",
        "a\r\nX: y YQ==",
    ],
)
def test_malformed_metadata_is_refused(header):
    with pytest.raises(InvalidRequest):
        tus.parse_metadata(header)


def test_a_key_without_a_value_has_an_empty_one():
    assert tus.parse_metadata("private,name YQ==") == {"private": b"", "name": b"a"}


def test_too_much_metadata_is_refused():
    for header in ("a " + "YQ==" * 2000, ",".join(f"k{number}" for number in range(33))):
        with pytest.raises(InvalidRequest):
            tus.parse_metadata(header)


@given(st.integers(0, 10**18 - 1))
def test_a_number_of_bytes_is_read_exactly(number):
    assert tus.number_of({"upload-offset": str(number)}, "upload-offset") == number


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1_0", "0x1", "1.0", "\u0661", "9" * 19])
def test_anything_but_digits_is_no_number_of_bytes(text):
    with pytest.raises(InvalidRequest):
        tus.number_of({"upload-offset": text}, "upload-offset")


@given(st.lists(st.binary(max_size=50), max_size=5), st.sampled_from(tus.CHECKSUM_ALGORITHMS))
def test_a_checksum_runs_over_pieces_as_over_the_whole(pieces, algorithm):
    whole = b"".join(pieces)
    expected = (
        zlib.crc32(whole).to_bytes(4, "big")
        if algorithm == "crc32"
        else hashlib.new(algorithm, whole).digest()
    )
    header = f"{algorithm} {base64.b64encode(expected).decode()}"
    checksum = tus.checksum_of({"upload-checksum": header})
    digest = checksum.new_digest()
    for piece in pieces:
        digest.update(piece)
    assert digest.digest() == checksum.expected


@pytest.mark.parametrize("header", ["md5 YQ==", "sha1", "sha1 YQ==", "sha1 !", "SHA1 YQ=="])
def test_a_checksum_that_cannot_be_one_is_refused(header):
    with pytest.raises(InvalidRequest):
        tus.checksum_of({"upload-checksum": header})


def test_no_checksum_is_none():
    assert tus.checksum_of({}) is None


@pytest.mark.parametrize("headers", [{}, {"tus-resumable": "0.2.2"}, {"tus-resumable": "1.0.0 "}])
def test_another_version_is_refused_with_the_one_that_is_spoken(headers):
    with pytest.raises(tus.TusRefusal) as refused:
        tus.check_version(headers)
    assert (refused.value.status, refused.value.headers) == (412, {"tus-version": "1.0.0"})


def test_a_refusal_is_a_problem_document():
    problem = json.loads(tus.TusRefusal(409, "OFFSET_MISMATCH", "No.").problem("r1"))
    assert (problem["status"], problem["code"], problem["request_id"]) == (409, "ABORTED", "r1")


def test_expiry_is_written_as_http_writes_dates():
    moment = datetime(2026, 6, 25, 16, 0, 1, 5, tzinfo=UTC)
    assert tus.expires_header(moment) == "Thu, 25 Jun 2026 16:00:01 GMT"
