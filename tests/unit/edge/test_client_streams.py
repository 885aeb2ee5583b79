"""Lines of a body, however it comes apart."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.client_streams import Lines
from edge.refusals import BodyTooLarge

LINES = st.lists(st.text("ab \t{}", max_size=8).map(str.encode), max_size=8)


class Chunks:
    """A body that comes in these chunks; see BodyChunks."""

    def __init__(self, chunks):
        self._chunks = iter(chunks)

    async def next(self):
        return next(self._chunks, b"")


def read(chunks, bytes_max=100):
    """Each line with its number."""

    async def read_all():
        lines, found = Lines(Chunks(chunks), bytes_max=bytes_max), []
        while line := await lines.next():
            found.append((lines.number, line))
        return found

    return asyncio.run(read_all())


@given(LINES, st.sampled_from([b"\n", b"\r\n"]), st.integers(1, 20))
def test_lines_and_their_numbers_do_not_depend_on_chunks(lines, end, chunk_bytes):
    body = end.join(lines)
    chunks = [body[at : at + chunk_bytes] for at in range(0, len(body), chunk_bytes)]
    wanted = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    assert [(number, line.strip()) for number, line in read(chunks)] == wanted


@pytest.mark.parametrize(
    ("chunks", "number"),
    [
        ([b"a" * 11], 1),
        ([b"a" * 11 + b"\n"], 1),
        ([b"a\n\n" + b"b" * 6, b"b" * 5], 3),
        ([b"b"] * 11, 1),
    ],
    ids=["without an end", "with an end", "after others", "bit by bit"],
)
def test_a_line_that_is_too_long_is_refused_as_soon_as_that_is_known(chunks, number):
    with pytest.raises(BodyTooLarge, match=f"Line {number} is longer than 10 bytes") as refused:
        read(chunks, bytes_max=10)
    assert refused.value.metadata == {"line": str(number)}


def test_a_line_may_be_as_long_as_the_bound_and_blanks_around_it_count_little():
    assert read([b" " * 50, b"a" * 10 + b"\n"], bytes_max=10) == [(1, b"a" * 10)]
