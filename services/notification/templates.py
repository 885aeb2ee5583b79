"""What notices say: texts as data, filled in with plain values.

A placeholder is `{word}` and nothing else: no attributes, indexes, formats or calls.
Values are put in once and never read again, so braces in a file name stay text. What
could break a line, a header or the reading direction is taken out of every value.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
VALUE_CHARS_MAX = 200
# Line and paragraph separators, controls, lone surrogates: what a header or a line cannot hold.
UNPRINTABLE_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Marks that turn the reading direction, and so can make a text read as another (UAX #9).
BIDI_CONTROLS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


@dataclass(frozen=True)
class Template:
    """One category of notice.

    Attributes:
        title: one line; also the e-mail's subject.
        body: a sentence or two.
        email: whether it also goes out by e-mail.
    """

    title: str
    body: str
    email: bool


@dataclass(frozen=True)
class Text:
    """A template, filled in."""

    title: str
    body: str


USER_WELCOME = "user.welcome"
VIDEO_READY = "video.ready"
VIDEO_FAILED = "video.failed"
TRANSFER_RECEIVED = "transfer.received"

TEMPLATES: Mapping[str, Template] = {
    USER_WELCOME: Template(
        title="Welcome, {name}",
        body="Your account is ready. What happens with your videos and your money is told here.",
        email=False,
    ),
    VIDEO_READY: Template(
        title="“{video}” is ready",
        body="Your video “{video}” ({duration}) can be played now.",
        email=True,
    ),
    VIDEO_FAILED: Template(
        title="“{video}” could not be prepared",
        body="Your video “{video}” cannot be played. {failure}",
        email=True,
    ),
    TRANSFER_RECEIVED: Template(
        title="You received {amount}",
        body="{amount} arrived in your account. {description}",
        email=False,
    ),
}


def render(category: str, values: Mapping[str, str]) -> Text:
    """Fill in a category's template.

    Raises:
        KeyError: no such category, or a placeholder without a value: a bug.
    """
    template = TEMPLATES[category]
    return Text(fill(template.title, values), fill(template.body, values).strip())


def fill(text: str, values: Mapping[str, str]) -> str:
    """Put each value, made printable and short, in its placeholder's place."""
    return PLACEHOLDER.sub(lambda found: printable(values[found.group(1)]), text)


def printable(value: str, chars_max: int = VALUE_CHARS_MAX) -> str:
    """The value on one line, without controls, at most chars_max characters."""
    kept = "".join(
        " " if unicodedata.category(char) in UNPRINTABLE_CATEGORIES else char
        for char in value
        if char not in BIDI_CONTROLS
    )
    return kept if len(kept) <= chars_max else kept[: chars_max - 1] + "…"


def duration_text(duration_s: float) -> str:
    """A length as people read it: 83.2 is "1:23", 3725 is "1:02:05"."""
    minutes, seconds = divmod(max(0, round(duration_s)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
