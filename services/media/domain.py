"""Uploads and videos: values and rules, pure."""

import unicodedata
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Self
from uuid import UUID

from shared.errors import (
    Aborted,
    FailedPrecondition,
    NotFound,
    QuotaExceeded,
)

UPLOAD_COLLECTION = "uploads/"
VIDEO_COLLECTION = "videos/"
USER_COLLECTION = "users/"
UPLOAD_SUCCESSFUL = "Upload successful"
DISPLAY_NAME_CHARS_MAX = 200
DISPLAY_NAME_DEFAULT = "untitled"
NO_TOKEN = 0

FAILURES_MAX = 3
"""Runs that ended with a reported failure before a video is FAILED."""

CLAIMS_MAX = 25
"""Runs that began. Generous: most of those that end without a word were stopped from
outside (a deploy, a kill), and only a few by what they were decoding."""


class UploadState(StrEnum):
    """See tenfold.media.v1.Upload.State."""

    OPEN = "OPEN"
    COMPLETED = "COMPLETED"
    TERMINATED = "TERMINATED"
    EXPIRED = "EXPIRED"


class VideoState(StrEnum):
    """See tenfold.media.v1.Video.State."""

    QUEUED = "QUEUED"
    PROBING = "PROBING"
    TRANSCODING = "TRANSCODING"
    READY = "READY"
    FAILED = "FAILED"
    DELETED = "DELETED"

    @property
    def is_final(self) -> bool:
        """Whether no worker will change it any more."""
        return self in {VideoState.READY, VideoState.FAILED, VideoState.DELETED}


class FailureReason(StrEnum):
    """Why a video cannot be played; names of tenfold.media.v1.ErrorReason."""

    NOT_A_VIDEO = "NOT_A_VIDEO"
    SOURCE_OVER_LIMIT = "SOURCE_OVER_LIMIT"
    TRANSCODER_MISSING = "TRANSCODER_MISSING"
    TRANSCODE_FAILED = "TRANSCODE_FAILED"
    TRANSCODE_QUOTA_EXCEEDED = "TRANSCODE_QUOTA_EXCEEDED"


# Errors ---------------------------------------------------------------------------------


class UploadNotFound(NotFound):
    """There is no such upload for this caller."""

    def __init__(self, upload_id: UUID | str) -> None:
        super().__init__(f"There is no upload {upload_id}.")


class VideoNotFound(NotFound):
    """There is no such video for this caller."""

    def __init__(self, video_id: UUID | str) -> None:
        super().__init__(f"There is no video {video_id}.")


class FileNotServed(NotFound):
    """The video has no such file, or cannot be played yet."""

    def __init__(self) -> None:
        super().__init__("The video has no such file, or is not READY.")


class UploadClosed(FailedPrecondition):
    """The upload has ended: completed, terminated or expired."""

    reason = "UPLOAD_CLOSED"

    def __init__(self, state: UploadState) -> None:
        super().__init__(f"The upload is {state}.", metadata={"state": state})
        self.state = state


class TooManyUploads(QuotaExceeded):
    """The caller has as much open as it may."""

    def __init__(self, limit: str) -> None:
        super().__init__(
            f"You have {limit} in unfinished uploads: finish or terminate one first.",
            retry_after_s=60.0,
        )


class OffsetMismatch(Aborted):
    """The bytes do not start where the upload stands, or another writer moved it."""

    reason = "OFFSET_MISMATCH"

    def __init__(self, committed_bytes: int) -> None:
        super().__init__(
            f"The upload stands at offset {committed_bytes}.",
            metadata={"committed_bytes": str(committed_bytes)},
        )
        self.committed_bytes = committed_bytes


# Names ----------------------------------------------------------------------------------


def upload_name(upload_id: UUID) -> str:
    """The resource name of an upload."""
    return f"{UPLOAD_COLLECTION}{upload_id}"


def video_name(video_id: UUID) -> str:
    """The resource name of a video."""
    return f"{VIDEO_COLLECTION}{video_id}"


def user_name(user_id: UUID) -> str:
    """The resource name of a user."""
    return f"{USER_COLLECTION}{user_id}"


def upload_id_of(text: str) -> UUID:
    """The id in "uploads/{upload}" or in a tus URL's last segment.

    Raises:
        UploadNotFound: it cannot be the name of any upload.
    """
    found = _canonical_uuid(text.removeprefix(UPLOAD_COLLECTION))
    if found is None:
        raise UploadNotFound(text[:64])
    return found


def video_id_of(text: str) -> UUID:
    """The id in "videos/{video}" or in a file URL's segment.

    Raises:
        VideoNotFound: it cannot be the name of any video.
    """
    found = _canonical_uuid(text.removeprefix(VIDEO_COLLECTION))
    if found is None:
        raise VideoNotFound(text[:64])
    return found


def _canonical_uuid(text: str) -> UUID | None:
    try:
        found = UUID(text)
    except ValueError:
        return None
    # UUID() also reads braces, capitals and missing hyphens: one spelling only.
    return found if str(found) == text and found.version == 7 else None


def clean_display_name(text: str) -> str:
    """A file name that is safe to show: never a path, no control or direction marks.

    Args:
        text: what the client sent, of any length.

    Returns:
        1 to 200 characters, NFC; the last part of what looked like a path.
    """
    last_part = text.replace("\\", "/").rstrip("/").rpartition("/")[2]
    # Categories C*: controls, format marks (right-to-left overrides), lone surrogates.
    visible = "".join(char for char in last_part if unicodedata.category(char)[0] != "C")
    name = unicodedata.normalize("NFC", " ".join(visible.split()))[:DISPLAY_NAME_CHARS_MAX].strip()
    return name if name.strip(".") else DISPLAY_NAME_DEFAULT


def clean_mime_type(text: str) -> str:
    """A media type that may stand in an answer; "" if it is not one.

    It is only what the client says; the probe decides what the bytes are.
    """
    kind, slash, subtype = text.strip().lower().partition("/")
    parts = (kind, subtype)
    is_sound = bool(slash) and len(text) <= 100 and all(map(_is_token, parts))
    return f"{kind}/{subtype}" if is_sound else ""


_TOKEN_CHARS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789+.-_")


def _is_token(text: str) -> bool:
    return bool(text) and all(
        char.isascii() and (char.isalnum() or char in "+.-_") for char in text
    )


# Uploads --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upload:
    """Bytes on their way in.

    Attributes:
        size_bytes: how many will come, 1 or more.
        committed_bytes: how many are durable, from the first on.
        tus_metadata: the Upload-Metadata header as it came, checked.
        video_id: set once COMPLETED.
        writer_token: the newest writer's; only it may commit.
    """

    id: UUID
    tenant: str
    owner: UUID
    size_bytes: int
    committed_bytes: int
    mime_type: str
    display_name: str
    tus_metadata: str
    state: UploadState
    video_id: UUID | None
    writer_token: int
    created_at: datetime
    expires_at: datetime

    @property
    def is_open(self) -> bool:
        """Whether bytes may still be added."""
        return self.state is UploadState.OPEN

    def with_writer(self, offset: int) -> Self:
        """A new writer takes the upload at this offset; an older one is fenced off.

        Raises:
            UploadClosed: it is not OPEN.
            OffsetMismatch: it stands elsewhere.
        """
        if not self.is_open:
            raise UploadClosed(self.state)
        if offset != self.committed_bytes:
            raise OffsetMismatch(self.committed_bytes)
        return replace(self, writer_token=self.writer_token + 1)

    def advanced(self, offset: int, *, token: int, expires_at: datetime) -> Self:
        """The bytes up to this offset (at most size_bytes) are durable.

        Raises:
            UploadClosed: it is not OPEN any more.
            OffsetMismatch: a newer writer has taken it.
        """
        self.check_writer(token)
        if not self.committed_bytes <= offset <= self.size_bytes:
            raise ValueError(f"offset {offset} is outside of the upload")
        return replace(self, committed_bytes=offset, expires_at=expires_at)

    def check_writer(self, token: int) -> None:
        """Refuse whoever is not the newest writer.

        Raises:
            UploadClosed, OffsetMismatch: as in advanced.
        """
        if not self.is_open:
            raise UploadClosed(self.state)
        if token != self.writer_token:
            raise OffsetMismatch(self.committed_bytes)

    def completed(self, video_id: UUID) -> Self:
        """Every byte is durable: the upload ends as a video."""
        return replace(
            self,
            state=UploadState.COMPLETED,
            committed_bytes=self.size_bytes,
            video_id=video_id,
        )

    def ended(self, state: UploadState) -> Self:
        """Terminated or expired; its token goes on, so that no writer is left.

        Raises:
            UploadClosed: it has become a video.
        """
        if self.state is UploadState.COMPLETED:
            raise UploadClosed(self.state)
        if not self.is_open:
            return self  # once is enough
        return replace(self, state=state, writer_token=self.writer_token + 1)


# Videos ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What the probe found; see tenfold.media.v1.Source."""

    container: str
    video_codec: str
    audio_codec: str
    width: int
    height: int
    frames_per_second: float
    duration_s: float


@dataclass(frozen=True)
class Rendition:
    """One quality: its play-list is "<name>.m3u8"."""

    name: str
    width: int
    height: int
    bits_per_second: int


@dataclass(frozen=True)
class Failure:
    """Why a video is FAILED."""

    reason: FailureReason
    description: str
    is_retryable: bool


@dataclass(frozen=True)
class StockLimits:
    """What one owner may hold, and use up in a day.

    Attributes:
        stored_bytes_max: of uploads, unfinished ones by their whole size, and of the sources
            of videos.
        transcode_s_per_day_max: length of the films converted, of those that are being too.
    """

    stored_bytes_max: int
    transcode_s_per_day_max: int


class SourceRefused(Exception):
    """The bytes cannot become a video, however often one tries."""

    def __init__(self, reason: FailureReason, description: str) -> None:
        super().__init__(description)
        self.failure = Failure(reason, description, is_retryable=False)


class RunFailed(Exception):
    """One run failed; another may pass."""

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.failure = Failure(FailureReason.TRANSCODE_FAILED, description, is_retryable=True)


class TranscoderMissing(Exception):
    """ffmpeg is not installed: trying again helps once it is."""

    def __init__(self) -> None:
        super().__init__("ffmpeg is missing")
        text = "ffmpeg is not installed here."
        self.failure = Failure(FailureReason.TRANSCODER_MISSING, text, is_retryable=True)


class RunLost(Exception):
    """The video was deleted, or another worker has claimed it."""


@dataclass(frozen=True)
class Video:
    """A film that can be played, or will be.

    Attributes:
        job_token: the newest worker's; only it may change the video.
        lease_ends_at: until then that worker is believed to be alive; None when there is none.
        failure_count: runs that reported a failure.
        claim_count: runs that began.
        output_token: the folder that is played; 0 until READY.
        version: grows by one with each change.
    """

    id: UUID
    tenant: str
    owner: UUID
    version: int
    upload_id: UUID
    display_name: str
    state: VideoState
    size_bytes: int
    sha256: str
    created_at: datetime
    source: Source | None = None
    renditions: tuple[Rendition, ...] = ()
    progress_percent: int = 0
    failure: Failure | None = None
    job_token: int = NO_TOKEN
    lease_ends_at: datetime | None = None
    failure_count: int = 0
    claim_count: int = 0
    output_token: int = NO_TOKEN
    ready_at: datetime | None = None

    @property
    def is_source_of_use(self) -> bool:
        """Whether what was uploaded may still be converted, now or later."""
        is_hopeless = self.failure is not None and not self.failure.is_retryable
        return self.state is not VideoState.DELETED and not is_hopeless

    def is_leased(self, now: datetime) -> bool:
        """Whether a worker holds it and has been heard of lately."""
        return self.lease_ends_at is not None and now < self.lease_ends_at

    def claimed(self, *, now: datetime, lease: timedelta) -> Self:
        """A worker begins a run; an older worker is fenced off."""
        assert not self.state.is_final  # the caller has looked
        return replace(
            self,
            state=VideoState.PROBING,
            job_token=self.job_token + 1,
            lease_ends_at=now + lease,
            claim_count=self.claim_count + 1,
            progress_percent=0,
        )

    def held_by(self, token: int) -> Self:
        """The video, if that worker still holds it.

        Raises:
            RunLost: it was deleted, finished or claimed by another.
        """
        if self.state.is_final or token != self.job_token:
            raise RunLost(f"{video_name(self.id)} is {self.state} under token {self.job_token}")
        return self

    def probed(self, source: Source) -> Self:
        """The probe is content: frames are being made."""
        return replace(self, state=VideoState.TRANSCODING, source=source)

    def progressed(self, percent: int, *, lease_ends_at: datetime) -> Self:
        """So much is done (0 to 99; 100 is for READY); progress never goes back in a run."""
        shown = max(self.progress_percent, min(percent, 99))
        return replace(self, progress_percent=shown, lease_ends_at=lease_ends_at)

    def ready(self, renditions: tuple[Rendition, ...], *, now: datetime) -> Self:
        """The holder's output is what is played from now on."""
        return replace(
            self,
            state=VideoState.READY,
            renditions=renditions,
            progress_percent=100,
            output_token=self.job_token,
            lease_ends_at=None,
            ready_at=now,
            failure=None,
        )

    def run_failed(self, failure: Failure) -> Self:
        """A run has failed: QUEUED for another, or FAILED when that cannot help."""
        count = self.failure_count + 1
        is_missing = failure.reason is FailureReason.TRANSCODER_MISSING
        is_over = not failure.is_retryable or is_missing or count >= FAILURES_MAX
        return replace(
            self,
            state=VideoState.FAILED if is_over else VideoState.QUEUED,
            failure=failure if is_over else None,
            failure_count=count,
            lease_ends_at=None,
        )

    def given_up(self, failure: Failure) -> Self:
        """No worker tries it again; one that still runs is fenced off."""
        return replace(
            self,
            state=VideoState.FAILED,
            failure=failure,
            job_token=self.job_token + 1,
            lease_ends_at=None,
        )

    def released(self) -> Self:
        """The worker stops for a reason that is not the video's; another may begin at once."""
        return replace(self, state=VideoState.QUEUED, lease_ends_at=None)

    def deleted(self) -> Self:
        """Gone; its token goes on, so that no worker is left."""
        return replace(
            self,
            state=VideoState.DELETED,
            job_token=self.job_token + 1,
            lease_ends_at=None,
            output_token=NO_TOKEN,
        )


# Caps and the ladder --------------------------------------------------------------------


@dataclass(frozen=True)
class SourceLimits:
    """What a source may be at most; the side_pixels_min is for what cannot be scaled."""

    pixels_max: int = 4096 * 2304
    side_pixels_min: int = 16
    frames_per_second_max: float = 120.0
    streams_max: int = 16
    duration_s_max: float = 4 * 3600.0


@dataclass(frozen=True)
class Probe:
    """What the probing process saw.

    Attributes:
        source: its duration_s is 0 when even a full read did not tell.
        video_index, audio_index: the streams that are shown and heard; -1 for no sound.
    """

    source: Source
    stream_count: int
    video_index: int
    audio_index: int


def check_source(probe: Probe, limits: SourceLimits) -> Source:
    """Hold what was probed against the caps.

    Raises:
        SourceRefused: naming the cap and the value.
    """
    source = probe.source
    if source.duration_s <= 0:
        raise SourceRefused(FailureReason.NOT_A_VIDEO, "The film has no length.")
    findings = [
        ("streams", probe.stream_count, limits.streams_max),
        ("pixels per frame", source.width * source.height, limits.pixels_max),
        ("frames per second", source.frames_per_second, limits.frames_per_second_max),
        ("seconds", source.duration_s, limits.duration_s_max),
    ]
    for what, value, most in findings:
        if value > most:
            text = f"The film has {value:.10g} {what}; at most {most:.10g} are taken."
            raise SourceRefused(FailureReason.SOURCE_OVER_LIMIT, text)
    if min(source.width, source.height) < limits.side_pixels_min:
        size = f"{source.width} by {source.height}"
        text = f"Each side needs {limits.side_pixels_min} pixels; this is {size}."
        raise SourceRefused(FailureReason.SOURCE_OVER_LIMIT, text)
    return source


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: even sizes, and the rate that its frames may reach."""

    width: int
    height: int
    video_bits_per_second_max: int

    @property
    def name(self) -> str:
        """The file names' first part: "720p"."""
        return f"{self.height}p"


RUNG_HEIGHTS = (720, 360)
_BITS_PER_PIXEL_AND_SECOND_MAX = 0.12
_BITS_PER_SECOND_MIN = 200_000
_RATE_FRAMES_MAX = 60.0


def ladder(source: Source) -> tuple[Rung, Rung]:
    """Two qualities, the higher first; never larger than the source.

    720 and 360 lines; below 720, the source's own height and 360; at 360 or less, the
    source's own height and half of it.
    """
    own = _even(source.height)
    upper = min(own, RUNG_HEIGHTS[0])
    lower = RUNG_HEIGHTS[1] if upper > RUNG_HEIGHTS[1] else _even(upper // 2)
    return _rung(source, upper), _rung(source, lower)


def _rung(source: Source, height: int) -> Rung:
    width = _even(round(source.width * height / source.height))
    frames = min(source.frames_per_second, _RATE_FRAMES_MAX)
    bits = int(width * height * frames * _BITS_PER_PIXEL_AND_SECOND_MAX)
    return Rung(width, height, max(bits, _BITS_PER_SECOND_MIN))


def _even(number: int) -> int:
    """The largest even number that is not above, 2 at least: 4:2:0 has no odd sides."""
    return max(2, number - number % 2)
