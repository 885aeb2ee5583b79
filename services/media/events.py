"""What media emits, and the job it gives itself."""

from datetime import datetime
from uuid import UUID

from google.protobuf.message import Message
from tenfold.media.v1 import media_pb2
from tenfold.media.v1.media_events_pb2 import VideoDeleted, VideoFailed, VideoQueued, VideoReady

from services.media.domain import Failure, Video, user_name, video_id_of, video_name
from shared.clock import to_us
from shared.db.port import OutboxRow

TRANSCODE_QUEUE = "transcode"
TRANSCODE_JOB = "TranscodeVideo"


def video_queued(video: Video) -> OutboxRow:
    """Every byte is durable."""
    message = VideoQueued(
        video=video_name(video.id),
        owner=user_name(video.owner),
        display_name=video.display_name,
        size_bytes=video.size_bytes,
    )
    message.queue_time.FromMicroseconds(to_us(video.created_at))
    return _row(video, message)


def video_ready(video: Video) -> OutboxRow:
    """The video can be played."""
    assert video.ready_at is not None and video.source is not None
    message = VideoReady(
        video=video_name(video.id),
        owner=user_name(video.owner),
        display_name=video.display_name,
        duration_s=video.source.duration_s,
        rendition_count=len(video.renditions),
    )
    message.ready_time.FromMicroseconds(to_us(video.ready_at))
    return _row(video, message)


def video_failed(video: Video, *, now: datetime) -> OutboxRow:
    """The video cannot be played."""
    assert video.failure is not None
    message = VideoFailed(
        video=video_name(video.id),
        owner=user_name(video.owner),
        display_name=video.display_name,
        failure=failure_to_proto(video.failure),
    )
    message.fail_time.FromMicroseconds(to_us(now))
    return _row(video, message)


def video_deleted(video: Video, *, now: datetime) -> OutboxRow:
    """The video and its files are gone."""
    message = VideoDeleted(video=video_name(video.id), owner=user_name(video.owner))
    message.delete_time.FromMicroseconds(to_us(now))
    return _row(video, message)


def transcode_job(video: Video) -> OutboxRow:
    """Work for a worker. Repeating it is harmless: a final video is only acknowledged.

    Its aggregate is not the video: a job would leave a hole in the numbers of its events.
    """
    name = video_name(video.id)
    return OutboxRow(
        type=TRANSCODE_JOB,
        aggregate=f"{name}/jobs",
        payload=name.encode(),
        tenant=video.tenant,
        queue=TRANSCODE_QUEUE,
    )


def video_id_of_job(payload: bytes) -> UUID:
    """The video that transcode_job named.

    Raises:
        VideoNotFound: the payload is not ours.
    """
    return video_id_of(payload.decode(errors="replace"))


def failure_to_proto(failure: Failure) -> media_pb2.Failure:
    """Why a video is FAILED, as the contract says it."""
    return media_pb2.Failure(
        reason=media_pb2.ErrorReason.Value(f"ERROR_REASON_{failure.reason}"),
        description=failure.description,
        retryable=failure.is_retryable,
    )


def _row(video: Video, message: Message) -> OutboxRow:
    return OutboxRow(
        type=message.DESCRIPTOR.full_name,
        aggregate=video_name(video.id),
        payload=message.SerializeToString(),
        tenant=video.tenant,
    )
