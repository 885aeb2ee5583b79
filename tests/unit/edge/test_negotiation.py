"""Accept-Encoding, as RFC 9110 §12.5.3 has it."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.negotiation import Codings, codings_of, require_media_type
from edge.refusals import NotAcceptable, UnsupportedMediaType


@pytest.mark.parametrize(
    ("header", "likes_gzip", "takes_identity"),
    [
        (b"", False, True),
        (b"gzip", True, True),
        (b"gzip;q=0.000", False, True),
        (b"deflate, gzip;q=1.0, *;q=0.5", True, True),
        (b"*;q=0.5", True, True),
        (b"*;q=0, identity", False, True),
        (b"*;q=0, identity;q=0.1, gzip;q=0.1", True, True),
        (b"identity;q=0.5, gzip;q=0.4", False, True),
        (b"identity;q=0, *", True, False),
        (b" GZip ; Q=0.3 ", True, True),
        (b"gzip;q=2", True, True),
        (b"gzip;q=-1", False, True),
        (b"gzip;q=nan", False, True),
        (b"\xff, gzip", True, True),
    ],
)
def test_codings_are_weighed(header, likes_gzip, takes_identity):
    assert codings_of(header) == Codings(likes_gzip, takes_identity)


@given(st.binary(max_size=60))
def test_any_header_is_read_or_refused(header):
    with contextlib.suppress(NotAcceptable):
        codings = codings_of(header)
        assert codings.likes_gzip or codings.takes_identity


@pytest.mark.parametrize("content_type", ["a/b", "A/B", ' a/b ; charset="UTF-8" '])
def test_a_media_type_is_known_in_any_case_and_with_its_charset(content_type):
    require_media_type(content_type, ("x/y", "a/b"))


@pytest.mark.parametrize("content_type", ["", "a", "a/bc", "a/b; charset=latin-1", "a/b; x=y"])
def test_another_type_or_charset_is_refused(content_type):
    with pytest.raises(UnsupportedMediaType):
        require_media_type(content_type, ("a/b",))
