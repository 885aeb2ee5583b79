import contextlib
import http.server
import threading
from pathlib import Path

import av
import grpc
import pytest
from tenfold.media.v1 import media_pb2

from tests.integration.services.media.conftest import make_film
from tests.integration.services.media.service import MediaProcess, new_user, until

State = media_pb2.Video
CANARY = "canary-that-nobody-may-read"


def decoded(playlist: Path) -> tuple[int, int, int]:
    """Width, height and number of pictures that a player gets."""
    with av.open(str(playlist), options={"allowed_extensions": "ALL"}) as container:
        stream = max(container.streams.video, key=lambda stream: stream.height)
        frames = list(container.decode(stream))
    return frames[0].width, frames[0].height, len(frames)


async def test_a_film_becomes_two_renditions_that_play(media, film, tmp_path):
    async with media.client(new_user()) as client:
        video = await client.finished(await client.upload(film))
        assert video.state == State.STATE_READY, video
        assert (video.source.width, video.source.height) == (1280, 720)
        assert (video.source.video_codec, video.source.audio_codec) == ("h264", "aac")
        assert [(r.width, r.height) for r in video.renditions] == [(1280, 720), (640, 360)]
        assert video.progress_percent == 100
        assert video.playlist_path == f"/v1/{video.name}/files/master.m3u8"
        master = await client.download(video, tmp_path)
        assert decoded(master) == (1280, 720, 60)
        assert decoded(tmp_path / "360p.m3u8") == (640, 360, 60)
        for rendition in video.renditions:
            assert rendition.bits_per_second > 10_000
            assert rendition.playlist_path.endswith(f"/{rendition.height}p.m3u8")
        assert not list((media.media / "work").iterdir())


async def test_a_watcher_sees_the_states_in_order_and_the_stream_ends(media, film):
    async with media.client(new_user()) as client:
        name = await client.upload(film)
        seen = [video async for video in client.watch(name)]
        assert seen[-1].state == State.STATE_READY
        states = [video.state for video in seen]
        assert states == sorted(states)
        assert {State.STATE_TRANSCODING, State.STATE_READY} <= set(states)
        versions = [video.version for video in seen]
        assert versions == sorted(set(versions))
        percents = [video.progress_percent for video in seen]
        assert percents == sorted(percents)
        again = [video async for video in client.watch(name)]
        assert [video.state for video in again] == [State.STATE_READY]


async def failure_of(media: MediaProcess, data: bytes, *, name: str = "x.mp4") -> media_pb2.Video:
    """The FAILED video that these bytes become; what is of no use any more is freed."""
    async with media.client(new_user()) as client:
        upload = await client.create(len(data), name=name)
        answer = await client.patch(upload, 0, data)
        video = await client.finished(answer.headers["upload-video"])
        assert video.state == State.STATE_FAILED, video
        assert not video.playlist_path and not video.renditions
        if not video.failure.retryable:
            path = media.media / "uploads" / upload
            await until(lambda: not path.exists(), timeout_s=10)
        return video


NO_FILMS = {
    "text": b"I am no film.\n" * 50,
    "pdf": b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n" * 20,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "zip": b"PK\x03\x04" + bytes(400),
    "concat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("data", NO_FILMS.values(), ids=NO_FILMS.keys())
async def test_what_is_no_film_fails_with_a_reason(media, data):
    video = await failure_of(media, data)
    assert video.failure.reason == media_pb2.ERROR_REASON_NOT_A_VIDEO
    assert video.failure.description and not video.failure.retryable
    assert str(media.folder) not in video.failure.description


class CanaryServer:
    """Counts who asks; a play-list must not make us ask."""

    def __init__(self) -> None:
        self.asked = 0
        canary = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                canary.asked += 1
                self.send_response(404)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    def __enter__(self) -> "CanaryServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


async def test_a_play_list_reads_neither_files_nor_the_network(media, tmp_path):
    canary = tmp_path / "canary.ts"
    canary.write_text(CANARY)
    with CanaryServer() as server:
        for target in (
            f"file://{canary}",
            str(canary),
            f"http://127.0.0.1:{server.server.server_port}/x.ts",
            f"concat:{canary}",
        ):
            playlist = (
                "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n" + target + "\n#EXT-X-ENDLIST\n"
            )
            video = await failure_of(media, playlist.encode(), name="x.m3u8")
            assert video.failure.reason == media_pb2.ERROR_REASON_NOT_A_VIDEO
            assert CANARY not in str(video)
        assert server.asked == 0


async def test_a_truncated_film_fails_and_says_that_it_is_cut_short(media, film, tmp_path):
    path = tmp_path / "long.mp4"
    make_film(path, "-movflags", "+faststart", "-b:v", "2M", size="320x180", seconds=8)
    whole = path.read_bytes()
    video = await failure_of(media, whole[: len(whole) // 3])
    assert video.failure.reason == media_pb2.ERROR_REASON_NOT_A_VIDEO
    assert "cut short" in video.failure.description
    make_film(path, size="320x180")  # its index is at its end
    video = await failure_of(media, path.read_bytes()[:-3000])
    assert video.failure.reason == media_pb2.ERROR_REASON_NOT_A_VIDEO


SHAPES = {
    "upright": ("360x640", [(360, 640), (202, 360)]),
    "small": ("160x120", [(160, 120), (80, 60)]),
    "odd": ("641x481", [(640, 480), (480, 360)]),
    "large": ("1920x1080", [(1280, 720), (640, 360)]),
}


@pytest.mark.parametrize(("size", "expected"), SHAPES.values(), ids=SHAPES.keys())
async def test_no_shape_is_enlarged(media, tmp_path, size, expected):
    path = tmp_path / "film.mkv"
    make_film(path, "-pix_fmt", "yuv444p", size=size, seconds=0.5)
    async with media.client(new_user()) as client:
        video = await client.finished(await client.upload(path.read_bytes()))
        assert video.state == State.STATE_READY, video
        assert [(r.width, r.height) for r in video.renditions] == expected


@pytest.mark.parametrize("suffix", ["webm", "avi", "ts"])
async def test_every_container_of_the_list_is_read(media, tmp_path, suffix):
    options = ("-c:v", "libvpx", "-c:a", "libvorbis") if suffix == "webm" else ()
    path = make_film(tmp_path / f"film.{suffix}", *options, size="320x180", seconds=1)
    async with media.client(new_user()) as client:
        video = await client.finished(await client.upload(path.read_bytes()))
        assert video.state == State.STATE_READY, video
        assert abs(video.source.duration_s - 1) < 0.3


async def test_a_film_without_sound_or_stated_length_plays(media, tmp_path):
    path = make_film(
        tmp_path / "film.mkv", "-an", "-live", "1", "-f", "matroska", size="320x180", seconds=1
    )
    async with media.client(new_user()) as client:
        video = await client.finished(await client.upload(path.read_bytes()))
        assert video.state == State.STATE_READY, video
        assert 0.8 < video.source.duration_s < 1.2 and not video.source.audio_codec


async def test_a_source_over_a_cap_is_refused_with_the_cap(own_media, tmp_path):
    await own_media.start(
        TENFOLD_MEDIA_PIXELS_MAX="60000",
        TENFOLD_MEDIA_DURATION_S_MAX="1",
        TENFOLD_MEDIA_FRAMES_PER_SECOND_MAX="25",
    )
    large = make_film(tmp_path / "large.mp4", size="320x200", seconds=0.5).read_bytes()
    fast = make_film(tmp_path / "fast.mp4", size="64x48", seconds=0.5).read_bytes()
    long = make_film(tmp_path / "long.mp4", "-r", "10", size="64x48", seconds=2).read_bytes()
    tiny = make_film(tmp_path / "tiny.mp4", "-r", "10", size="8x8", seconds=0.5).read_bytes()
    for data, word in ((large, "pixels"), (fast, "frames"), (long, "seconds"), (tiny, "side")):
        video = await failure_of(own_media, data)
        assert video.failure.reason == media_pb2.ERROR_REASON_SOURCE_OVER_LIMIT
        assert word in video.failure.description


async def test_without_ffmpeg_the_service_serves_and_each_video_says_what_is_missing(
    own_media, small_film
):
    await own_media.start(TENFOLD_FFMPEG_BIN="/nowhere/ffmpeg")
    async with own_media.client(new_user()) as client:
        video = await client.finished(await client.upload(small_film))
        assert video.failure.reason == media_pb2.ERROR_REASON_TRANSCODER_MISSING
        assert video.failure.retryable


async def test_a_transcoder_that_hangs_is_killed_with_all_it_started_and_the_video_fails(
    own_media, small_film, tmp_path
):
    # A real program in ffmpeg's place: it starts another and says nothing.
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\n/bin/sleep 12345 &\n/bin/sleep 12345\n")
    fake.chmod(0o755)
    await own_media.start(
        TENFOLD_FFMPEG_BIN=str(fake), TENFOLD_MEDIA_STALL_S="0.5", TENFOLD_MEDIA_LEASE_S="2"
    )
    async with own_media.client(new_user()) as client:
        video = await client.finished(await client.upload(small_film))
        assert video.failure.reason == media_pb2.ERROR_REASON_TRANSCODE_FAILED
        assert video.failure.retryable
    assert not is_running(b"12345")


def is_running(argument: bytes) -> bool:
    """Whether any process has this argument."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument in path.read_bytes().split(b"\0"):
                return True
    return False


async def test_a_deleted_video_is_gone_its_bytes_too_also_while_it_is_converted(media, tmp_path):
    film = make_film(tmp_path / "long.mp4", "-b:v", "4M", seconds=20).read_bytes()
    async with media.client(new_user()) as client:
        name = await client.upload(film)
        is_deleted, last = False, None
        async for last in client.watch(name):
            if last.state == State.STATE_TRANSCODING and not is_deleted:
                await client.delete(name)
                is_deleted = True
        assert last.state == State.STATE_DELETED
        await client.delete(name)  # once more changes nothing
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.get(name)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert name not in [video.name for video in (await client.list()).videos]
        video_id = name.rpartition("/")[2]
        await until(lambda: not list(media.media.rglob(f"*{video_id}*")), timeout_s=10)


async def test_another_users_video_and_its_files_look_absent(media, small_film):
    async with media.client(new_user()) as owner, media.client(new_user()) as other:
        video = await owner.finished(await owner.upload(small_film))

        async def watch() -> None:
            async for _ in other.watch(video.name):
                pass

        for call in (
            other.get(video.name),
            other.delete(video.name),
            watch(),
            other.file(video.name, "master.m3u8"),
            other.get("videos/none"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert not (await other.list()).videos
        assert (await owner.get(video.name)).state == State.STATE_READY


FILE_TRICKS = [
    "",
    "..",
    "../../../secret",
    "..%2f..%2fsecret",
    "master.m3u8/../../x",
    "/etc/passwd",
    "720p_00000.mp4",
    "MASTER.M3U8",
]


async def test_only_files_that_we_made_are_served(media, film):
    async with media.client(new_user()) as client:
        video = await client.finished(await client.upload(film))
        answer = await client.file(video.name, "720p_00000.ts")
        assert (answer.status, answer.content_type) == (200, "video/mp2t")
        assert answer.headers["content-length"] == str(len(answer.body))
        master = await client.file(video.name, "master.m3u8")
        assert master.content_type == "application/vnd.apple.mpegurl"
        for trick in FILE_TRICKS:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client.file(video.name, trick)
            assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.file(video.name, "999p.m3u8")
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


async def test_pages_of_videos_come_newest_first_and_a_foreign_token_is_refused(media):
    async with media.client(new_user()) as client, media.client(new_user()) as other:
        names = [await client.upload(b"no film %d" % number) for number in range(3)]
        first = await client.list(page_size=2)
        second = await client.list(page_size=2, page_token=first.next_page_token)
        found = [video.name for page in (first, second) for video in page.videos]
        assert found == names[::-1]
        assert not second.next_page_token
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await other.list(page_token=first.next_page_token)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\films\\holiday.mp4", "holiday.mp4"),
        ("a\r\nSet-Cookie: x", "aSet-Cookie: x"),
        ("fdp\u202e4pm.exe", "fdp4pm.exe"),
        ("\0", "untitled"),
        ("x" * 3000, "x" * 200),
    ],
)
async def test_a_file_name_is_only_ever_shown_and_cleaned(media, sent, shown):
    async with media.client(new_user()) as client:
        upload = await client.create(5, name=sent)
        assert (await client.get_upload(upload)).display_name == shown
