import email
import unicodedata
from dataclasses import replace
from datetime import UTC, datetime
from email import policy
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.notification.mail import (
    LOCAL_PART_CHARS_MAX,
    Letter,
    MailRefused,
    Sender,
    check_address,
    compose,
)
from services.notification.templates import UNPRINTABLE_CATEGORIES

DELIVERY = UUID("018f0000-0000-7abc-8000-000000000001")
SENDER = Sender("tenfold@example.com", "Tenfold")
LETTER = Letter(
    delivery_id=DELIVERY,
    address="ada@example.org",
    display_name="Ada",
    title="“holiday.mp4” is ready",
    body="Your video “holiday.mp4” can be played now.",
    subject="videos/018f0000-0000-7abc-8000-000000000002",
    sent_for=datetime(2026, 5, 1, 12, tzinfo=UTC),
)
HEADERS = [
    "From",
    "To",
    "Subject",
    "Date",
    "Message-ID",
    "Auto-Submitted",
    "Content-Type",
    "Content-Transfer-Encoding",
    "MIME-Version",
]
printable_text = st.text(
    alphabet=st.characters(exclude_categories=tuple(UNPRINTABLE_CATEGORIES)), max_size=120
)
atom = st.text("abcXYZ019!#$%&'*+/=?^_`{|}~-", min_size=1, max_size=30)
label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", fullmatch=True)
addresses = st.builds(
    lambda atoms, labels: ".".join(atoms) + "@" + ".".join(labels),
    st.lists(atom, min_size=1, max_size=2),
    st.lists(label, min_size=1, max_size=5),
)


def parsed(content: bytes) -> email.message.EmailMessage:
    return email.message_from_bytes(content, policy=policy.default)


def test_a_letter_says_who_what_and_which():
    message = parsed(compose(LETTER, SENDER))
    assert message["To"].addresses[0].addr_spec == "ada@example.org"
    assert message["From"] == "Tenfold <tenfold@example.com>"
    assert message["Subject"] == LETTER.title
    assert message["Message-ID"] == f"<{DELIVERY}@example.com>"
    assert message["Auto-Submitted"] == "auto-generated"
    assert LETTER.body in message.get_content()
    assert LETTER.subject in message.get_content()


def test_the_resource_can_be_found_in_the_raw_message():
    assert LETTER.subject.encode() in compose(LETTER, SENDER)


def test_the_same_letter_is_the_same_message_on_every_try():
    assert compose(LETTER, SENDER) == compose(LETTER, SENDER)


def test_a_nameless_recipient_is_greeted_too():
    content = parsed(compose(replace(LETTER, display_name="", subject=""), SENDER)).get_content()
    assert content.startswith("Hello there,")
    assert "About:" not in content


@given(title=printable_text, name=printable_text, body=printable_text)
@example(title="=?utf-8?q?a=0D=0ABcc=3A_eve=40example.com?=", name="=?utf-8?b?DQo=?=", body="\n.\n")
@example(title="a" * 300, name='"; <eve@example.com>, "', body="." * 2000)
@example(title="Subject: x", name="Eve <eve@example.com>,", body="{name}")
@example(title="é" * 400, name="é" * 100, body="é" * 2000)
def test_no_text_adds_a_header_or_a_recipient(title, name, body):
    raw = compose(replace(LETTER, title=title, display_name=name, body=body), SENDER)
    message = parsed(raw)
    assert message.keys() == HEADERS
    assert [entry.addr_spec for entry in message["To"].addresses] == ["ada@example.org"]
    assert raw.isascii()
    assert b"\0" not in raw
    lines = raw.split(b"\r\n")
    assert not any(b"\r" in line or b"\n" in line for line in lines)
    assert max(len(line) for line in lines) <= 998


@given(
    before=printable_text,
    char=st.characters(categories=tuple(UNPRINTABLE_CATEGORIES)),
    after=printable_text,
    field=st.sampled_from(["title", "display_name"]),
)
@example(before="a", char="\r", after="\nBcc: eve@example.com", field="title")
@example(before="a", char="\0", after="", field="display_name")
@example(before="a", char="\u2028", after="Bcc: eve@example.com", field="title")
def test_a_control_character_in_a_header_is_refused(before, char, after, field):
    assert unicodedata.category(char) in UNPRINTABLE_CATEGORIES
    with pytest.raises(MailRefused) as caught:
        compose(replace(LETTER, **{field: before + char + after}), SENDER)
    assert caught.value.reason == "HEADER_REFUSED"


@given(addresses, printable_text)
@example("a" * 64 + "@" + ".".join(["b" * 60] * 3), "x" * 100)
def test_a_valid_address_arrives_unchanged_in_its_header(address, name):
    if len(address) > 254 or len(address.partition("@")[0]) > LOCAL_PART_CHARS_MAX:
        return
    message = parsed(compose(replace(LETTER, address=address, display_name=name), SENDER))
    assert [entry.addr_spec for entry in message["To"].addresses] == [address]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ada",
        "@example.org",
        "ada@",
        "ada@example..org",
        "ada@-example.org",
        ".ada@example.org",
        "ada.@example.org",
        "a da@example.org",
        '"a da"@example.org',
        "ada@[127.0.0.1]",
        "ada@example.org>",
        "ada@example.org\r\nRCPT TO:<eve@example.com>",
        "ada@example.org\n",
        "ada\0@example.org",
        "ada@example.org,eve@example.com",
        "ada@example.org eve@example.com",
        "Ada <ada@example.org>",
        "ädä@example.org",
        "ada@exämple.org",
        "a" * 65 + "@example.org",
        "ada@" + ".".join(["a" * 60] * 5),
    ],
)
def test_an_address_that_is_not_plain_is_refused(address):
    with pytest.raises(MailRefused) as caught:
        check_address(address)
    assert caught.value.reason == "ADDRESS_INVALID"


@given(st.text(max_size=60))
def test_whatever_passes_as_an_address_has_no_white_space_and_one_at(text):
    try:
        check_address(text)
    except MailRefused:
        return
    assert text.isascii()
    assert text.count("@") == 1
    assert not any(char.isspace() or ord(char) < 33 for char in text)
