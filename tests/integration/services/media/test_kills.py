"""The process is killed at each named point; what was acknowledged holds, nothing is doubled."""

import asyncio
import contextlib
import hashlib
import sqlite3

import grpc
import pytest
from tenfold.media.v1 import media_pb2

from tests.integration.services.media.service import MediaProcess, new_user, until

# What a film of half a second takes of a day's stock, used and reserved.
ONE_SECOND = {"transcode-seconds": (1, 0)}


def events_of(media: MediaProcess, video: str) -> list[str]:
    """The types of the video's events, in their order."""
    found = []
    for path in (media.media / "shards").glob("*.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            tables = connection.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'outbox'"
            ).fetchall()
            if tables:
                found += connection.execute(
                    "SELECT subject FROM outbox WHERE aggregate = ? ORDER BY event_no", (video,)
                ).fetchall()
    return [subject.split(".")[2] for (subject,) in found]


@pytest.mark.parametrize(
    "point",
    [
        "media.bytes_synced_not_committed",
        "media.whole_synced_not_completed",
        "media.completed_before_reply",
    ],
)
async def test_an_upload_goes_on_after_a_kill_and_makes_one_video(own_media, small_film, point):
    await own_media.start(TENFOLD_CRASH_POINT=point)
    user = new_user()
    async with own_media.client(user) as client:
        upload = await client.create(len(small_film))
        with pytest.raises(grpc.aio.AioRpcError):
            await client.patch(upload, 0, small_film[:4000])
            await client.patch(upload, 4000, small_film[4000:])
    await own_media.wait_dead()
    await own_media.start()
    async with own_media.client(user) as client:
        offset = await client.offset(upload)
        assert offset in {0, 4000, len(small_film)}
        answer = await client.patch(upload, offset, small_film[offset:])
        assert answer.headers["upload-message"] == "Upload successful"
        video = await client.finished(answer.headers["upload-video"])
        assert video.state == media_pb2.Video.STATE_READY
        assert video.source.sha256 == hashlib.sha256(small_film).hexdigest()
        assert len((await client.list()).videos) == 1
        assert events_of(own_media, video.name) == ["VideoQueued", "VideoReady"]
        assert own_media.stocks() == {"stored-bytes": (len(small_film), 0), **ONE_SECOND}


@pytest.mark.parametrize(
    "point",
    [
        "media.claimed_not_probed",
        "media.output_made_not_published",
        "media.output_published_not_recorded",
        "media.ready_not_acked",
        "jobs.done_not_acked",
    ],
)
async def test_a_worker_killed_at_a_point_is_followed_by_one_that_makes_the_video_once(
    own_media, small_film, point
):
    await own_media.start(TENFOLD_CRASH_POINT=point)
    user = new_user()
    async with own_media.client(user) as client:
        name = await client.upload(small_film)
    await own_media.wait_dead()
    await own_media.start()
    async with own_media.client(user) as client:
        video = await client.finished(name)
        assert video.state == media_pb2.Video.STATE_READY, video
        assert (await client.file(name, "master.m3u8")).status == 200
        assert events_of(own_media, name) == ["VideoQueued", "VideoReady"]
        assert own_media.stocks() == {"stored-bytes": (len(small_film), 0), **ONE_SECOND}
        videos, work = own_media.media / "videos", own_media.media / "work"

        def is_swept() -> bool:
            return len(list(videos.glob("*/*"))) == 1 and not list(work.iterdir())

        await until(is_swept, timeout_s=15)


async def test_two_processes_that_share_a_folder_do_not_mix_an_upload(own_media, film):
    await own_media.start()
    other = MediaProcess(own_media.folder, own_media.nats_url)
    await other.start()
    user = new_user()
    try:
        async with own_media.client(user) as one, other.client(user) as two:
            upload = await one.create(len(film))
            offset = 0
            while offset < len(film):
                parts = (one.patch(upload, offset, film[offset : offset + 300_000]),)
                parts += (two.patch(upload, offset, film[offset : offset + 200_000]),)
                await asyncio.gather(*parts)
                offset = await two.offset(upload)
            video = await one.get((await two.get_upload(upload)).video)
            assert video.source.sha256 == hashlib.sha256(film).hexdigest()
            final = await two.finished(video.name)
            assert final.state == media_pb2.Video.STATE_READY
            assert events_of(own_media, video.name) == ["VideoQueued", "VideoReady"]
    finally:
        other.stop()
