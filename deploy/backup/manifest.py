"""What a backup says of itself: every file with its SHA-256, its moment, its schemas. Pure."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from deploy.local.errors import LaunchError
from shared.clock import of_us

FORMAT = 1
"""Raised when an older `tenfold restore` could not read what is written."""

MANIFEST_FILE = "manifest.json"
MANIFEST_BYTES_MAX = 1 << 30
BUS_FILE = "bus.jsonl"
DATA_FOLDER = "data"

Applied = tuple[str, int, str, str]
"""A migration that a shard has applied: area, number, name, SHA-256."""


@dataclass(frozen=True)
class BackedUpFile:
    """One file.

    Attributes:
        path: relative, with "/"; below "data", or BUS_FILE.
        size_bytes: 0 or more.
        sha256: as hex.
    """

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """See the module.

    Attributes:
        cut_at_us: the moment that all databases show.
        applied: what each service's shards have applied, by service.
        files: all but the manifest itself.
    """

    cut_at_us: int
    applied: Mapping[str, Sequence[Applied]]
    files: Sequence[BackedUpFile]

    @property
    def cut_at(self) -> datetime:
        """The moment that all databases show, UTC."""
        return of_us(self.cut_at_us)

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """As it is stored: JSON for people, too."""
        told: dict[str, Any] = {
            "format": FORMAT,
            "cut_at": self.cut_at.isoformat(),
            "cut_at_us": self.cut_at_us,
            "migrations": {
                name: [list(one) for one in rows] for name, rows in self.applied.items()
            },
            "files": [[file.path, file.size_bytes, file.sha256] for file in self.files],
        }
        return (json.dumps({**told, "sha256": _digest(told)}, indent=1) + "\n").encode()

    @classmethod
    def of_bytes(cls, content: bytes) -> "Manifest":
        """Read what to_bytes wrote; a path that leads out of the backup is refused.

        Raises:
            LaunchError: it is damaged, hostile, or of a later format.
        """
        try:
            told = json.loads(content)
            if not isinstance(told, dict) or not isinstance(told.get("format"), int):
                raise _damaged("it names no format")
            if told["format"] > FORMAT:
                raise LaunchError(
                    f"The backup has format {told['format']}, and this version reads up to "
                    f"{FORMAT}: restore it with the version that made it, or a later one."
                )
            if told.pop("sha256", None) != _digest(told):
                raise _damaged("it was changed after it was written")
            files = [
                BackedUpFile(str(path), int(size), str(sha)) for path, size, sha in told["files"]
            ]
            applied = {
                name: [
                    (str(area), int(number), str(what), str(sha))
                    for area, number, what, sha in rows
                ]
                for name, rows in told["migrations"].items()
            }
            manifest = cls(int(told["cut_at_us"]), applied, files)
            _ = manifest.cut_at
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise _damaged(f"it cannot be read: {error!r}") from error
        _check_paths([file.path for file in files])
        return manifest


def _digest(told: Mapping[str, Any]) -> str:
    """Finds damage; it is no signature."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _check_paths(paths: Sequence[str]) -> None:
    if len(set(paths)) != len(paths):
        raise _damaged("it names a file twice")
    for text in paths:
        path = PurePosixPath(text)
        is_plain = str(path) == text and not path.is_absolute() and ".." not in path.parts
        is_placed = text == BUS_FILE or (path.parts[:1] == (DATA_FOLDER,) and len(path.parts) > 1)
        if not is_plain or not is_placed or "\0" in text:
            raise LaunchError(
                f"The backup names the file {text!r}, which does not belong in one: nothing was "
                "read or written."
            )


def _damaged(why: str) -> LaunchError:
    return LaunchError(f"The backup's {MANIFEST_FILE} is damaged ({why}): use another backup.")
