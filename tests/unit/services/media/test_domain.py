from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.media.domain import (
    DISPLAY_NAME_CHARS_MAX,
    FAILURES_MAX,
    FailureReason,
    OffsetMismatch,
    Probe,
    RunFailed,
    RunLost,
    Source,
    SourceLimits,
    SourceRefused,
    TranscoderMissing,
    Upload,
    UploadClosed,
    UploadNotFound,
    UploadState,
    Video,
    VideoState,
    check_source,
    clean_display_name,
    clean_mime_type,
    ladder,
    upload_id_of,
)
from shared.db.ids import new_id

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OWNER = new_id(7)


def an_upload(**fields) -> Upload:
    values = {
        "id": new_id(7),
        "tenant": "default",
        "owner": OWNER,
        "size_bytes": 100,
        "committed_bytes": 0,
        "mime_type": "",
        "display_name": "film",
        "tus_metadata": "",
        "state": UploadState.OPEN,
        "video_id": None,
        "writer_token": 0,
        "created_at": NOW,
        "expires_at": NOW,
    }
    return Upload(**{**values, **fields})


def a_video(**fields) -> Video:
    values = {
        "id": new_id(7),
        "tenant": "default",
        "owner": OWNER,
        "version": 1,
        "upload_id": new_id(7),
        "display_name": "film",
        "state": VideoState.QUEUED,
        "size_bytes": 100,
        "sha256": "00",
        "created_at": NOW,
    }
    return Video(**{**values, **fields})


def a_source(width=1280, height=720, fps=30.0, duration_s=10.0) -> Source:
    return Source("mov,mp4", "h264", "aac", width, height, fps, duration_s)


def a_probe(source: Source | None = None, *, streams: int = 2) -> Probe:
    return Probe(source or a_source(), streams, 0, 1)


def test_the_newest_writer_fences_off_the_older():
    first = an_upload().with_writer(0)
    second = first.with_writer(0)
    second.check_writer(second.writer_token)
    with pytest.raises(OffsetMismatch):
        second.check_writer(first.writer_token)


@given(st.integers(0, 99), st.integers(0, 200))
def test_a_writer_starts_only_where_the_upload_stands(committed, offset):
    upload = an_upload(committed_bytes=committed)
    if offset == committed:
        assert upload.with_writer(offset).writer_token == 1
    else:
        with pytest.raises(OffsetMismatch) as refused:
            upload.with_writer(offset)
        assert refused.value.committed_bytes == committed


@given(st.lists(st.integers(-1, 100), max_size=8))
def test_an_offset_never_goes_back(offsets):
    upload = an_upload().with_writer(0)
    for offset in offsets:
        before = upload.committed_bytes
        try:
            upload = upload.advanced(offset, token=1, expires_at=NOW)
        except ValueError:
            assert not before <= offset <= upload.size_bytes
        assert upload.committed_bytes >= before


@pytest.mark.parametrize("state", [UploadState.TERMINATED, UploadState.EXPIRED])
def test_an_ended_upload_stays_ended_and_takes_no_writer(state):
    ended = an_upload().with_writer(0).ended(state)
    assert ended.ended(UploadState.TERMINATED) is ended
    with pytest.raises(UploadClosed):
        ended.with_writer(0)
    with pytest.raises(UploadClosed):
        ended.check_writer(1)


def test_a_completed_upload_cannot_be_given_up():
    completed = an_upload().completed(new_id(7))
    assert completed.committed_bytes == completed.size_bytes
    with pytest.raises(UploadClosed):
        completed.ended(UploadState.TERMINATED)


def test_a_second_claim_fences_off_the_first():
    first = a_video().claimed(now=NOW, lease=timedelta(seconds=10))
    second = first.claimed(now=NOW, lease=timedelta(seconds=10))
    assert second.held_by(second.job_token) is second
    with pytest.raises(RunLost):
        second.held_by(first.job_token)


def test_deletion_fences_off_the_worker():
    claimed = a_video().claimed(now=NOW, lease=timedelta(seconds=10))
    with pytest.raises(RunLost):
        claimed.deleted().held_by(claimed.job_token)


def test_failed_runs_end_in_failed_and_hopeless_ones_at_once():
    video = a_video()
    for run in range(1, FAILURES_MAX + 1):
        video = video.run_failed(RunFailed("broke").failure)
        assert video.state is (VideoState.FAILED if run == FAILURES_MAX else VideoState.QUEUED)
        assert (video.failure is not None) == (video.state is VideoState.FAILED)
    refused = SourceRefused(FailureReason.NOT_A_VIDEO, "no").failure
    assert a_video().run_failed(refused).state is VideoState.FAILED
    missing = a_video().run_failed(TranscoderMissing().failure)
    assert missing.state is VideoState.FAILED and missing.is_source_of_use


@given(st.lists(st.integers(-10, 200)))
def test_progress_only_grows_and_leaves_100_to_ready(percents):
    video, shown = a_video().claimed(now=NOW, lease=timedelta(1)), [0]
    for percent in percents:
        video = video.progressed(percent, lease_ends_at=NOW)
        shown.append(video.progress_percent)
    assert shown == sorted(shown) and shown[-1] <= 99
    assert video.ready((), now=NOW).progress_percent == 100


@given(st.text(max_size=500))
def test_any_name_is_cleaned_to_something_safe(text):
    name = clean_display_name(text)
    assert 1 <= len(name) <= DISPLAY_NAME_CHARS_MAX
    assert "/" not in name and "\\" not in name and name not in {".", ".."}
    assert name.isprintable() or " " in name
    assert not any(char in name for char in "\r\n\0\u202e\u2066")
    assert clean_display_name(name) == name


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("Video/MP4", "video/mp4"), ("", ""), ("video", ""), ("a/b\r\nX: y", ""), ("a/b/c", "")],
)
def test_a_media_type_is_kept_only_if_it_is_one(sent, kept):
    assert clean_mime_type(sent) == kept


@pytest.mark.parametrize(
    "text",
    ["", "x", str(uuid4()), str(UUID(int=0)), "../x"],
    ids=["none", "short", "v4", "nil", "path"],
)
def test_only_canonical_ids_of_ours_name_an_upload(text):
    with pytest.raises(UploadNotFound):
        upload_id_of(text)
    known = new_id(3)
    assert upload_id_of(f"uploads/{known}") == known
    with pytest.raises(UploadNotFound):
        upload_id_of(str(known).upper().replace("-", ""))


@given(st.integers(16, 8192), st.integers(16, 8192), st.floats(1, 120))
def test_the_ladder_has_two_even_rungs_that_never_enlarge(width, height, fps):
    upper, lower = ladder(a_source(width, height, fps))
    assert upper.height > lower.height or upper.height <= 2
    for rung in (upper, lower):
        assert rung.width % 2 == rung.height % 2 == 0
        assert rung.height <= max(height, 2) and rung.width <= max(width, 2)
        assert rung.width >= 2 and rung.height >= 2


@pytest.mark.parametrize(
    ("height", "heights"),
    [(2160, (720, 360)), (720, (720, 360)), (480, (480, 360)), (360, (360, 180)), (121, (120, 60))],
)
def test_the_ladders_heights(height, heights):
    assert tuple(rung.height for rung in ladder(a_source(height=height))) == heights


OVER = {
    "pixels": a_probe(a_source(16384, 16384)),
    "frame rate": a_probe(a_source(fps=1000.0)),
    "length": a_probe(a_source(duration_s=100 * 3600.0)),
    "streams": a_probe(streams=500),
    "one pixel": a_probe(a_source(1, 1)),
}


@pytest.mark.parametrize("probe", OVER.values(), ids=OVER.keys())
def test_a_source_over_a_cap_is_refused(probe):
    with pytest.raises(SourceRefused) as refused:
        check_source(probe, SourceLimits())
    assert refused.value.failure.reason is FailureReason.SOURCE_OVER_LIMIT


def test_a_source_without_length_is_no_film():
    with pytest.raises(SourceRefused) as refused:
        check_source(a_probe(a_source(duration_s=0)), SourceLimits())
    assert refused.value.failure.reason is FailureReason.NOT_A_VIDEO
