"""What writers know of their writes: a file each, a line before a write and a line after it.

A line is in the file before anything is done about it. A write whose line after is missing, since
its writer was killed, is one of unknown outcome.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID


class Told(StrEnum):
    """What a line says of a write."""

    SENT = "sent"
    DONE = "done"
    REFUSED = "refused"
    """It has not happened."""
    UNKNOWN = "unknown"
    WRONG = "wrong"
    """What must not happen, has."""


class Journal:
    """One writer's; a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)  # a line, a write

    def note(self, told: Told, write_id: UUID, text: object = "") -> None:
        """Write a line."""
        self._file.write(f"{told} {write_id} {text}\n")

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class Books:
    """All journals of a run.

    Attributes:
        sent: every write that was begun.
        took_ms: how long those took that are done.
        wrong: lines of what must not happen.
    """

    sent: set[UUID] = field(default_factory=set)
    done: set[UUID] = field(default_factory=set)
    refused: set[UUID] = field(default_factory=set)
    took_ms: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def unknown(self) -> set[UUID]:
        """Writes that may have happened."""
        return self.sent - self.done - self.refused


def read_books(folder: Path) -> Books:
    """Every journal of a folder, as far as it is written now."""
    books = Books()
    for line in _lines(folder):
        told, text, rest = line.rstrip("\n").split(" ", 2)
        write_id = UUID(text)
        match Told(told):
            case Told.SENT:
                books.sent.add(write_id)
            case Told.DONE:
                books.done.add(write_id)
                books.took_ms.append(float(rest))
            case Told.REFUSED:
                books.refused.add(write_id)
            case Told.WRONG:
                books.wrong.append(line)
    return books


def _lines(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("journal-*")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield line
