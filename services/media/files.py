"""Bytes on disk: uploads, runs in the making, what is played. Names come from ids only.

    uploads/<upload>            an upload's bytes, later its video's source
    work/<video>.<token>/       what a run has made so far
    videos/<video>/<token>/     what is played

What an OSError means to callers is said here: the storage does not answer or is full.
"""

import asyncio
import fcntl
import hashlib
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import structlog

from services.media.domain import FileNotServed
from shared.errors import Unavailable

LOCK_TIMEOUT_S = 5.0
LOCK_POLL_S = 0.01
RETRY_AFTER_S = 2.0
READ_BYTES = 1024 * 1024
DIGESTS_MAX = 1024

# The only names that are ever served; they are ours (ffmpeg.py), so no path is among them.
_SERVED = re.compile(r"(?:master|[0-9]{1,4}p)\.m3u8|[0-9]{1,4}p_[0-9]{5,7}\.ts")
_CONTENT_TYPES = {".m3u8": "application/vnd.apple.mpegurl", ".ts": "video/mp2t"}

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


class StorageUnavailable(Unavailable):
    """The disk is full, gone, or busy for too long."""

    reason = "STORAGE_UNAVAILABLE"

    def __init__(self) -> None:
        super().__init__(
            "The storage does not take or give bytes at the moment.", retry_after_s=RETRY_AFTER_S
        )


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.error("media.storage", error=repr(error))
        raise StorageUnavailable from error


async def _in_thread(function: Callable[..., _T], *arguments: Any) -> _T:  # noqa: ANN401
    """Run it in a thread, and never leave before it has ended.

    A write that went on after its caller was cancelled would outlive the lock and the
    descriptor that it uses.
    """
    with _storage_errors():
        running = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            running.exception()  # seen: the cancellation counts
            raise


def content_type_of(name: str) -> str:
    """The media type of a file that is served.

    Raises:
        FileNotServed: no file of that name ever is.
    """
    if _SERVED.fullmatch(name) is None:
        raise FileNotServed
    return _CONTENT_TYPES[Path(name).suffix]


class UploadFile:
    """The bytes of one upload, open for one writer.

    Attributes:
        digest: SHA-256 of the first `digested_bytes` bytes.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self.digest = hashlib.sha256()
        self.digested_bytes = 0

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Keep every other writer's bytes out, of this process and of others.

        Raises:
            StorageUnavailable: another holds it for too long.
        """
        with _storage_errors():
            async with asyncio.timeout(LOCK_TIMEOUT_S):  # TimeoutError is an OSError
                while not self._try_lock():  # noqa: ASYNC110 -- the kernel does not call back
                    await asyncio.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def write(self, data: bytes, *, at: int) -> None:
        """Put bytes at an offset; what lay at it or behind it is gone. Durable after sync.

        Raises:
            StorageUnavailable: not all of it is written.
        """
        await _in_thread(self._write, data, at)

    def _write(self, data: bytes, at: int) -> None:
        # The file may be longer than what was committed: never the truth, always cut.
        os.ftruncate(self._fd, at)
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, at)
            view, at = view[written:], at + written
        if self.digested_bytes == at - len(data):
            self.digest.update(data)
            self.digested_bytes = at

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    async def sync(self) -> None:
        """Return when every byte written is durable.

        Raises:
            StorageUnavailable: it may not be.
        """
        await _in_thread(os.fdatasync, self._fd)

    async def sync_whole(self, size_bytes: int) -> str:
        """Make the file and its name durable; the hex SHA-256 of all its bytes.

        Raises:
            StorageUnavailable: it is not so many bytes long, or cannot be read.
        """
        return await _in_thread(self._sync_whole, size_bytes)

    def _sync_whole(self, size_bytes: int) -> str:
        os.fsync(self._fd)
        sync_folder(self._path.parent)
        if self.digested_bytes != size_bytes:
            self.digest, self.digested_bytes = hashlib.sha256(), 0
            while block := os.pread(self._fd, READ_BYTES, self.digested_bytes):
                self.digest.update(block)
                self.digested_bytes += len(block)
        if self.digested_bytes != size_bytes:
            raise OSError(f"{self._path.name} has {self.digested_bytes} bytes, not {size_bytes}")
        return self.digest.hexdigest()


class MediaFiles:
    """Everything below one folder."""

    def __init__(self, folder: Path) -> None:
        self.uploads = folder / "uploads"
        self.work = folder / "work"
        self.videos = folder / "videos"
        # Running checksums, so that a resumed upload is not read again from its first byte.
        self._digests: OrderedDict[UUID, tuple[int, Any]] = OrderedDict()

    def prepare(self) -> None:
        """Make the folders. Blocking; for start-up."""
        for folder in (self.uploads, self.work, self.videos):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def upload_path(self, upload_id: UUID) -> Path:
        """Where an upload's bytes are."""
        return self.uploads / str(upload_id)

    def work_folder(self, video_id: UUID, token: int) -> Path:
        """Where a run puts what it makes."""
        return self.work / f"{video_id}.{token}"

    def output_folder(self, video_id: UUID, token: int) -> Path:
        """Where a run's output is played from."""
        return self.videos / str(video_id) / str(token)

    @asynccontextmanager
    async def writing(self, upload_id: UUID, committed_bytes: int) -> AsyncIterator[UploadFile]:
        """Open an upload's file, making it if there is none.

        Raises:
            StorageUnavailable: it cannot be opened.
        """
        path = self.upload_path(upload_id)
        opening = asyncio.get_running_loop().run_in_executor(None, _open_for_writing, path)
        with _storage_errors():
            fd = await _opened(opening)
        file = UploadFile(fd, path)
        at, digest = self._digests.pop(upload_id, (0, None))
        if digest is not None and at == committed_bytes:
            file.digest, file.digested_bytes = digest, at
        try:
            yield file
        finally:
            file.close()

    def remember(self, upload_id: UUID, file: UploadFile) -> None:
        """Keep the checksum of what has just been committed, for the next writer.

        Committed bytes never change, so it is right for as long as the offset is the same.
        """
        self._digests[upload_id] = (file.digested_bytes, file.digest.copy())
        while len(self._digests) > DIGESTS_MAX:
            self._digests.popitem(last=False)

    async def remove_upload(self, upload_id: UUID) -> None:
        """Free an upload's bytes; nothing if there are none."""
        self._digests.pop(upload_id, None)
        await _in_thread(lambda: self.upload_path(upload_id).unlink(missing_ok=True))

    async def make_folder(self, folder: Path) -> None:
        """Make an empty folder; what was there before is gone."""
        await self.remove_folder(folder)
        await _in_thread(lambda: folder.mkdir(mode=0o700))

    async def remove_folder(self, folder: Path) -> None:
        """Free a run's or a video's folder; nothing if there is none."""
        await _in_thread(lambda: shutil.rmtree(folder, ignore_errors=True))

    async def publish(self, video_id: UUID, token: int) -> None:
        """Make a run's output durable and move it to where it will be played from."""
        await _in_thread(self._publish, video_id, token)

    def _publish(self, video_id: UUID, token: int) -> None:
        work, output = self.work_folder(video_id, token), self.output_folder(video_id, token)
        for path in work.iterdir():
            _sync_path(path)
        sync_folder(work)
        output.parent.mkdir(exist_ok=True, mode=0o700)
        work.rename(output)
        for folder in (output.parent, self.videos, self.work):
            sync_folder(folder)

    @asynccontextmanager
    async def reading(self, path: Path) -> AsyncIterator[tuple[int, AsyncGenerator[bytes, None]]]:
        """A file's size, and its bytes in pieces; closed with the block, read or not.

        Raises:
            FileNotServed: there is none.
        """
        opening = asyncio.get_running_loop().run_in_executor(None, _open_for_reading, path)
        try:
            fd = await _opened(opening)
        except FileNotFoundError as error:
            raise FileNotServed from error
        pieces = _pieces(fd)
        try:
            yield os.fstat(fd).st_size, pieces
        finally:
            await pieces.aclose()
            os.close(fd)


async def _opened(opening: "asyncio.Future[int]") -> int:
    """The descriptor that a thread opens; closed if the caller does not wait for it."""
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_opened)
        raise


def _close_opened(opening: "asyncio.Future[int]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


async def _pieces(fd: int) -> AsyncGenerator[bytes, None]:
    while piece := await _in_thread(os.read, fd, READ_BYTES):
        yield piece


def _open_for_reading(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _open_for_writing(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Blocking."""
    _sync_path(folder)


def folder_bytes(folder: Path) -> int:
    """How many bytes the files of a folder have. Blocking."""
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
