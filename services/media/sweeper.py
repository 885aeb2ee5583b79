"""Repairs what a kill or a lost message left behind, and ends what nobody finishes.

Everything here may run at any time, in several processes at once, and be killed at any
point: each step looks at the row that decides, and removing what is gone is no error.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from uuid import UUID

import structlog

from services.media.domain import (
    UploadClosed,
    UploadNotFound,
    UploadState,
    Video,
    VideoState,
)
from services.media.files import MediaFiles
from services.media.store import MediaStore, Scope
from shared.clock import Clock
from shared.errors import TenfoldError

BATCH_MAX = 200
ENTRIES_MAX = 10_000
# What has no row may be about to get one; nothing is, for so long.
GRACE_S = 3600.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Sweeper:
    """See the module.

    Attributes:
        period_s: between two sweeps.
        lifetime: how long an ended upload still says so.
        forgotten: after what silence an unfinished video's job is given once more.
    """

    store: MediaStore
    files: MediaFiles
    clock: Clock
    period_s: float
    lifetime: timedelta
    forgotten: timedelta

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await self.sweep()
            except TenfoldError as error:
                _log.warning("media.sweep_interrupted", error=repr(error))
            await asyncio.sleep(self.period_s)

    async def sweep(self) -> None:
        """Everything once.

        Raises:
            Unavailable: the database or the disk does not answer; the rest is for next time.
        """
        await self._expire_uploads()
        await self.store.forget_ended_uploads(self.clock.now(), count_max=BATCH_MAX)
        await self._free_uploads()
        await self._free_work()
        await self._free_videos()
        await self._requeue_forgotten()

    async def _expire_uploads(self) -> None:
        now = self.clock.now()
        for upload in await self.store.list_stale_uploads(now, count_max=BATCH_MAX):
            try:
                ended = await self.store.end_upload(
                    upload.id,
                    Scope.of_tenant(upload.tenant),
                    UploadState.EXPIRED,
                    keep_until=now + self.lifetime,
                    if_stale_at=now,
                )
            except (UploadClosed, UploadNotFound):
                continue  # it was finished, or forgotten, meanwhile
            if not ended.is_open:
                await self.files.remove_upload(upload.id)

    async def _free_uploads(self) -> None:
        for path in await _entries(self.files.uploads):
            upload_id = _uuid_of(path.name)
            if upload_id is not None and not await self._is_upload_kept(upload_id, path):
                await self.files.remove_upload(upload_id)

    async def _is_upload_kept(self, upload_id: UUID, path: Path) -> bool:
        upload = await self.store.find_upload(upload_id)
        if upload is None:
            return await asyncio.to_thread(_is_young, path)
        if upload.video_id is None:
            return upload.is_open
        video = await self.store.find_video(upload.video_id)
        return video is None or video.is_source_of_use

    async def _free_work(self) -> None:
        for path in await _entries(self.files.work):
            name, _, token = path.name.rpartition(".")
            video = await self._video_of(name)
            if not _is_held(video, token) or (video and not video.is_leased(self.clock.now())):
                await self.files.remove_folder(path)

    async def _free_videos(self) -> None:
        for path in await _entries(self.files.videos):
            video = await self._video_of(path.name)
            if video is None or video.state is VideoState.DELETED:
                await self.files.remove_folder(path)
                continue
            for output in await _entries(path):
                is_played = output.name == str(video.output_token)
                # A holder may be between the output's move and the row that will name it.
                if not is_played and not _is_held(video, output.name):
                    await self.files.remove_folder(output)

    async def _video_of(self, name: str) -> Video | None:
        video_id = _uuid_of(name)
        return None if video_id is None else await self.store.find_video(video_id)

    async def _requeue_forgotten(self) -> None:
        now = self.clock.now()
        before = now - self.forgotten
        for video in await self.store.list_forgotten_videos(before, count_max=BATCH_MAX):
            if not video.is_leased(now):
                _log.warning("media.requeued", video=str(video.id))
                await self.store.requeue_video(video, now=now)


def _is_held(video: Video | None, token: str) -> bool:
    return video is not None and not video.state.is_final and str(video.job_token) == token


async def _entries(folder: Path) -> list[Path]:
    def listed() -> Iterator[Path]:
        return islice(folder.iterdir(), ENTRIES_MAX)

    return await asyncio.to_thread(lambda: list(listed()))


def _uuid_of(name: str) -> UUID | None:
    try:
        return UUID(name)
    except ValueError:
        return None


def _is_young(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < GRACE_S
    except FileNotFoundError:
        return False
