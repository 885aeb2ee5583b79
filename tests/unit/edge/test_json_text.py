import contextlib
import gc
import json
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.json_text import DEPTH_MAX, Wrong, parse_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
)


@given(JSON)
def test_every_document_is_read_as_the_standard_library_reads_it(value):
    text = json.dumps(value, ensure_ascii=False)
    assert parse_json(text.encode()) == json.loads(text)


AWKWARD = st.text(':"{\\ a\n', max_size=6)


@given(st.dictionaries(AWKWARD, AWKWARD, min_size=1), st.sampled_from([":", " :", ": ", "\n:\t"]))
def test_a_key_given_twice_is_found_whatever_the_strings_hold(value, colon):
    text = json.dumps(value, separators=(",", colon)).encode()
    assert parse_json(text) == value
    key = json.dumps(next(iter(value))).encode()
    for doubled in (b'{"x":[%s,%s:1}]}' % (text[:-1], key), b"%s,%s :1}" % (text[:-1], key)):
        with pytest.raises(Wrong, match="twice"):
            parse_json(doubled)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"{",
        b"{}{}",
        b"{} x",
        b"1 2",
        b"[1,]",
        b'{"a":1,}',
        b"{a:1}",
        b"{'a':1}",
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"[1e400]",
        b"1" * 5000,
        b"01",
        b"+1",
        b".5",
        b"1.",
        b"0x10",
        b"// a\n{}",
        b"/* a */ {}",
        b'"\xff"',
        b'"\xc0\x80"',
        b'"\xed\xa0\x80"',
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'"\\x41"',
        b'"a\nb"',
        b'"a\x00b"',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b"{}\x00",
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":1}',
        b'[{"a":{"b":1,"b":2}}]',
        b"True",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_single_strict_document_is_refused(text):
    with pytest.raises(Wrong):
        parse_json(text)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
@pytest.mark.parametrize("closed", [True, False])
def test_100_000_levels_are_refused_within_50_ms(opening, closed):
    closing = opening.translate(bytes.maketrans(b"[{", b"]}"), b'"a:')[::-1]
    text = opening * 100_000 + b"1" + closing * (100_000 if closed else 0)
    best_s = min(timed(text) for _ in range(3))
    assert best_s < 0.05


def timed(text):
    started = time.thread_time()
    with pytest.raises(Wrong, match="deeper than 100"):
        parse_json(text)
    return time.thread_time() - started


def test_the_depth_cap_counts_nesting_and_not_brackets():
    fits = b"[" * DEPTH_MAX + b"]" * DEPTH_MAX
    assert parse_json(fits) is not None
    with pytest.raises(Wrong, match="deeper"):
        parse_json(b"[" + fits + b"]")
    assert len(parse_json(b"[" + b",".join([b"[]"] * 5000) + b"]")) == 5000
    assert parse_json(orjson.dumps(["[[{{" * 100])) == ["[[{{" * 100]


@pytest.mark.parametrize(
    "hostile",
    [
        lambda size: b"[" + b"0," * (size // 2) + b"0]",
        lambda size: b"{" + b",".join(b'"k%d":1' % i for i in range(size // 10)) + b"}",
        lambda size: b'{"a":"' + b"x" * size + b'"}',
        lambda size: b'{"a":"' + b'\\"' * (size // 2) + b'"}',
        lambda size: b'{"a":"' + b":" * size + b'"}',
        lambda size: b"[" + b"[]," * (size // 3) + b"[]]",
        lambda size: b'["' + b"{" * size,
        lambda size: b"[" + b"1" * size + b"]",
        lambda size: b"[0." + b"1" * size + b"]",
        lambda size: b"[" + b'"-0",' * (size // 5) + b"-0]",
    ],
    ids=[
        "zeros",
        "keys",
        "string",
        "escapes",
        "colons",
        "arrays",
        "open",
        "digits",
        "fraction",
        "zeros-",
    ],
)
def test_a_hostile_megabyte_is_handled_in_time_linear_in_its_size(hostile):
    small, large = (
        min(cost_s(hostile(size)) for _ in range(3)) for size in (1_000_000 // 16, 1_000_000)
    )
    assert large < 16 * 4 * small + 0.01  # squared, it would be 256 times


def cost_s(text):
    gc.disable()  # what a collection of everything else costs is not the parser's
    started = time.thread_time()
    with contextlib.suppress(Wrong):
        parse_json(text)
    spent_s = time.thread_time() - started
    gc.enable()
    return spent_s
