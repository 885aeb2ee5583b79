"""A mail server for one machine: accepts everything, delivers it into a folder.

    python -m deploy.local.mail_sink HOST:PORT FOLDER

Each message becomes one .eml file, named by its moment of arrival, so that sorting by
name is sorting by time. It is what notifications talk to until a real server is set.
"""

import asyncio
import itertools
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

from aiosmtpd.smtp import SMTP, Envelope, Session

from deploy.local.address import Address

MESSAGE_BYTES_MAX = 10 * 1024 * 1024


class MailFolder:
    """Writes what arrives; the names are aiosmtpd's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        """Answer 250 only when the message is safe on disk (RFC 5321 section 4.2.5)."""
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        name = f"{moment}-{os.getpid()}-{next(self._numbers)}.eml"
        await asyncio.to_thread(deliver, self._folder / name, envelope)
        return "250 Message accepted for delivery"


def deliver(path: Path, envelope: Envelope) -> None:
    """Write one message whole: a reader of the folder never sees a part of it."""
    recipients = ", ".join(envelope.rcpt_tos)
    head = f"X-Envelope-From: {envelope.mail_from}\r\nX-Envelope-To: {recipients}\r\n"
    content = envelope.content if isinstance(envelope.content, bytes) else b""
    scratch = path.with_suffix(".part")
    with scratch.open("wb") as file:
        file.write(head.encode() + content)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)


async def serve(address: Address, folder: Path) -> None:
    """Accept mail until SIGTERM."""
    loop = asyncio.get_running_loop()
    mail_folder, stopped = MailFolder(folder), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = await loop.create_server(
        lambda: SMTP(
            mail_folder, data_size_limit=MESSAGE_BYTES_MAX, enable_SMTPUTF8=True, loop=loop
        ),
        address.host,
        address.port,
    )
    await stopped.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(
        serve(Address.parse(sys.argv[1], setting="the mail sink's address"), Path(sys.argv[2]))
    )
