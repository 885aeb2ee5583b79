"""One moment over many SQLite files, while other processes go on writing them.

Files in WAL mode have no common snapshot, and ATTACH gives none. So for one moment every file's
write lock is held; within it a read transaction is pinned on each, and then the locks go. What
the pinned connections show from there on is the state in which no transaction was under way
anywhere: whatever one file acknowledged because of another is in both.

The lock of a busy file is had by trying again and again, and those that are held already keep
their writers waiting meanwhile. Whoever keeps us waiting therefore comes first in the next try,
where waiting costs nobody anything.

    with open_cut(paths, inside=link_files) as cut:
        for file in cut.files:
            file.copy_to(target, report)

Only sqlite3 may open such a file here: closing any other descriptor of it would drop this
process's locks (fcntl(2)).
"""

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shared.db.errors import DatabaseDamaged, DatabaseRefused
from shared.db.migrate import sqlite_file

# No writer waits longer for a cut; it is given up and tried again after a pause.
HELD_S_MAX = 2.0
# How long the first file of a try may be waited for: nobody else waits meanwhile.
FIRST_S_MAX = 5.0
TRIES_MAX = 10
PAUSE_S = (0.2, 0.6)
# Between two of a service's transactions the lock is free for some 0.1 ms.
POLL_S = (0.00002, 0.0002)
# Pages of one step of a copy: a megabyte, so that Ctrl-C and progress need not wait.
STEP_PAGES = 256
# Opening a file whose last writer was killed waits for whoever recovers it.
OPEN_S_MAX = 1.0


class PinnedFile:
    """One database file: its write lock for a moment, then its state of that moment.

    Args:
        path: is there, and stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._snapshot = _connect(path)
        self._lock = _connect(path)
        self._lock.execute("PRAGMA busy_timeout = 0")

    def try_lock(self) -> bool:
        """Keep every writer out, if none is in."""
        try:
            self._lock.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            return False
        return True

    def unlock(self) -> None:
        """Let writers in again."""
        if self._lock.in_transaction:
            self._lock.execute("ROLLBACK")

    def pin(self) -> None:
        """Keep what the file holds now readable; writers go on."""
        self._snapshot.execute("BEGIN")
        # BEGIN alone reads nothing, and so pins nothing.
        self._snapshot.execute("SELECT count(*) FROM sqlite_schema").fetchone()

    @property
    def size_bytes(self) -> int:
        """How large a copy is."""
        [pages] = self._snapshot.execute("PRAGMA page_count").fetchone()
        [page_bytes] = self._snapshot.execute("PRAGMA page_size").fetchone()
        return int(pages * page_bytes)

    def copy_to(self, target: Path, report: Callable[[int], None]) -> None:
        """Write the pinned state as one sound file without a log beside it, and let it go.

        Args:
            target: there is none.
            report: told how many bytes were copied, since it was told last.

        Raises:
            DatabaseDamaged: the copy is not sound, so the original is not.
            sqlite3.Error, OSError: it cannot be written.
        """
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with closing(sqlite3.connect(target, isolation_level=None)) as copy:
            # Whoever is interrupted throws the copy away.
            copy.execute("PRAGMA journal_mode = OFF")
            copy.execute("PRAGMA synchronous = OFF")
            [page_bytes] = self._snapshot.execute("PRAGMA page_size").fetchone()
            copied = 0

            def progress(_: int, remaining: int, total: int) -> None:
                nonlocal copied
                report((total - remaining - copied) * page_bytes)
                copied = total - remaining

            self._snapshot.backup(copy, pages=STEP_PAGES, progress=progress)
        self.close()  # a pinned state keeps the log of the file from being used again
        try:
            with sqlite_file(target) as copy:
                copy.execute("PRAGMA journal_mode = DELETE")
        except DatabaseDamaged as error:
            raise DatabaseDamaged(f"{self.path} is damaged, and so would its copy be") from error

    def close(self) -> None:
        """Let go of everything; safe to repeat."""
        self._lock.close()
        self._snapshot.close()


@dataclass(frozen=True)
class Cut:
    """Many files at one moment.

    Attributes:
        files: as they were asked for.
        at_us: the moment.
        held_s: how long writers were kept waiting in the try that succeeded.
        tries: how many it took.
    """

    files: Sequence[PinnedFile]
    at_us: int
    held_s: float
    tries: int


@contextmanager
def open_cut(
    paths: Sequence[Path],
    *,
    inside: Callable[[], None],
    waiting: Callable[[Path], None] = lambda busy: None,
) -> Iterator[Cut]:
    """Pin the state of all files at one moment; they are let go with the block. Blocking.

    Args:
        paths: database files in WAL mode.
        inside: called while nobody can write; it must be quick.
        waiting: told which file a try was given up for.

    Raises:
        DatabaseRefused: a file cannot be opened, or is kept busy for too long.
    """
    with ExitStack() as stack:
        files = []
        for path in paths:
            try:
                file = PinnedFile(path)
            except sqlite3.Error as error:
                raise DatabaseRefused(f"cannot open {path}: {error}") from error
            stack.callback(file.close)
            files.append(file)
        yield _cut(files, inside, waiting)


def _cut(
    files: Sequence[PinnedFile], inside: Callable[[], None], waiting: Callable[[Path], None]
) -> Cut:
    order = list(files)
    for tries in range(1, TRIES_MAX + 1):
        try:
            busy, began_s = _lock_all(order)
            if busy is None:
                at_us = time.time_ns() // 1000
                for file in files:
                    file.pin()
                inside()
        except sqlite3.Error as error:
            raise DatabaseRefused(f"the databases cannot be read: {error}") from error
        finally:
            for file in files:
                with suppress(sqlite3.Error):
                    file.unlock()
        if busy is None:
            return Cut(files, at_us, time.monotonic() - began_s, tries)
        order.remove(busy)
        order.insert(0, busy)
        waiting(busy.path)
        time.sleep(random.uniform(*PAUSE_S))  # noqa: S311 - jitter, no secret
    raise DatabaseRefused(
        f"{order[0].path} was being written all the time: no moment without a writer was found "
        f"in {TRIES_MAX} tries of {HELD_S_MAX:g} s. Try again when the mesh is less busy"
    )


def _lock_all(order: Sequence[PinnedFile]) -> tuple[PinnedFile | None, float]:
    """Take every lock; whoever could not be had in time, or None, and when holding began."""
    began_s = time.monotonic()
    for position, file in enumerate(order):
        deadline_s = began_s + (HELD_S_MAX if position else FIRST_S_MAX)
        while not file.try_lock():
            if time.monotonic() > deadline_s:
                return file, began_s
            time.sleep(random.uniform(*POLL_S))  # noqa: S311
        if position == 0:
            began_s = time.monotonic()
    return None, began_s


def _connect(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=OPEN_S_MAX)
    try:
        # Reads the schema now rather than while writers wait.
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection
