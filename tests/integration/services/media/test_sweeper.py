import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest

from services.media import events, wiring
from services.media.config import MediaConfig
from services.media.domain import Upload, UploadState, Video
from services.media.files import MediaFiles
from services.media.store import OpenUploadLimits, Scope, SqlMediaStore
from services.media.sweeper import GRACE_S, Sweeper
from shared.db.ids import bucket_of, new_id
from shared.db.port import Once, Shards
from shared.identity import Principal, PrincipalKind
from tests.databases import Places
from tests.fakes import ManualClock

OWNER = new_id(7)
LIMITS = OpenUploadLimits(10, 10_000)


@dataclass
class Swept:
    shards: Shards
    store: SqlMediaStore
    files: MediaFiles
    clock: ManualClock
    sweeper: Sweeper

    async def upload(self, data: bytes) -> Upload:
        """An open upload with these bytes durable but not all committed."""
        upload = Upload(
            id=new_id(bucket_of(OWNER)),
            tenant="default",
            owner=OWNER,
            size_bytes=len(data),
            committed_bytes=0,
            mime_type="",
            display_name="film",
            tus_metadata="",
            state=UploadState.OPEN,
            video_id=None,
            writer_token=0,
            created_at=self.clock.now(),
            expires_at=self.clock.now() + timedelta(hours=1),
        )
        principal = Principal(PrincipalKind.USER, str(OWNER))
        once = Once(principal, "/test", "", b"")
        await self.store.insert_upload(upload, once=once, limits=LIMITS)
        self.files.upload_path(upload.id).write_bytes(data)
        return upload

    async def video(self) -> Video:
        upload = await self.upload(b"film")
        moment = self.clock.now()
        _, video = await self.store.complete_upload(
            upload, sha256="", now=moment, expires_at=moment
        )
        return video

    async def change(self, video: Video, change) -> Video:
        scope = Scope.of_tenant(video.tenant)
        return await self.store.change_video(video.id, scope, change, now=self.clock.now())

    async def job_count(self) -> int:
        rows = [
            row
            for shard in self.shards.all()
            for row in await shard.fetch_all("SELECT subject FROM outbox")
        ]
        return sum(f".{events.TRANSCODE_QUEUE}." in row["subject"] for row in rows)


@pytest.fixture
async def swept(places: Places, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Swept]:
    files = MediaFiles(tmp_path / "media")
    files.prepare()
    place = await places.make(wiring.MIGRATIONS)
    async with place.open(clock=clock) as shards:
        store = SqlMediaStore(shards, MediaConfig().stock_limits)
        sweeper = Sweeper(
            store=store,
            files=files,
            clock=clock,
            period_s=1,
            lifetime=timedelta(hours=1),
            forgotten=timedelta(minutes=10),
        )
        yield Swept(shards, store, files, clock, sweeper)


def make_old(path: Path) -> None:
    moment = path.stat().st_mtime - GRACE_S - 1
    os.utime(path, (moment, moment))


async def test_an_open_upload_keeps_its_bytes_until_it_expires_and_is_forgotten_later(swept):
    upload = await swept.upload(b"film")
    path = swept.files.upload_path(upload.id)
    make_old(path)
    await swept.sweeper.sweep()
    assert path.exists()
    swept.clock.advance(3601)
    await swept.sweeper.sweep()
    assert not path.exists()
    expired = await swept.store.find_upload(upload.id)
    assert expired is not None and expired.state is UploadState.EXPIRED
    swept.clock.advance(3601)
    await swept.sweeper.sweep()
    assert await swept.store.find_upload(upload.id) is None


async def test_an_upload_that_moved_on_is_not_expired(swept):
    upload = await swept.upload(b"film")
    scope = Scope.of_tenant("default")
    kept = await swept.store.end_upload(
        upload.id,
        scope,
        UploadState.EXPIRED,
        keep_until=swept.clock.now(),
        if_stale_at=swept.clock.now(),
    )
    assert kept.is_open


async def test_bytes_without_a_row_are_freed_once_they_are_old(swept):
    stray = swept.files.upload_path(new_id(7))
    stray.write_bytes(b"stray")
    await swept.sweeper.sweep()
    assert stray.exists()
    make_old(stray)
    await swept.sweeper.sweep()
    assert not stray.exists()


async def test_only_the_holders_work_and_the_played_output_are_kept(swept):
    lease = timedelta(seconds=10)
    video = await swept.change(
        await swept.video(), lambda v: v.claimed(now=swept.clock.now(), lease=lease)
    )
    folders = {
        "held": swept.files.work_folder(video.id, 1),
        "older": swept.files.work_folder(video.id, 0),
        "nobody's": swept.files.work_folder(new_id(7), 1),
        "about to be recorded": swept.files.output_folder(video.id, 1),
        "lost": swept.files.output_folder(video.id, 9),
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
    await swept.sweeper.sweep()
    kept = {name for name, folder in folders.items() if folder.exists()}
    assert kept == {"held", "about to be recorded"}
    await swept.change(video, lambda v: v.ready((), now=swept.clock.now()))
    await swept.sweeper.sweep()
    assert {name for name, folder in folders.items() if folder.exists()} == {"about to be recorded"}
    assert swept.files.upload_path(video.upload_id).exists()
    await swept.change(video, lambda v: v.deleted())
    await swept.sweeper.sweep()
    assert not any(folder.exists() for folder in folders.values())
    assert not swept.files.upload_path(video.upload_id).exists()


async def test_a_forgotten_videos_job_is_given_once_more_and_not_twice(swept):
    await swept.video()
    assert await swept.job_count() == 1
    swept.clock.advance(601)
    await swept.sweeper.sweep()
    await swept.sweeper.sweep()
    assert await swept.job_count() == 2


async def test_one_upload_never_becomes_two_videos(swept):
    upload = await swept.upload(b"film")
    moment = swept.clock.now()
    await swept.store.complete_upload(upload, sha256="", now=moment, expires_at=moment)
    with pytest.raises(Exception, match="COMPLETED"):
        await swept.store.complete_upload(replace(upload), sha256="", now=moment, expires_at=moment)
    assert await swept.job_count() == 1
