"""Files and folders of a backup: found, linked, copied with their SHA-256, made durable.

What a service removes while it is copied must not be missed: hard links in a folder of our own
beside the originals keep the bytes. They cost no space and no time, and only names are linked
while writers wait.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.errors import LaunchError

BLOCK_BYTES = 1024 * 1024
DATABASE_SUFFIX = ".sqlite"
# Written by a running mesh for itself, by SQLite beside a database, or by nobody's name yet.
SKIPPED_AT_TOP = frozenset({"logs", "valkey", "nats", "lock", "state.json"})
SKIPPED_SUFFIXES = ("-wal", "-shm", "-journal")
# A service's folder for what it has not made yet, and makes again.
SCRATCH = "work"
# A folder's time of change moves in steps of the kernel's clock tick.
TICK_NS = 100_000_000

# Another file system below the folder, one without hard links, or somebody else's file.
_CANNOT_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK})

Report = Callable[[int], None]


@dataclass
class _Seen:
    """A folder as it was scanned last."""

    changed_ns: int = -1
    scanned_ns: int = 0
    folders: list[str] = field(default_factory=list)


class Links:
    """Hard links to every file of a data folder but databases, and the databases' names.

    Args:
        root: the data folder.
        to: an empty folder on the same file system.

    Attributes:
        databases: relative paths.
        files: relative path -> where its bytes can be read.
    """

    def __init__(self, root: Path, to: Path) -> None:
        self._root = root
        self._to = to
        self._seen: dict[str, _Seen] = {}
        self.databases: set[str] = set()
        self.files: dict[str, Path] = {}

    def update(self) -> None:
        """Link what has come since the last time; quick when that was a moment ago.

        Raises:
            LaunchError: a symbolic link is among them, or a folder cannot be read.
        """
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            waiting += self._scan(folder)

    def _scan(self, folder: str) -> list[str]:
        seen = self._seen.setdefault(folder, _Seen())
        path = self._root / folder
        try:
            changed_ns = path.stat().st_mtime_ns
            if changed_ns == seen.changed_ns and changed_ns < seen.scanned_ns - TICK_NS:
                return seen.folders
            seen.changed_ns, seen.scanned_ns, seen.folders = changed_ns, time.time_ns(), []
            with os.scandir(path) as entries:
                for entry in entries:
                    self._take(folder, entry, seen)
        except FileNotFoundError:
            return []  # removed meanwhile
        except OSError as error:
            raise LaunchError(f"{path} cannot be read: {error.strerror}.") from error
        return seen.folders

    def _take(self, folder: str, entry: "os.DirEntry[str]", seen: _Seen) -> None:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if name in self.files or name in self.databases or is_skipped(name):
            return
        if entry.is_symlink():
            raise LaunchError(
                f"{entry.path} is a symbolic link: a backup would miss what is behind it. "
                "Put the files themselves there."
            )
        if entry.is_dir():
            seen.folders.append(name)
        elif entry.is_file() and name.endswith(DATABASE_SUFFIX):
            self.databases.add(name)
        elif entry.is_file():
            self._link(name)

    def _link(self, name: str) -> None:
        original, link = self._root / name, self._to / f"{len(self.files)}"
        try:
            os.link(original, link, follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            link = original  # read where it is; should it vanish until then, there is no backup
        self.files[name] = link


def is_skipped(name: str) -> bool:
    """Whether a relative path is no part of a backup, nor anything below it."""
    parts = name.split("/")
    is_scratch = len(parts) > 2 and parts[0] == "services" and parts[2] == SCRATCH
    is_unfinished = any(part.startswith(".") for part in parts)
    is_of_database = name.endswith(tuple(DATABASE_SUFFIX + suffix for suffix in SKIPPED_SUFFIXES))
    return parts[0] in SKIPPED_AT_TOP or is_scratch or is_unfinished or is_of_database


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A private folder that is gone after the block, unless it was renamed in it.

    Those of killed processes are removed first: a lock says which of them somebody still uses.
    """
    for left in parent.glob(f"{prefix}*"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left)
    path = parent / f"{prefix}{secrets.token_hex(4)}"
    path.mkdir(mode=0o700)
    try:
        with _locked(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def open_below(root: Path, name: str) -> int:
    """Open a file for reading that lies below a folder; no link on the way is followed.

    Raises:
        OSError: there is no such file, or it is something else.
    """
    *folders, last = name.split("/")
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        # Opening a pipe would wait for who writes it.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(last, flags, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", name)
    return descriptor


def copy(source: int, target: Path | None, report: Report) -> tuple[int, str]:
    """Copy what a descriptor holds into a new private file, durably; it closes the descriptor.

    Args:
        source: open for reading.
        target: there is none; None only reads.
        report: told how many bytes there were, since it was told last.

    Returns:
        How many bytes there were, and their SHA-256 as hex.
    """
    digest, size_bytes = hashlib.sha256(), 0
    with os.fdopen(source, "rb", buffering=0) as reading:
        writing = None if target is None else _new_file(target)
        try:
            while block := reading.read(BLOCK_BYTES):
                digest.update(block)
                if writing is not None:
                    _write(writing, block)
                size_bytes += len(block)
                report(len(block))
            if writing is not None:
                os.fsync(writing)
        finally:
            if writing is not None:
                os.close(writing)
    return size_bytes, digest.hexdigest()


def write_new(target: Path, content: bytes) -> None:
    """Write a new private file, durably."""
    descriptor = _new_file(target)
    try:
        _write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(root: Path) -> None:
    """Make every name below a folder durable, and its own."""
    for folder, _, _ in os.walk(root, topdown=False):
        sync(Path(folder))
    sync(root.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_file(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
