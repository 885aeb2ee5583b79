"""One program of the mesh: how it is started, when it is ready, how long it may take to stop."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from deploy.local.address import Address

PROBE_TIMEOUT_S = 2.0
ANSWER_BYTES_MAX = 4096

Probe = Callable[[], Awaitable[bool]]
Successor = Callable[[], Awaitable["Program"]]


@dataclass(frozen=True)
class Program:
    """What the supervisor needs to know about a child.

    Attributes:
        name: its name in messages, state.json and logs/<name>.log.
        argv: the program's full path and its arguments; no secret belongs here.
        environment: every variable it gets.
        address: where it listens, for the operator.
        is_ready: asked again and again until it says so.
        stop_rank: the lowest is stopped first; equals stop together.
        stop_timeout_s: after stop_signal, until SIGKILL.
        stop_signal: asks it to stop.
        user: who it runs as: "-" for who we are, or "UID:GID" (child.py).
        successor: asked after its death, for as long as it takes: what is started in its place.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    address: Address
    is_ready: Probe
    stop_rank: int = 0
    stop_timeout_s: float = 5.0
    stop_signal: signal.Signals = signal.SIGTERM
    user: str = "-"
    successor: Successor | None = None


def answers(address: Address, *, send: bytes = b"", expect: bytes) -> Probe:
    """A probe: who listens there answers `send` (b"": greets us) with `expect` somewhere in it."""

    async def probe() -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return expect in await _ask(address, send, expect)
        except (OSError, TimeoutError):
            return False

    return probe


def answers_http_ok(address: Address, path: str) -> Probe:
    """A probe: GET path answers 200."""
    host = "127.0.0.1" if address.host == "0.0.0.0" else address.host  # noqa: S104 - a comparison
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode()
    return answers(Address(host, address.port), send=request, expect=b"HTTP/1.1 200 ")


def accepts(address: Address) -> Probe:
    """A probe: a TCP connection is accepted."""

    async def probe() -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                _, writer = await asyncio.open_connection(address.host, address.port)
                await _close(writer)
        except (OSError, TimeoutError):
            return False
        return True

    return probe


def speaks(address: Address, *, send: bytes) -> Probe:
    """A probe: who listens there answers `send` with anything at all, a refusal too."""

    async def probe() -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                try:
                    writer.write(send)
                    return bool(await reader.read(1))
                finally:
                    await _close(writer)
        except (OSError, TimeoutError):
            return False

    return probe


async def _ask(address: Address, send: bytes, expect: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(send)
        await writer.drain()
        answer = b""
        while expect not in answer and len(answer) < ANSWER_BYTES_MAX:
            part = await reader.read(ANSWER_BYTES_MAX)
            if not part:
                break
            answer += part
        return answer
    finally:
        await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
