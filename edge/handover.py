"""What a worker is given by the process that started it, and how the two talk.

Over a pair of sockets: the parent writes single bytes, the worker answers in frames. Its end tells
each of them that the other one is gone, however it went.
"""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

from edge.board import Board, Turn
from shared.telemetry.scrapes import Render

TELL_METRICS = b"m"
SERVING, METRICS = b"s", b"m"
_FRAME = struct.Struct("!cI")
FRAME_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True)
class Handover:
    """A worker's part of what its parent holds.

    Attributes:
        turn: which worker it is, and what the others hold.
        listener: the socket that all workers share; bound, and not yet listening.
        control: to the parent.
        others_serve: whether it may take its time until it is ready.
    """

    turn: Turn
    listener: socket.socket
    control: socket.socket
    others_serve: bool

    @classmethod
    def of_arguments(cls, arguments: Sequence[str]) -> Self | None:
        """From a worker's command line, as `arguments` makes it; None for no worker's."""
        if not arguments:
            return None
        worker, others_serve, listener, control, board = map(int, arguments)
        return cls(
            Turn(Board(board), worker),
            socket.socket(fileno=listener),
            socket.socket(fileno=control),
            bool(others_serve),
        )


class Parent:
    """The process that started this worker, as the worker sees it: see `talking`."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def say_serving(self, where: Mapping[str, Any]) -> None:
        """Connections are taken from now on."""
        self._say(SERVING, json.dumps(where).encode())

    async def listen(self, reader: asyncio.StreamReader, render: Render) -> None:
        """Answer what it asks, until it is gone."""
        with suppress(ConnectionError):
            while asked := await reader.read(1):
                if asked == TELL_METRICS:
                    self._say(METRICS, await render())
                    await self._writer.drain()

    def _say(self, kind: bytes, payload: bytes) -> None:
        self._writer.write(_FRAME.pack(kind, len(payload)) + payload)


@asynccontextmanager
async def talking(
    control: socket.socket, render: Render, *, on_gone: Callable[[], None]
) -> AsyncIterator[Parent]:
    """Answer the parent while open.

    Args:
        control: the worker's end.
        render: makes the text of its metrics.
        on_gone: called when the parent has ended, however it did.
    """
    reader, writer = await asyncio.open_unix_connection(sock=control)
    parent = Parent(writer)

    async def listen() -> None:
        await parent.listen(reader, render)
        on_gone()

    listening = asyncio.create_task(listen())
    try:
        yield parent
    finally:
        listening.cancel()
        await asyncio.wait([listening])
        writer.close()


def arguments_of(worker: int, *descriptors: int, others_serve: bool) -> list[str]:
    """What `Handover.of_arguments` reads: listener, control and board, inherited."""
    return [str(int(number)) for number in (worker, others_serve, *descriptors)]


async def read_frame(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The next message of a worker: its kind and what it holds.

    Raises:
        asyncio.IncompleteReadError: the worker is gone.
    """
    kind, size = _FRAME.unpack(await reader.readexactly(_FRAME.size))
    assert size <= FRAME_BYTES_MAX
    return kind, await reader.readexactly(size)
