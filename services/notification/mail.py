"""E-mail, composed: a message whose headers nobody else can write.

Names, titles and file names come from strangers. A character that could end a header
(CR, LF, NUL and every other control or line separator, RFC 5322 §2.2) is refused here,
whatever was cleaned before; an address must be a plain dot-atom, since it also goes
into the SMTP envelope.
"""

import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from uuid import UUID

from services.notification.templates import UNPRINTABLE_CATEGORIES, printable

ADDRESS_CHARS_MAX = 254  # RFC 5321 §4.5.3.1.3, less the angle brackets
LOCAL_PART_CHARS_MAX = 64
DISPLAY_NAME_CHARS_MAX = 100
TITLE_CHARS_MAX = 400
BODY_CHARS_MAX = 2000
LINE_CHARS_MAX = 78  # RFC 5322 §2.1.1

ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# A dot-atom and a host name: no quotes, comments, literals or controls.
ADDRESS = re.compile(rf"({ATOM}(?:\.{ATOM})*)@({LABEL}(?:\.{LABEL})*)")


class MailRefused(ValueError):
    """A part that must not be put into a header or an envelope; reason says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Letter:
    """What one e-mail is made of.

    Attributes:
        delivery_id: names the message: the same on every try.
        sent_for: when the notice arose; the Date header, the same on every try.
    """

    delivery_id: UUID
    address: str
    display_name: str
    title: str
    body: str
    subject: str
    sent_for: datetime


@dataclass(frozen=True)
class Sender:
    """Who the mail is from."""

    address: str
    display_name: str

    @property
    def domain(self) -> str:
        """The part of the address after the @; message ids end with it."""
        return self.address.rpartition("@")[2]


def check_address(address: str) -> str:
    """The address, if it may go into a header and an envelope.

    Raises:
        MailRefused: ADDRESS_INVALID.
    """
    found = ADDRESS.fullmatch(address)
    is_short = len(address) <= ADDRESS_CHARS_MAX
    if found is None or not is_short or len(found.group(1)) > LOCAL_PART_CHARS_MAX:
        raise MailRefused("ADDRESS_INVALID")
    return address


def message_id(delivery_id: UUID, sender: Sender) -> str:
    """The Message-ID: a receiver that sees a delivery twice can tell."""
    return f"<{delivery_id}@{sender.domain}>"


def compose(letter: Letter, sender: Sender) -> bytes:
    """The message as it goes over the wire: CRLF lines, ASCII, folded where a line can be.

    The same letter gives the same bytes, so a repeated try repeats the message.

    Raises:
        MailRefused: an address is invalid, or a header would hold a control character.
    """
    message = EmailMessage(policy=SMTP)
    message["From"] = _mailbox(sender.display_name, sender.address)
    message["To"] = _mailbox(letter.display_name, letter.address)
    message["Subject"] = header_text(letter.title, TITLE_CHARS_MAX)
    message["Date"] = format_datetime(letter.sent_for)
    message["Message-ID"] = message_id(letter.delivery_id, sender)
    # RFC 3834: no vacation notices back, please.
    message["Auto-Submitted"] = "auto-generated"
    body = _body(letter, sender)
    is_plain = body.isascii() and all(len(line) <= LINE_CHARS_MAX for line in body.splitlines())
    message.set_content(body, cte="7bit" if is_plain else "quoted-printable")
    return message.as_bytes()


def _mailbox(display_name: str, address: str) -> Address:
    local, _, domain = check_address(address).rpartition("@")
    return Address(header_text(display_name, DISPLAY_NAME_CHARS_MAX), local, domain)


def header_text(text: str, chars_max: int) -> str:
    """Text that a header may hold.

    Raises:
        MailRefused: HEADER_REFUSED, for any control character or line separator.
    """
    if any(unicodedata.category(char) in UNPRINTABLE_CATEGORIES for char in text):
        raise MailRefused("HEADER_REFUSED")
    # The header parser would read "=?utf-8?q?=0D=0A?=" as the line break it encodes.
    return text[:chars_max].replace("=?", "= ?")


def _body(letter: Letter, sender: Sender) -> str:
    lines = [
        f"Hello {printable(letter.display_name) or 'there'},",
        printable(letter.body, BODY_CHARS_MAX),
        f"About: {printable(letter.subject)}" if letter.subject else "",
        f"-- \nSent by {printable(sender.display_name) or sender.domain}.\n",
    ]
    return "\n\n".join(line for line in lines if line)
