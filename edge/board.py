"""How many connections each worker holds, on a page of memory that all workers see.

With it they take connections from one listening socket in even parts. The system's own ways do
not: a shared socket gives most of them to whoever is awake, and SO_REUSEPORT deals them out by a
hash, with those that wait for a dead worker lost.
"""

import mmap
import os
import tempfile
from dataclasses import dataclass

# A worker that takes no connections now: it starts, drains, or is dead.
ABSENT = -1
WORKERS_MAX = 256
_CELL_BYTES = 4
# Below so many, and an eighth, worker and worker may differ: else each connection of a burst
# would wait for somebody's turn.
SLACK = 1


class Board:
    """One number per worker; each worker writes its own, the parent those of the dead.

    Args:
        descriptor: of the page, from `Board.make`, inherited by the workers.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._page = mmap.mmap(descriptor, WORKERS_MAX * _CELL_BYTES)
        self._counts = memoryview(self._page).cast("i")

    @classmethod
    def make(cls) -> "Board":
        """A board on which nobody is present."""
        with tempfile.TemporaryFile() as file:
            file.truncate(WORKERS_MAX * _CELL_BYTES)
            board = cls(os.dup(file.fileno()))
        for worker in range(WORKERS_MAX):
            board.write(worker, ABSENT)
        return board

    def write(self, worker: int, count: int) -> None:
        """Say how many connections a worker holds, or that it is ABSENT."""
        self._counts[worker] = count

    def count(self, worker: int) -> int:
        """What a worker has written."""
        return self._counts[worker]

    def counts(self) -> list[int]:
        """Those of the workers that are present."""
        return [count for count in self._counts if count != ABSENT]

    def close(self) -> None:
        """Let go of the page."""
        self._counts.release()
        self._page.close()
        os.close(self.descriptor)


@dataclass(frozen=True)
class Turn:
    """One worker's place on the board."""

    board: Board
    worker: int

    def hold(self, count: int) -> None:
        """We take connections, and hold so many."""
        self.board.write(self.worker, count)

    def leave(self) -> None:
        """We take no more."""
        self.board.write(self.worker, ABSENT)

    def is_others(self) -> bool:
        """Whether another worker should take the next connection."""
        least = min(self.board.counts(), default=0)
        return self.board.count(self.worker) > least + SLACK + least // 8
