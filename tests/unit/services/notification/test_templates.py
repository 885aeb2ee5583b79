import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.notification.templates import (
    BIDI_CONTROLS,
    PLACEHOLDER,
    TEMPLATES,
    UNPRINTABLE_CATEGORIES,
    VALUE_CHARS_MAX,
    duration_text,
    fill,
    printable,
    render,
)

VALUES = {"name": "Ada", "video": "a", "duration": "0:20", "failure": "b", "amount": "1"}


def test_a_notice_says_what_happened():
    text = render("video.ready", {"video": "holiday.mp4", "duration": "0:20"})
    assert text.title == "“holiday.mp4” is ready"
    assert text.body == "Your video “holiday.mp4” (0:20) can be played now."


@pytest.mark.parametrize("category", TEMPLATES)
def test_every_template_fills_every_placeholder(category):
    text = render(category, {**VALUES, "description": ""})
    assert not PLACEHOLDER.search(text.title + text.body)


@pytest.mark.parametrize(
    "value", ["{name}", "{0}", "{name.__class__}", "%s", "{{name}}", "$name", "{video!r:>9999999}"]
)
def test_template_syntax_in_a_value_is_shown_as_text(value):
    assert fill("“{video}” {name}", {"video": value, "name": "Ada"}) == f"“{value}” Ada"


def test_a_placeholder_reaches_no_attribute_index_or_format():
    text = "{name.__class__} {name[0]} {name!r} {name:>99} {} {0}"
    assert fill(text, VALUES) == text


def test_a_placeholder_without_a_value_is_a_bug_that_is_seen():
    with pytest.raises(KeyError):
        fill("{nobody}", VALUES)


@given(st.text(alphabet=st.characters(), max_size=300))
def test_no_value_breaks_a_line_or_turns_the_reading_direction(value):
    shown = printable(value)
    assert len(shown) <= VALUE_CHARS_MAX
    assert not BIDI_CONTROLS & set(shown)
    assert all(unicodedata.category(char) not in UNPRINTABLE_CATEGORIES for char in shown)
    assert len(shown.splitlines()) <= 1


@pytest.mark.parametrize(
    ("duration_s", "text"), [(0, "0:00"), (19.6, "0:20"), (83.2, "1:23"), (3725, "1:02:05")]
)
def test_a_length_is_written_as_people_read_it(duration_s, text):
    assert duration_text(duration_s) == text
