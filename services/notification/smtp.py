"""Hands messages to a mail server over SMTP (RFC 5321), one connection per batch.

A connection has one owner and every step a time limit. What matters is where a
connection ends: before the message is handed over nothing has happened and the try may
be repeated; after it the message may have arrived, and only the server knows (K25).
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol
from urllib.parse import unquote, urlsplit

from aiosmtplib import SMTP, SMTPException, SMTPResponseException
from aiosmtplib.response import SMTPResponse

from services.notification.domain import Outcome, Reply

LINE_START_DOT = re.compile(rb"(?m)^\.")
START_INPUT = 354
SERVICE_CLOSING = 421
QUIT_TIMEOUT_S = 2.0
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
DEFAULT_PORTS = {"smtp": 25, "smtps": 465}


class TlsPolicy(StrEnum):
    """Whether the connection is encrypted.

    REQUIRED: STARTTLS with a verified certificate, or nothing is sent. OPPORTUNISTIC:
    encrypted if the server offers it, its certificate unverified. NONE: plain, for a
    server on the same machine. IMPLICIT: TLS from the first byte (smtps).
    """

    REQUIRED = "required"
    OPPORTUNISTIC = "opportunistic"
    NONE = "none"
    IMPLICIT = "implicit"


@dataclass(frozen=True)
class MailServer:
    """Where mail goes, read from a URL.

    smtp://[user:password@]host[:port][?tls=required|opportunistic|none] or smtps://…;
    without `tls`, a loopback host is plain and any other requires TLS.
    """

    host: str
    port: int
    tls: TlsPolicy
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""

    @classmethod
    def parse(cls, url: str, *, ca_file: str = "") -> "MailServer":
        """Read the URL.

        Args:
            url: as above.
            ca_file: PEM file of the authorities to trust; "" for the system's.

        Raises:
            ValueError: it is not such a URL, or a password would travel unencrypted.
        """
        parts = urlsplit(url)
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError("must look like smtp://host:port?tls=required")
        tls = _tls_policy(parts.scheme, parts.query, parts.hostname)
        username, password = unquote(parts.username or ""), unquote(parts.password or "")
        if username and tls not in (TlsPolicy.REQUIRED, TlsPolicy.IMPLICIT):
            raise ValueError("a password is only sent over TLS: use smtps:// or ?tls=required")
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        return cls(parts.hostname, port, tls, username, password, ca_file)


def _tls_policy(scheme: str, query: str, host: str) -> TlsPolicy:
    name, _, value = query.partition("=")
    if scheme == "smtps":
        if query:
            raise ValueError("smtps:// takes no ?tls: it is always encrypted")
        return TlsPolicy.IMPLICIT
    if not query:
        return TlsPolicy.NONE if host in LOOPBACK_HOSTS else TlsPolicy.REQUIRED
    if name != "tls" or value not in ("required", "opportunistic", "none"):
        raise ValueError("tls must be required, opportunistic or none")
    return TlsPolicy(value)


class MailServerUnavailable(Exception):
    """No message can be handed over now: no connection, no TLS, or a log-in refused."""


class MailConnection(Protocol):
    """One connection to a mail server, ready for one message after the other."""

    async def prepare(self) -> None:
        """Make sure that the next message starts clean on a connection that lives.

        Raises:
            MailServerUnavailable: it does not; nothing has been handed over.
        """
        ...

    async def send(self, sender: str, recipient: str, message: bytes) -> Outcome:
        """Hand over one message; every way this can end is an Outcome."""
        ...


class SmtpConnection:
    """See MailConnection. On aiosmtplib; belongs to one task."""

    def __init__(self, client: SMTP, *, reply_timeout_s: float) -> None:
        self._client = client
        self._reply_timeout_s = reply_timeout_s

    async def prepare(self) -> None:
        """See MailConnection.prepare."""
        try:
            async with asyncio.timeout(self._reply_timeout_s):
                await self._client.rset()
        except (SMTPException, OSError) as error:
            raise MailServerUnavailable(_text_of(error)) from error

    async def send(self, sender: str, recipient: str, message: bytes) -> Outcome:
        """See MailConnection.send."""
        try:
            await self._announce(sender, recipient)
        except SMTPResponseException as error:
            return outcome_of_code(error.code, error.message)
        except (SMTPException, OSError) as error:
            self._client.close()
            return Outcome(Reply.DEFERRED, _text_of(error))
        try:
            reply = await self._hand_over(message)
        except (SMTPException, OSError) as error:
            return Outcome(Reply.LOST, _text_of(error))
        return outcome_of_code(reply.code, reply.message)

    async def _announce(self, sender: str, recipient: str) -> None:
        """MAIL, RCPT, DATA up to 354: until here nothing has been handed over."""
        async with asyncio.timeout(3 * self._reply_timeout_s):
            await self._client.mail(sender)
            await self._client.rcpt(recipient)
            reply = await self._client.execute_command(b"DATA")
        if reply.code != START_INPUT:
            raise SMTPResponseException(reply.code, reply.message)

    async def _hand_over(self, message: bytes) -> SMTPResponse:
        """The text and its final dot. aiosmtplib's data() would hide which side of 354 failed."""
        protocol = self._client.protocol
        if protocol is None:
            raise ConnectionError("the connection was lost")
        protocol.write(LINE_START_DOT.sub(b"..", message) + b".\r\n")
        try:
            return await protocol.read_response(timeout=self._reply_timeout_s)
        except BaseException:
            # A late reply must not be taken for the next message's.
            self._client.close()
            raise


@asynccontextmanager
async def open_smtp(
    server: MailServer, *, local_name: str, connect_timeout_s: float, reply_timeout_s: float
) -> AsyncIterator[SmtpConnection]:
    """Connect, encrypt as the policy says, log in if there is a user; quit at the end.

    Args:
        server: where to.
        local_name: how we introduce ourselves (EHLO).
        connect_timeout_s: for everything before the first message.
        reply_timeout_s: for each answer after that.

    Raises:
        MailServerUnavailable: any of these failed within its time.
    """
    client = _client(server, local_name, reply_timeout_s)
    try:
        try:
            async with asyncio.timeout(connect_timeout_s):
                await client.connect()
        # ValueError: a certificate or name that the TLS layer cannot even read.
        except (SMTPException, OSError, ValueError) as error:
            raise MailServerUnavailable(_text_of(error)) from error
        yield SmtpConnection(client, reply_timeout_s=reply_timeout_s)
        with suppress(SMTPException, OSError):
            async with asyncio.timeout(QUIT_TIMEOUT_S):
                await client.quit()
    finally:
        client.close()


def _client(server: MailServer, local_name: str, reply_timeout_s: float) -> SMTP:
    is_verified = server.tls in (TlsPolicy.REQUIRED, TlsPolicy.IMPLICIT)
    start_tls = {TlsPolicy.REQUIRED: True, TlsPolicy.OPPORTUNISTIC: None}.get(server.tls, False)
    return SMTP(
        hostname=server.host,
        port=server.port,
        username=server.username or None,
        password=server.password or None,
        local_hostname=local_name,
        timeout=reply_timeout_s,
        use_tls=server.tls is TlsPolicy.IMPLICIT,
        start_tls=start_tls,
        validate_certs=is_verified,
        tls_context=(
            ssl.create_default_context(cafile=server.ca_file or None) if is_verified else None
        ),
    )


def outcome_of_code(code: int, message: str) -> Outcome:
    """What a reply code means: 2xx accepted, 5xx never, anything else not now."""
    if 200 <= code < 300:
        return Outcome(Reply.ACCEPTED)
    text = " ".join(f"{code} {message}".split())
    return Outcome(Reply.REFUSED if 500 <= code < 600 else Reply.DEFERRED, text)


def _text_of(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
