import asyncio
import base64
import hashlib
import zlib

import grpc
import pytest

from tests.integration.services.media.service import MediaProcess, new_user, until


def code_of(refused: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> grpc.StatusCode:
    return refused.value.code()


async def test_the_last_byte_answers_upload_successful_and_names_the_video(media, film):
    async with media.client(new_user()) as client:
        upload = await client.create(len(film))
        answer = await client.patch(upload, 0, film)
        assert answer.status == 204
        assert answer.headers["upload-message"] == "Upload successful"
        assert answer.headers["upload-offset"] == str(len(film))
        state = await client.get_upload(upload)
        assert (state.video, state.message) == (
            answer.headers["upload-video"],
            "Upload successful",
        )
        assert await client.offset(upload) == len(film)
        video = await client.get(state.video)
        assert video.source.sha256 == hashlib.sha256(film).hexdigest()
        await client.delete(state.video)


async def test_an_upload_cut_many_times_resumes_to_the_same_sha256(media, film):
    async with media.client(new_user()) as client:
        upload = await client.create(len(film))
        cuts = [len(film) * part // 7 for part in range(1, 7)]
        for cut in cuts:
            offset = await client.offset(upload)
            await client.patch(upload, offset, film[offset:cut], cut=True)
            async with asyncio.timeout(10):
                while await client.offset(upload) < cut:  # noqa: ASYNC110 -- a HEAD asks
                    await asyncio.sleep(0.05)
        answer = await client.patch(upload, cuts[-1], film[cuts[-1] :])
        video = await client.get(answer.headers["upload-video"])
        assert video.source.sha256 == hashlib.sha256(film).hexdigest()
        await client.delete(video.name)


async def test_a_replayed_or_early_chunk_is_refused_with_the_true_offset(media, film):
    async with media.client(new_user()) as client:
        upload = await client.create(len(film))
        assert (await client.patch(upload, 0, film[:1000])).status == 204
        for wrong in (0, 999, 1001, len(film)):
            answer = await client.patch(upload, wrong, film[wrong : wrong + 10])
            assert (answer.status, answer.headers["upload-offset"]) == (409, "1000")
            assert answer.content_type == "application/problem+json"
        assert await client.offset(upload) == 1000


async def test_of_two_writers_one_goes_on_and_nothing_is_mixed(media, film):
    async with media.client(new_user()) as client:
        upload = await client.create(len(film))
        answers = await asyncio.gather(*(client.patch(upload, 0, film) for _ in range(6)))
        winners = [answer for answer in answers if answer.status == 204]
        assert winners and all(a.status in {204, 409} for a in answers), answers
        video = await client.get((await client.get_upload(upload)).video)
        assert video.source.sha256 == hashlib.sha256(film).hexdigest()
        assert len((await client.list()).videos) == 1
        await client.delete(video.name)


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "crc32"])
async def test_a_chunk_with_a_wrong_checksum_is_discarded(media, film, algorithm):
    def checksum(data: bytes) -> str:
        digest = (
            zlib.crc32(data).to_bytes(4, "big")
            if algorithm == "crc32"
            else hashlib.new(algorithm, data).digest()
        )
        return f"{algorithm} {base64.b64encode(digest).decode()}"

    async with media.client(new_user()) as client:
        upload = await client.create(len(film))
        wrong = {"upload-checksum": checksum(b"other")}
        answer = await client.patch(upload, 0, film[:5000], headers=wrong)
        assert answer.status == 460
        assert await client.offset(upload) == 0
        right = {"upload-checksum": checksum(film[:5000])}
        assert (await client.patch(upload, 0, film[:5000], headers=right)).status == 204
        assert await client.offset(upload) == 5000


async def test_bytes_beyond_the_length_are_refused_and_not_kept(media, film):
    async with media.client(new_user()) as client:
        upload = await client.create(1000)
        answer = await client.patch(upload, 0, film[:1001])
        assert answer.status == 413
        announced = await client.patch(upload, 0, film[:10], headers={"content-length": "1001"})
        assert announced.status == 413
        assert await client.offset(upload) == 0
        too_large = await client.tus("POST", headers={"upload-length": str(2**40)})
        assert (too_large.status, "tus-max-size" in too_large.headers) == (413, True)


BAD_CREATIONS = {
    "no length": {},
    "zero": {"upload-length": "0"},
    "negative": {"upload-length": "-1"},
    "words": {"upload-length": "ten"},
    "huge": {"upload-length": "9" * 30},
    "deferred": {"upload-defer-length": "1"},
    "base64": {"upload-length": "5", "upload-metadata": "filename !!!"},
    "twice": {"upload-length": "5", "upload-metadata": "a YQ==,a Yg=="},
    "empty key": {"upload-length": "5", "upload-metadata": ",a YQ=="},
}


@pytest.mark.parametrize("headers", BAD_CREATIONS.values(), ids=BAD_CREATIONS.keys())
async def test_a_malformed_creation_is_invalid(media, headers):
    async with media.client(new_user()) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.tus("POST", headers=headers)
        assert code_of(refused) == grpc.StatusCode.INVALID_ARGUMENT


async def test_another_version_of_tus_is_refused_and_options_tells_ours(media):
    async with media.client(new_user()) as client:
        answer = await client.tus("POST", headers={"tus-resumable": "0.2.2", "upload-length": "5"})
        assert (answer.status, answer.headers["tus-version"]) == (412, "1.0.0")
        options = await client.tus("OPTIONS")
        assert options.headers["tus-extension"] == "creation,termination,checksum,expiration"
        assert "sha1" in options.headers["tus-checksum-algorithm"]


async def test_a_patch_of_another_content_type_is_refused(media):
    async with media.client(new_user()) as client:
        upload = await client.create(5)
        answer = await client.patch(upload, 0, b"12345", headers={"content-type": "video/mp4"})
        assert answer.status == 415


async def test_a_repeated_creation_makes_one_upload_and_another_under_its_key_is_refused(media):
    async with media.client(new_user()) as client:
        first = await client.create(5, key="one")
        again = await client.tus(
            "POST",
            headers={"upload-length": "5", "upload-metadata": "filename ZmlsbS5tcDQ="},
            key="one",
        )
        assert again.headers["location"] == f"/v1/files/{first}"
        assert again.headers["idempotency-replayed"] == "true"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.create(6, key="one")
        assert code_of(refused) == grpc.StatusCode.INVALID_ARGUMENT


async def test_another_users_upload_looks_absent(media, film):
    async with media.client(new_user()) as owner, media.client(new_user()) as other:
        upload = await owner.create(len(film))
        for call in (
            other.tus("HEAD", upload),
            other.patch(upload, 0, film[:10]),
            other.tus("DELETE", upload),
            other.get_upload(upload),
            other.get_upload("0" * 36),
            other.tus("HEAD", "../../etc/passwd"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert code_of(refused) == grpc.StatusCode.NOT_FOUND
        assert await owner.offset(upload) == 0


async def test_a_terminated_upload_is_gone_and_its_bytes_are_freed(media, film):
    async with media.client(new_user()) as client:
        upload = await client.create(len(film))
        await client.patch(upload, 0, film[:5000])
        assert (media.media / "uploads" / upload).exists()
        for _ in range(2):
            assert (await client.tus("DELETE", upload)).status == 204
        assert not (media.media / "uploads" / upload).exists()
        assert (await client.tus("HEAD", upload)).status == 410
        assert (await client.patch(upload, 5000, film[5000:5010])).status == 410


async def test_a_lost_answer_to_the_last_byte_can_be_asked_for_again(media, film):
    async with media.client(new_user()) as client:
        upload = await client.create(100)
        first = await client.patch(upload, 0, b"x" * 100)
        again = await client.patch(upload, 100, b"")
        assert first.headers.pop("causal-token")  # only the one that wrote has it
        assert again.headers == first.headers
        late = await client.patch(upload, 0, b"x" * 100)
        assert (late.status, late.headers["upload-offset"]) == (409, "100")
        assert (await client.tus("DELETE", upload)).status == 409


async def test_an_unfinished_upload_expires_and_its_bytes_are_freed(own_media: MediaProcess):
    await own_media.start(TENFOLD_MEDIA_UPLOAD_LIFETIME_S="2")
    async with own_media.client(new_user()) as client:
        upload = await client.create(1000)
        await client.patch(upload, 0, b"x" * 10)
        path = own_media.media / "uploads" / upload
        assert path.exists()
        await until(lambda: not path.exists(), timeout_s=15)
        assert (await client.tus("HEAD", upload)).status == 410


async def test_a_file_longer_than_its_offset_is_cut_before_bytes_are_added(media, film):
    async with media.client(new_user()) as client:
        upload = await client.create(len(film))
        await client.patch(upload, 0, film[:5000])
        with (media.media / "uploads" / upload).open("ab") as file:
            file.write(b"never committed" * 1000)
        answer = await client.patch(upload, 5000, film[5000:])
        video = await client.get(answer.headers["upload-video"])
        assert video.source.sha256 == hashlib.sha256(film).hexdigest()
        await client.delete(video.name)


async def test_nobody_has_more_open_than_the_limit(own_media: MediaProcess):
    await own_media.start(TENFOLD_MEDIA_OPEN_UPLOADS_MAX="2", TENFOLD_MEDIA_OPEN_BYTES_MAX="100")
    async with own_media.client(new_user()) as client:
        await client.create(50)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.create(51)
        assert code_of(refused) == grpc.StatusCode.RESOURCE_EXHAUSTED
        await client.create(50)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.create(1)
        assert code_of(refused) == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_no_answer_loses_its_status_in_a_burst(media):
    async with media.client(new_user()) as client:
        upload = await client.create(5)
        for _ in range(10):
            answers = await asyncio.gather(*(client.tus("HEAD", upload) for _ in range(20)))
            assert {answer.status for answer in answers} == {200}
