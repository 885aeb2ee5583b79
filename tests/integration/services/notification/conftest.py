import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiosmtpd.smtp import SMTP, Envelope, Session

from deploy.local import servers
from deploy.local.address import free_addresses
from shared.bus.jetstream import Bus, open_bus
from shared.db.port import Shards
from tests.databases import Places
from tests.fakes import ManualClock
from tests.mesh import running_program

MIGRATIONS = Path(__file__).parents[4] / "services/notification/migrations"


@dataclass
class Mailbox:
    """What a real SMTP server received, and how it is told to answer."""

    port: int = 0
    mails: list[Envelope] = field(default_factory=list)
    sessions: set[int] = field(default_factory=set)
    answers: dict[str, list[str]] = field(default_factory=dict)
    resets: int = 0

    def _answer(self, command: str, usual: str) -> str:
        queued = self.answers.get(command)
        return queued.pop(0) if queued else usual

    async def handle_RCPT(self, server, session, envelope, address, options):
        answer = self._answer("RCPT", "250 OK")
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_RSET(self, server, session, envelope):
        self.resets += 1
        return "250 OK"

    async def handle_DATA(self, server, session: Session, envelope: Envelope):
        answer = self._answer("DATA", "250 OK")
        if answer.startswith("250"):
            self.mails.append(envelope)
            self.sessions.add(id(session))
        return answer

    @property
    def contents(self) -> list[bytes]:
        return [bytes(mail.content or b"") for mail in self.mails]


@asynccontextmanager
async def serving_mail(mailbox: Mailbox, *, port: int = 0, **options) -> AsyncIterator[Mailbox]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(mailbox, loop=loop, enable_SMTPUTF8=False, **options),
        "127.0.0.1",
        port,
    )
    mailbox.port = server.sockets[0].getsockname()[1]
    try:
        yield mailbox
    finally:
        server.close()
        await server.wait_closed()


@pytest.fixture
async def mailbox() -> AsyncIterator[Mailbox]:
    async with serving_mail(Mailbox()) as box:
        yield box


@dataclass
class ScriptedMail:
    """A TCP server that speaks as much SMTP as it is told, then drops the connection."""

    port: int
    messages: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def dropping_mail(*, drop_at: str, hang: bool = False) -> AsyncIterator[ScriptedMail]:
    """Drop, or fall silent, at "greeting", "RCPT", "DATA" (before 354) or "end" (of the text)."""
    script = ScriptedMail(0)
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await _speak(reader, writer, script, drop_at)
            while hang and await reader.read(1024):
                pass
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    script.port = server.sockets[0].getsockname()[1]
    try:
        yield script
    finally:
        for writer in writers:
            writer.transport.abort()
        server.close()
        await server.wait_closed()


async def _speak(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, script: ScriptedMail, drop_at: str
) -> None:
    if drop_at == "greeting":
        return
    writer.write(b"220 here\r\n")
    while line := await reader.readline():
        verb = line.strip().upper()[:4].decode()
        if verb == drop_at:
            return
        if verb != "DATA":
            writer.write(b"221 bye\r\n" if verb == "QUIT" else b"250 OK\r\n")
            continue
        writer.write(b"354 go on\r\n")
        script.messages.append(await reader.readuntil(b"\r\n.\r\n"))
        if drop_at == "end":
            return
        writer.write(b"250 OK\r\n")


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def eventually() -> Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]:
    async def check(condition: Callable[[], Awaitable[bool]], *, within_s: float = 15) -> None:
        async with asyncio.timeout(within_s):
            while not await condition():  # noqa: ASYNC110 -- another process may act
                await asyncio.sleep(0.02)

    return check


@pytest.fixture
async def shards(places: Places, clock: ManualClock) -> AsyncIterator[Shards]:
    place = await places.make(MIGRATIONS, shard_count=2)
    async with place.open(clock=clock) as opened:
        yield opened


@pytest.fixture(scope="session")
def own_nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A nats-server of ours alone: these tests use, and delete, the real services' streams."""
    folder, [address] = tmp_path_factory.mktemp("nats"), free_addresses(1)
    token = servers.new_token()
    program = servers.nats_program(folder, address, token=token, environ=os.environ)
    with running_program(program, folder):
        yield servers.nats_url(address, token)


@pytest.fixture
async def bus(own_nats_url: str) -> AsyncIterator[Bus]:
    """A bus whose streams are empty."""
    async with open_bus(own_nats_url, name="notification-test") as opened:
        await forget_everything(opened)
        yield opened


async def forget_everything(bus: Bus) -> None:
    """What a broker without its disk would do."""
    for stream in await bus.jetstream.streams_info():
        await bus.jetstream.delete_stream(str(stream.config.name))
