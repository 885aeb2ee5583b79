"""What one owner may store and have converted: reserved first, then held, used up or released."""

import grpc
import pytest
from tenfold.media.v1 import media_pb2

from tests.integration.services.media.service import new_user


async def test_bytes_count_from_the_first_announcement_until_the_video_is_deleted(
    own_media, small_film
):
    await own_media.start()
    size = len(small_film)
    async with own_media.client(new_user()) as client:
        upload = await client.create(size)
        assert own_media.stocks() == {"stored-bytes": (0, size)}
        answer = await client.patch(upload, 0, small_film)
        video = await client.finished(answer.headers["upload-video"])
        assert video.state == media_pb2.Video.STATE_READY
        assert own_media.stocks() == {"stored-bytes": (size, 0), "transcode-seconds": (1, 0)}
        await client.delete(video.name)
        assert own_media.stocks() == {"transcode-seconds": (1, 0)}  # a second used stays used
        given_up = await client.create(size)
        await client.tus("DELETE", given_up)
        assert own_media.stocks() == {"transcode-seconds": (1, 0)}


async def test_beyond_its_stock_an_owner_is_refused_before_the_first_byte(own_media, small_film):
    await own_media.start(TENFOLD_MEDIA_STORED_BYTES_MAX=str(len(small_film) + 10))
    async with own_media.client(new_user()) as client, own_media.client(new_user()) as other:
        await client.create(len(small_film))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await client.create(11)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "11 of stored-bytes are asked for, and 10 of" in refusal.value.details()
        await client.create(10)
        await other.create(len(small_film))


async def test_beyond_a_days_stock_a_film_is_not_converted_and_nothing_is_kept_of_it(
    own_media, small_film
):
    await own_media.start(TENFOLD_MEDIA_TRANSCODE_S_PER_DAY_MAX="1")
    async with own_media.client(new_user()) as client:
        first = await client.finished(await client.upload(small_film))
        second = await client.finished(await client.upload(small_film))
    assert first.state == media_pb2.Video.STATE_READY
    assert second.failure.reason == media_pb2.ERROR_REASON_TRANSCODE_QUOTA_EXCEEDED
    assert own_media.stocks() == {
        "stored-bytes": (len(small_film), 0),
        "transcode-seconds": (1, 0),
    }


async def test_bytes_that_are_no_video_take_no_stock(own_media):
    await own_media.start()
    async with own_media.client(new_user()) as client:
        video = await client.finished(await client.upload(b"no film" * 1000))
    assert video.failure.reason == media_pb2.ERROR_REASON_NOT_A_VIDEO
    assert own_media.stocks() == {}
