"""One writer of one upload: bytes in, offsets committed, the last byte makes a video.

The order of every step is: lock the file, see in the database that nobody newer writes,
cut the file to where the step begins, write, fsync, commit the offset.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog

from services.media.domain import Upload, Video
from services.media.files import MediaFiles, UploadFile
from services.media.store import MediaStore, Scope
from services.media.tus import Checksum, Digest, TusRefusal
from shared.clock import Clock
from shared.crashpoints import CrashPoint
from shared.errors import TenfoldError

_log = structlog.get_logger(__name__)

STEP_BYTES = 4 * 1024 * 1024
STEP_S = 1.0
CUT_S = 10.0
"""How long a writer whose client has gone may take to keep what it has received."""

SYNCED_NOT_COMMITTED = CrashPoint(
    "media.bytes_synced_not_committed", "bytes are durable, the offset does not count them yet"
)
WHOLE_NOT_COMPLETED = CrashPoint(
    "media.whole_synced_not_completed", "every byte is durable, neither video nor job exist"
)
COMPLETED_BEFORE_REPLY = CrashPoint(
    "media.completed_before_reply", "video and job exist, nobody has been told"
)


@dataclass
class UploadWriter:
    """Takes the bytes of one request; open it with UploadWriters.open.

    Attributes:
        upload: as it was last committed.
        video: set by the last byte.
    """

    upload: Upload
    store: MediaStore
    file: UploadFile
    files: MediaFiles
    clock: Clock
    lifetime: timedelta
    checksum: Checksum | None
    video: Video | None = None
    _digest: Digest | None = None
    _buffer: bytearray = field(default_factory=bytearray)
    _written_bytes: int = 0
    _step_began_s: float = 0.0

    def __post_init__(self) -> None:
        """Begin where the upload stands."""
        self._digest = self.checksum.new_digest() if self.checksum else None
        self._written_bytes = self.upload.committed_bytes
        self._step_began_s = self.clock.monotonic_s()

    async def feed(self, data: bytes) -> None:
        """Take some bytes; they are durable at the latest when finish has returned.

        Raises:
            TusRefusal: 413, more bytes than the upload has.
            UploadClosed, OffsetMismatch: a newer writer has taken it, or it has ended.
        """
        if self._received_bytes + len(data) > self.upload.size_bytes:
            detail = f"The upload has {self.upload.size_bytes} bytes; more were sent."
            raise TusRefusal(413, "UPLOAD_TOO_LONG", detail)
        self._buffer += data
        # The last step waits for the end of the body: what comes after it would be too much.
        if self._is_step_due() and self._received_bytes < self.upload.size_bytes:
            await self._step()

    @property
    def _received_bytes(self) -> int:
        return self._written_bytes + len(self._buffer)

    def _is_step_due(self) -> bool:
        waited_s = self.clock.monotonic_s() - self._step_began_s
        return len(self._buffer) >= STEP_BYTES or waited_s >= STEP_S

    async def finish(self) -> None:
        """The body is over: commit what is left, or all of it when there is a checksum.

        Raises:
            TusRefusal: 460, the checksum is another; the offset is where it was.
            UploadClosed, OffsetMismatch: a newer writer has taken it, or it has ended.
        """
        if self._digest is not None and self.checksum is not None:
            self._digest.update(bytes(self._buffer))
            if self._digest.digest() != self.checksum.expected:
                detail = "The bytes do not have this checksum; none of them was kept."
                raise TusRefusal(460, "CHECKSUM_MISMATCH", detail)
        if self._received_bytes == self.upload.size_bytes:
            await self._complete()
        elif self._received_bytes > self.upload.committed_bytes:
            async with self._writing():
                await self._commit()

    async def cut(self) -> None:
        """The client has gone: keep what came, unless a checksum speaks for the whole body.

        Raises nothing that would hide why the body was cut.
        """
        if self.checksum is not None:
            return
        try:
            async with asyncio.timeout(CUT_S):
                await self.finish()
        except (TenfoldError, TusRefusal, TimeoutError) as error:
            _log.info("media.cut_not_kept", upload=str(self.upload.id), error=repr(error))

    async def _step(self) -> None:
        if self._digest is not None:
            self._digest.update(bytes(self._buffer))
        async with self._writing():
            if self._digest is None:
                await self._commit()

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        """Write the buffer, and stay in the lock for what follows."""
        async with self.file.locked():
            scope = Scope.of_tenant(self.upload.tenant)
            current = await self.store.get_upload(self.upload.id, scope)
            current.check_writer(self.upload.writer_token)
            data = bytes(self._buffer)
            await self.file.write(data, at=self._written_bytes)
            self._written_bytes += len(data)
            self._buffer.clear()
            self._step_began_s = self.clock.monotonic_s()
            yield

    async def _commit(self) -> None:
        await self.file.sync()
        SYNCED_NOT_COMMITTED.visit()
        self.upload = await self.store.advance_upload(
            self.upload, self._written_bytes, expires_at=self._expires_at()
        )
        self.files.remember(self.upload.id, self.file)

    async def _complete(self) -> None:
        async with self._writing():
            sha256 = await self.file.sync_whole(self.upload.size_bytes)
            WHOLE_NOT_COMPLETED.visit()
            self.upload, self.video = await self.store.complete_upload(
                self.upload,
                sha256=sha256,
                now=self.clock.now(),
                expires_at=self._expires_at(),
            )
        COMPLETED_BEFORE_REPLY.visit()

    def _expires_at(self) -> datetime:
        return self.clock.now() + self.lifetime


@dataclass(frozen=True)
class UploadWriters:
    """Opens writers.

    Attributes:
        lifetime: how long an upload is kept after its last byte came.
    """

    store: MediaStore
    files: MediaFiles
    clock: Clock
    lifetime: timedelta

    @asynccontextmanager
    async def open(self, upload: Upload, checksum: Checksum | None) -> AsyncIterator[UploadWriter]:
        """A writer for an upload that store.take_upload has given to the caller.

        Raises:
            StorageUnavailable: its file cannot be opened.
        """
        async with self.files.writing(upload.id, upload.committed_bytes) as file:
            yield UploadWriter(
                upload=upload,
                store=self.store,
                file=file,
                files=self.files,
                clock=self.clock,
                lifetime=self.lifetime,
                checksum=checksum,
            )
