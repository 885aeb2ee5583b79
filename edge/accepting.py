"""A worker takes connections from the socket that it shares with others, in its turn."""

import asyncio
import errno
import socket
from collections.abc import Callable

from edge.board import Turn
from shared import log
from shared.listening import BACKLOG

# How long a worker that is ahead leaves a connection to the others; then it takes it itself,
# for they may be busy, or gone without anybody having noticed.
YIELD_S = 0.002
# The process has no descriptors left, or the system no memory: looked at again after this long.
EXHAUSTED_PAUSE_S = 0.1

_log = log.get_logger("edge")


class Acceptor:
    """Accepts until it is closed.

    Args:
        listener: bound, not blocking; shared with other processes.
        make: the protocol of a new connection.
        turn: ours among them.
    """

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[], asyncio.Protocol],
        turn: Turn,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._make = make
        self._turn = turn
        self._opening: set[asyncio.Task[object]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._count = 0
        self._is_closed = False
        listener.listen(BACKLOG)
        turn.hold(0)
        self._loop.add_reader(listener.fileno(), self._on_ready)

    def note_count(self, count: int) -> None:
        """So many connections are open."""
        self._count = count
        self._publish()

    def close(self) -> None:
        """Accept no more; what waits is for the other workers, or for the next one."""
        self._is_closed = True
        self._turn.leave()
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()  # the others, and the parent, have it open

    def _publish(self) -> None:
        if not self._is_closed:
            self._turn.hold(self._count + len(self._opening))

    def _on_ready(self) -> None:
        if self._turn.is_others():
            self._look_again(YIELD_S)
        else:
            self._accept()

    def _look_again(self, pause_s: float) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._pause = self._loop.call_later(pause_s, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener.fileno(), self._on_ready)
        self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another was faster, or it has left
            return
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                raise
            _log.warning("cannot accept", error=error.strerror)
            self._look_again(EXHAUSTED_PAUSE_S)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._open(connection))
        self._opening.add(task)
        self._publish()
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, connection)
        except OSError:  # it has left already
            connection.close()
