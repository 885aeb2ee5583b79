import base64
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.db.ids import new_id
from shared.db.paging import (
    PAGE_SIZE_DEFAULT,
    PAGE_SIZE_MAX,
    PageScope,
    open_page_token,
    page_size_of,
    seal_page_token,
)
from shared.errors import InvalidRequest
from shared.identity import Principal, PrincipalKind

SECRET = b"s" * 32
SCOPE = PageScope("/a.B/List", "default", "me", ("parent", "filter"))
positions = st.lists(st.text() | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4)


@given(positions)
def test_a_token_gives_its_position_back(position):
    assert open_page_token(SECRET, SCOPE, seal_page_token(SECRET, SCOPE, *position)) == position


def test_a_uuid_comes_back_as_its_text():
    position = new_id(1)
    [text] = open_page_token(SECRET, SCOPE, seal_page_token(SECRET, SCOPE, position))
    assert UUID(text) == position


def test_no_token_means_the_first_page():
    assert open_page_token(SECRET, SCOPE, "") == ()


@pytest.mark.parametrize(
    "other",
    [
        PageScope("/a.B/Other", "default", "me", ("parent", "filter")),
        PageScope("/a.B/List", "other", "me", ("parent", "filter")),
        PageScope("/a.B/List", "default", "you", ("parent", "filter")),
        PageScope("/a.B/List", "default", "me", ("parent", "changed")),
        PageScope("/a.B/List", "default", "me", ("parentfilter",)),
    ],
    ids=["method", "tenant", "owner", "filter", "joined"],
)
def test_a_token_is_refused_where_anything_of_its_scope_differs(other):
    token = seal_page_token(SECRET, SCOPE, 5)
    with pytest.raises(InvalidRequest) as caught:
        open_page_token(SECRET, other, token)
    assert caught.value.violations[0].field == "page_token"


@given(st.data())
def test_a_token_with_any_changed_bit_is_refused(data):
    token = seal_page_token(SECRET, SCOPE, "position", 7)
    content = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    forged = base64.urlsafe_b64encode(content).rstrip(b"=").decode()
    with pytest.raises(InvalidRequest):
        open_page_token(SECRET, SCOPE, forged)


@given(st.text(max_size=200).filter(bool))
def test_any_text_is_refused_and_never_crashes(text):
    with pytest.raises(InvalidRequest):
        open_page_token(SECRET, SCOPE, text)


def test_an_operators_list_has_no_owner():
    admin = Principal(PrincipalKind.ADMIN, str(new_id(1)))
    assert PageScope.of("/a.B/List", admin).owner == ""


@pytest.mark.parametrize(
    ("asked", "used"),
    [(0, PAGE_SIZE_DEFAULT), (1, 1), (1000, 1000), (10**9, PAGE_SIZE_MAX)],
)
def test_a_page_size_is_kept_within_its_limits(asked, used):
    assert page_size_of(asked) == used


def test_a_negative_page_size_is_refused():
    with pytest.raises(InvalidRequest):
        page_size_of(-1)
