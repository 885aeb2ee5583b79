"""Where contracts come from: our own image, a file, or the servers themselves."""

import asyncio
import hashlib
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Protocol

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from edge.contracts import ContractError, file_set_of
from edge.foreign import Tell, files_of_servers
from shared.rpc.client import Upstreams
from shared.rpc.tls import ClientTls

# A server that is asked tells all that it has, each time.
ASKED_EVERY_S = 10.0


@dataclass(frozen=True)
class Found:
    """Contracts as they were found, not yet checked.

    Attributes:
        file_set: the files.
        services: full names of those to serve; None for all.
        origin: what to call it in an error: a path, or "".
    """

    file_set: FileDescriptorSet
    services: frozenset[str] | None = None
    origin: str = ""

    @property
    def digest(self) -> str:
        """The same for the same contracts, in whatever order they were told."""
        hasher = hashlib.sha256(repr(sorted(self.services or ())).encode())
        for file in sorted(self.file_set.file, key=lambda file: file.name):
            hasher.update(file.SerializeToString(deterministic=True))
        return hasher.hexdigest()


class Source(Protocol):
    """Where contracts come from."""

    async def may_have_changed(self) -> bool:
        """Whether it is worth to look; cheap, and asked again and again."""
        ...

    async def find(self) -> Found:
        """The contracts as they are now.

        Raises:
            ContractError: there are none, or they cannot be read.
        """
        ...


class FileSource:
    """A descriptor set in a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark: tuple[int, ...] | None = None

    @classmethod
    def own(cls) -> "FileSource":
        """Tenfold's own contracts, the image that `make stubs` writes."""
        return cls(Path(str(files("tenfold").joinpath("contracts.binpb"))))

    async def may_have_changed(self) -> bool:
        """See Source; by the file's times, size and place on the disk."""
        mark = await asyncio.to_thread(self._read_mark)
        return mark != self._mark

    async def find(self) -> Found:
        """See Source."""
        return await asyncio.to_thread(self._find)

    def _find(self) -> Found:
        self._mark = self._read_mark()  # before the content: what comes between is seen later
        try:
            image = self._path.read_bytes()
        except OSError as error:
            raise ContractError(f"{self._path} cannot be read: {error.strerror}") from error
        try:
            return Found(file_set_of(image), origin=str(self._path))
        except ContractError as error:
            raise ContractError(f"{self._path}: {error}") from error

    def _read_mark(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_size, status.st_ino


class ServerSource:
    """The servers themselves, by reflection.

    Args:
        upstreams, tls, tell: see files_of_servers.
        wait_s: how long each may be away.
    """

    def __init__(
        self, upstreams: Upstreams, tls: ClientTls | None, *, wait_s: float, tell: Tell
    ) -> None:
        self._upstreams, self._tls = upstreams, tls
        self._wait_s, self._tell = wait_s, tell
        self._asked_at_s = float("-inf")

    async def may_have_changed(self) -> bool:
        """See Source; only the answer itself can show it, so it is not asked all the time."""
        return time.monotonic() >= self._asked_at_s + ASKED_EVERY_S

    async def find(self) -> Found:
        """See Source."""
        self._asked_at_s = time.monotonic()
        file_set, services = await files_of_servers(
            self._upstreams, self._tls, wait_s=self._wait_s, tell=self._tell
        )
        return Found(file_set, services)
