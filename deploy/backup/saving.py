"""Makes a backup of a data folder, of one moment, whether its mesh runs or not.

In order: link every file beside its original; note what only the broker knows; for one moment
keep all writers of all databases out, pin what each holds, and link what has come since; let the
writers go on; copy the pinned databases, the links, and the events that consumers had not
finished. A service removes a file only after it has committed that it is of no use any more, so
every file that the databases know of is among the links.

The manifest is written last, into a folder of another name; that is renamed when all of it is on
disk. Whoever is stopped, or killed, leaves nothing that looks like a backup.
"""

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deploy.backup import tree
from deploy.backup.bus import Broker
from deploy.backup.manifest import (
    BUS_FILE,
    DATA_FOLDER,
    MANIFEST_FILE,
    Applied,
    BackedUpFile,
    Manifest,
)
from deploy.backup.sizes import mebibytes
from deploy.local.data_folder import (
    LOCK_FILE,
    SHAPE_FILE,
    DataFolder,
    launcher_of,
    open_data_folder,
)
from deploy.local.errors import LaunchError
from shared.db.errors import DatabaseRefused
from shared.db.migrate import SELECT_APPLIED
from shared.db.sqlite_cut import Cut, open_cut

CONTROL_FILE = "control.sqlite"
LINKS_PREFIX = ".backup-"
# Beside what will be copied: manifest, folders, what the data grows by meanwhile.
SPARE_BYTES = 4 * 1024 * 1024


class Progress(Protocol):
    """Told how far a backup or a restore is."""

    def begin(self, step: str, total_bytes: int = 0) -> None:
        """Say what is being done now, and how much of it there is; 0 if nobody knows."""
        ...

    def add(self, done_bytes: int) -> None:
        """So many more bytes of it are done."""
        ...


@dataclass(frozen=True)
class Order:
    """What to back up.

    Attributes:
        data: the data folder.
        to: the backup's folder: new, or empty.
        services: those that must have their databases in the folder.
        environ: names another server program, perhaps.
    """

    data: Path
    to: Path
    services: Collection[str]
    environ: Mapping[str, str]


@dataclass(frozen=True)
class Saved:
    """A backup that was made.

    Attributes:
        manifest: what it says of itself.
        held_s: how long writers waited.
        tries: how many it took to find a moment without a writer.
        message_count: that only the broker had.
    """

    manifest: Manifest
    held_s: float
    tries: int
    message_count: int


def save(order: Order, progress: Progress) -> Saved:
    """Make the backup. Blocking, in the main thread.

    Raises:
        LaunchError: one sentence why there is none; nothing was left behind.
    """
    data, to = order.data.absolute(), order.to.absolute()
    _check_data(data)
    _check_target(data, to)
    try:
        with (
            _held(data) as is_running,
            tree.scratch_folder(to.parent, f".{to.name}.partial-") as partial,
            tree.scratch_folder(data, LINKS_PREFIX) as links,
        ):
            return _Saving(order, partial, tree.Links(data, links), is_running, progress).run()
    except DatabaseRefused as error:
        raise LaunchError(f"There is no backup: {error}.") from error
    except (OSError, sqlite3.Error) as error:
        raise LaunchError(f"There is no backup in {to}: {reason_of(error)}.") from error


class _Saving:
    def __init__(
        self,
        order: Order,
        partial: Path,
        links: tree.Links,
        is_running: bool,
        progress: Progress,
    ) -> None:
        self._order = order
        self._data = order.data.absolute()
        self._partial = partial
        self._links = links
        self._progress = progress
        self._bus_file = partial / BUS_FILE
        self._broker = Broker(
            DataFolder(self._data),
            is_running=is_running,
            into=self._bus_file,
            environ=order.environ,
        )

    def run(self) -> Saved:
        self._progress.begin("looking at what there is")
        self._links.update()
        self._require_services()
        databases = sorted(self._links.databases)
        tree.write_new(self._bus_file, b"")
        self._progress.begin("reading what only the broker has")
        asyncio.run(self._broker.read_before_cut())
        self._progress.begin("waiting for a moment without a writer")
        paths = [self._data / name for name in databases]
        with open_cut(paths, inside=self._links.update, waiting=self._wait) as cut:
            if sorted(self._links.databases) != databases:
                raise LaunchError("A service made new databases meanwhile: try again.")
            self._require_room(cut)
            asyncio.run(self._broker.read_after_cut())
            files = [*self._copy_databases(cut, databases), *self._copy_files()]
            files.append(self._described(BUS_FILE))
            manifest = Manifest(cut.at_us, self._applied(databases), files)
            self._publish(manifest)
            return Saved(manifest, cut.held_s, cut.tries, self._broker.count)

    def _wait(self, busy: Path) -> None:
        self._progress.begin(f"waiting for a moment without a writer of {busy}")

    def _require_services(self) -> None:
        for service in sorted(self._order.services):
            if f"services/{service}/shards/{CONTROL_FILE}" not in self._links.databases:
                raise LaunchError(
                    f"{self._data} has no databases of {service}: the mesh was never started there "
                    f"to its end, or keeps them elsewhere, and this backs up a data folder alone."
                )

    def _require_room(self, cut: Cut) -> None:
        needed = sum(file.size_bytes for file in cut.files) + SPARE_BYTES
        for path in self._links.files.values():
            needed += path.stat().st_size
        stats = os.statvfs(self._partial)
        free = stats.f_bavail * stats.f_frsize
        if needed > free:
            raise LaunchError(
                f"{self._order.to} would need {mebibytes(needed)}, and {mebibytes(free)} are free "
                "there: nothing was written."
            )
        self._progress.begin("copying", needed - SPARE_BYTES)

    def _copy_databases(self, cut: Cut, names: Sequence[str]) -> Iterator[BackedUpFile]:
        for file, name in zip(cut.files, names, strict=True):
            target = self._partial / DATA_FOLDER / name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.copy_to(target, self._progress.add)
            tree.sync(target)
            yield self._described(f"{DATA_FOLDER}/{name}")

    def _copy_files(self) -> Iterator[BackedUpFile]:
        for name, path in sorted(self._links.files.items()):
            try:
                source = tree.open_below(path.parent, path.name)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise LaunchError(
                    f"There is no backup: {self._data / name} cannot be read ({reason})."
                ) from error
            target = self._partial / DATA_FOLDER / name
            size_bytes, sha256 = tree.copy(source, target, self._progress.add)
            yield BackedUpFile(f"{DATA_FOLDER}/{name}", size_bytes, sha256)

    def _described(self, name: str) -> BackedUpFile:
        source = tree.open_below(self._partial, name)
        os.fsync(source)
        return BackedUpFile(name, *tree.copy(source, None, lambda _: None))

    def _applied(self, databases: Sequence[str]) -> dict[str, list[Applied]]:
        """By service, of its first shard: a start brings all of them to one schema."""
        found: dict[str, list[Applied]] = {}
        for name in databases:
            service = service_of(name)
            if not service or service in found:
                continue
            with closing(sqlite3.connect(self._partial / DATA_FOLDER / name)) as copied:
                found[service] = [tuple(row) for row in copied.execute(SELECT_APPLIED)]
        return found

    def _publish(self, manifest: Manifest) -> None:
        self._progress.begin("making it durable")
        tree.write_new(self._partial / MANIFEST_FILE, manifest.to_bytes())
        tree.sync_folders(self._partial)
        to = self._order.to.absolute()
        self._partial.rename(to)
        tree.sync(to.parent)


def service_of(database: str) -> str:
    """Whose shard a database in a data folder is, by its relative path; "" if it is none."""
    match database.split("/"):
        case ["services", service, "shards", file] if file != CONTROL_FILE:
            return service
    return ""


def reason_of(error: OSError | sqlite3.Error) -> str:
    """What stopped us, in the system's words, with the file where it says one."""
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{(error.strerror or str(error)).lower()}{where}"
    code = getattr(error, "sqlite_errorname", "")  # "disk I/O error" has many reasons
    return f"{error} ({code})" if code else str(error)


def _check_data(data: Path) -> None:
    try:
        owner = (data / LOCK_FILE).stat().st_uid
    except OSError as error:
        raise LaunchError(
            f"{data} is no data folder ({(error.strerror or '').lower()}): "
            "name one with --data or TENFOLD_DATA."
        ) from error
    if (data / SHAPE_FILE).exists():
        raise LaunchError(
            f"{data} holds a cluster, whose databases are Postgres's and have backups of their "
            "own: see 'Back up and restore' in deploy/runbook.md."
        )
    if owner != os.geteuid():
        # We would leave files there that its own mesh cannot write.
        raise LaunchError(f"{data} belongs to user {owner}: run this as that user.")


def _check_target(data: Path, to: Path) -> None:
    if not to.parent.is_dir():
        raise LaunchError(f"There is no folder {to.parent} to put a backup into.")
    real = to.parent.resolve() / to.name
    if real == data.resolve() or data.resolve() in real.parents:
        raise LaunchError(f"{to} is inside the data folder: a backup belongs elsewhere.")
    if to.is_symlink() or (to.exists() and (not to.is_dir() or any(to.iterdir()))):
        raise LaunchError(f"{to} exists: name a new folder, such as {to}-2.")
    if to.is_mount():
        raise LaunchError(f"{to} is a file system of its own: name a new folder in it.")


@contextmanager
def _held(data: Path) -> Iterator[bool]:
    """Whether the mesh runs; if it does not, it cannot be started meanwhile."""
    with (data / LOCK_FILE).open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_running = False
        except BlockingIOError:
            is_running = True
    if not is_running:
        with open_data_folder(data):
            yield False
        return
    state = DataFolder(data).read_state()
    launcher = launcher_of(state)
    if launcher is None or not launcher.is_alive or not state.get("ready"):
        raise LaunchError(
            f"The mesh in {data} is starting or stopping, or it stands and somebody else copies "
            "it: try again when it is ready, or stands."
        )
    yield True
