"""Makes a data folder from a backup: copied, verified, and prepared to go on from its moment.

The folder is marked as unfinished first, and gets the file that makes it a data folder last:
whoever is killed in between leaves one that no mesh starts on.
"""

import os
import shutil
import sqlite3
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deploy.backup import tree
from deploy.backup.manifest import (
    BUS_FILE,
    DATA_FOLDER,
    MANIFEST_BYTES_MAX,
    MANIFEST_FILE,
    BackedUpFile,
    Manifest,
)
from deploy.backup.saving import Progress, reason_of, service_of
from deploy.backup.sizes import mebibytes
from deploy.local.data_folder import LOCK_FILE, UNFINISHED_FILE
from deploy.local.errors import LaunchError
from shared.bus.owed import MalformedMessage, OwedMessage
from shared.bus.resume import Resumed, resume
from shared.db.errors import DatabaseRefused
from shared.db.migrate import FRAMEWORK_MIGRATIONS, Migration, load_migrations, refuse_misfit

SPARE_BYTES = 4 * 1024 * 1024
DATA_PREFIX = f"{DATA_FOLDER}/"


@dataclass(frozen=True)
class Restored:
    """A data folder that was made, or a backup that was verified.

    Attributes:
        manifest: the backup's.
        returned: messages that only the broker had and that will be sent again.
        foreign: messages of nobody here, which are left out.
    """

    manifest: Manifest
    returned: int = 0
    foreign: int = 0


def verify(backup: Path, migrations: Mapping[str, Path], progress: Progress) -> Restored:
    """Read every file of a backup. Blocking.

    Args:
        backup: its folder.
        migrations: the folders of the services that this version knows, by name.
        progress: told how far it is.

    Raises:
        LaunchError: a file is missing or damaged, or this version is too old for it.
    """
    with _said(f"The backup in {backup} cannot be read"):
        manifest = _read_manifest(backup)
        _require_known_schemas(manifest, migrations)
        progress.begin("verifying", manifest.size_bytes)
        for file in manifest.files:
            _copy(backup, file, None, progress)
        return Restored(manifest)


def restore(
    backup: Path, data: Path, migrations: Mapping[str, Path], progress: Progress
) -> Restored:
    """Make a data folder. Blocking.

    Args:
        backup: its folder.
        data: new, or empty.
        migrations: see verify.
        progress: told how far it is.

    Raises:
        LaunchError: one sentence why there is none; nothing was left behind.
    """
    backup, data = backup.absolute(), data.absolute()
    with _said(f"Nothing was restored to {data}"):
        manifest = _read_manifest(backup)
        _require_known_schemas(manifest, migrations)
        _require_apart(backup, data)
        with _new_folder(data):
            _require_room(manifest, data)
            progress.begin("copying and verifying", manifest.size_bytes)
            for file in manifest.files:
                is_kept = file.path != BUS_FILE
                target = data / file.path.removeprefix(DATA_PREFIX) if is_kept else None
                _copy(backup, file, target, progress)
            progress.begin("preparing the databases")
            resumed = _resume(manifest, backup, data)
            progress.begin("making it durable")
            tree.sync_folders(data)
        return Restored(manifest, resumed.returned, resumed.foreign)


def _read_manifest(backup: Path) -> Manifest:
    try:
        descriptor = tree.open_below(backup, MANIFEST_FILE)
    except OSError as error:
        raise LaunchError(
            f"{backup} is no backup: it has no {MANIFEST_FILE}, which is written last."
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        return Manifest.of_bytes(file.read(MANIFEST_BYTES_MAX))


def _require_known_schemas(manifest: Manifest, migrations: Mapping[str, Path]) -> None:
    framework = load_migrations(FRAMEWORK_MIGRATIONS, area="framework")
    for service, applied in manifest.applied.items():
        known: list[Migration] = [*framework]
        if service in migrations:
            known += load_migrations(migrations[service], area=service)
        refuse_misfit(applied, f"the backup of {service}", known)


def _require_apart(backup: Path, data: Path) -> None:
    real, inside = backup.resolve(), data.resolve()
    if real == inside or real in inside.parents or inside in real.parents:
        raise LaunchError("The backup and the data folder are inside each other: name another.")


def _require_room(manifest: Manifest, data: Path) -> None:
    stats = os.statvfs(data)
    free, needed = stats.f_bavail * stats.f_frsize, manifest.size_bytes + SPARE_BYTES
    if needed > free:
        raise LaunchError(
            f"{data} would need {mebibytes(needed)}, and {mebibytes(free)} are free there."
        )


@contextmanager
def _new_folder(data: Path) -> Iterator[None]:
    """Claim the folder, and make it a data folder at the end; after a failure it is as before."""
    is_new = not data.exists()
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(data.iterdir()):
        raise LaunchError(f"{data} is not empty: name a new folder with --data.")
    try:
        # Of two restores at once, one finds it there.
        tree.write_new(data / UNFINISHED_FILE, b"")
    except FileExistsError as error:
        raise LaunchError(f"Another restore writes {data}.") from error
    try:
        data.chmod(0o700)
        yield
        tree.write_new(data / LOCK_FILE, b"")
        tree.sync(data)
        (data / UNFINISHED_FILE).unlink()
        tree.sync(data)
    except BaseException:
        _empty(data)
        if is_new:
            with suppress(OSError):
                data.rmdir()
        raise


def _empty(folder: Path) -> None:
    for path in sorted(folder.iterdir(), key=lambda path: path.name == UNFINISHED_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _copy(backup: Path, file: BackedUpFile, target: Path | None, progress: Progress) -> None:
    try:
        source = tree.open_below(backup, file.path)
    except OSError as error:
        raise LaunchError(
            f"The backup's file {file.path} is missing or no file ({reason_of(error)}): "
            "use another backup."
        ) from error
    if tree.copy(source, target, progress.add) != (file.size_bytes, file.sha256):
        raise LaunchError(
            f"The backup's file {file.path} is damaged: it is not what was backed up. "
            "Use another backup."
        )


def _resume(manifest: Manifest, backup: Path, data: Path) -> Resumed:
    shards: dict[str, list[Path]] = defaultdict(list)
    for file in manifest.files:
        name = file.path.removeprefix(DATA_PREFIX)
        if name.endswith(tree.DATABASE_SUFFIX) and (service := service_of(name)):
            shards[service].append(data / name)
    stood_us = max(0, time.time_ns() // 1000 - manifest.cut_at_us)
    total = Resumed()
    for service, paths in shards.items():
        resumed = resume(paths, _owed(backup, manifest, {service}), stood_us=stood_us)
        total.returned += resumed.returned
        total.foreign += resumed.foreign
    known = sum(1 for _ in _owed(backup, manifest, shards))
    total.foreign += sum(1 for _ in _owed(backup, manifest)) - known
    return total


def _owed(
    backup: Path, manifest: Manifest, services: Collection[str] | None = None
) -> Iterator[OwedMessage]:
    """What outboxes take back, or those of some services; not kept, since it may be much."""
    if not any(file.path == BUS_FILE for file in manifest.files):
        return
    with os.fdopen(tree.open_below(backup, BUS_FILE), "rb") as lines:
        for line in lines:
            message = OwedMessage.of_line(line)
            _, _, rest = message.subject.partition(".")
            if services is None or rest.partition(".")[0] in services:
                yield message


@contextmanager
def _said(what: str) -> Iterator[None]:
    try:
        yield
    except (DatabaseRefused, MalformedMessage) as error:
        raise LaunchError(f"{what}: {error}.") from error
    except (OSError, sqlite3.Error) as error:
        raise LaunchError(f"{what}: {reason_of(error)}.") from error
