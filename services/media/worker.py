"""The transcode worker: claims a video, makes its renditions, publishes them once.

A job may come twice, also while its first run goes on: the video's row decides. The
newest claim's token is the only one that may change the row, a claim waits for a living
worker's lease, and a final video is only acknowledged.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import structlog

from services.media import events
from services.media.config import MediaConfig
from services.media.domain import (
    CLAIMS_MAX,
    FailureReason,
    Probe,
    Rendition,
    RunFailed,
    Rung,
    RunLost,
    Source,
    SourceRefused,
    TranscoderMissing,
    Video,
    VideoNotFound,
    check_source,
    ladder,
    video_name,
)
from services.media.ffmpeg import (
    FRAMES_PER_SECOND_MAX,
    MASTER_NAME,
    MICROSECONDS,
    Variant,
    is_whole,
    master_list,
    percent_of,
    segments_of,
)
from services.media.files import MediaFiles
from services.media.sandbox import Sandbox
from services.media.store import MediaStore, Scope
from services.media.watch import VideoSignal
from shared.bus.jobs import Job
from shared.clock import Clock
from shared.crashpoints import CrashPoint
from shared.db.port import OutboxRow
from shared.db.stock import StockExceeded
from shared.errors import TenfoldError

PROGRESS_S = 0.25
LEASE_POLL_S = 0.5
RELEASE_S = 2.0
# A film may be made a little shorter than its container says; more is missing bytes.
MISSING_SHARE_MAX, MISSING_S_MAX = 0.05, 1.0

CLAIMED_NOT_PROBED = CrashPoint("media.claimed_not_probed", "a worker holds the video, no more")
MADE_NOT_PUBLISHED = CrashPoint(
    "media.output_made_not_published", "every segment and list exists under the temporary name"
)
PUBLISHED_NOT_RECORDED = CrashPoint(
    "media.output_published_not_recorded", "the output has its place, the row does not name it"
)
RECORDED_NOT_ACKED = CrashPoint(
    "media.ready_not_acked", "the video is READY, the job is not acknowledged"
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TranscodeWorker:
    """Works the queue "transcode"; `handle` and `give_up` are what shared.bus.jobs calls."""

    store: MediaStore
    files: MediaFiles
    sandbox: Sandbox
    signal: VideoSignal
    clock: Clock
    config: MediaConfig

    async def handle(self, job: Job) -> None:
        """Return when the video needs no further run; other endings mean: later again."""
        video_id, scope = events.video_id_of_job(job.payload), Scope.of_tenant(job.tenant)
        pause_s = self.config.retry_s
        with suppress(VideoNotFound):
            while (video := await self._claim(video_id, scope)) is not None:
                if await self._run(video):
                    return
                await asyncio.sleep(pause_s)
                pause_s *= 2

    async def give_up(self, job: Job, error: str) -> None:
        """The queue has lost patience: the video is FAILED."""
        _log.error("media.given_up", video=job.payload.decode(errors="replace"), error=error)
        with suppress(VideoNotFound):
            await self._give_up(events.video_id_of_job(job.payload), Scope.of_tenant(job.tenant))

    async def _claim(self, video_id: UUID, scope: Scope) -> Video | None:
        """The video, held by us; None when it is final. Waits for a living worker's lease."""
        while True:
            video = await self.store.get_video(video_id, scope)
            if video.state.is_final:
                return None
            if video.claim_count >= CLAIMS_MAX:
                await self._give_up(video_id, scope)
                return None
            if not video.is_leased(self.clock.now()):
                claimed = await self._change(video, self._claimed)
                if claimed.job_token != video.job_token:
                    return claimed
            await asyncio.sleep(LEASE_POLL_S)

    def _claimed(self, video: Video) -> Video:
        now = self.clock.now()
        if video.state.is_final or video.is_leased(now):
            return video  # somebody was faster
        return video.claimed(now=now, lease=self._lease)

    @property
    def _lease(self) -> timedelta:
        return timedelta(seconds=self.config.lease_s)

    async def _give_up(self, video_id: UUID, scope: Scope) -> None:
        failure = RunFailed("Every worker that tried it was stopped.").failure
        video = await self.store.get_video(video_id, scope)
        await self._change(
            video,
            lambda current: current if current.state.is_final else current.given_up(failure),
            announce=lambda current: [events.video_failed(current, now=self.clock.now())],
        )

    async def _run(self, video: Video) -> bool:
        """One run of a claimed video; whether no other is needed."""
        log = _log.bind(video=video_name(video.id), run=video.job_token)
        try:
            await self._convert_while_held(video)
        except RunLost as lost:
            log.info("media.run_lost", why=str(lost))
            return False  # the claim says what there is left to do
        except (SourceRefused, RunFailed, TranscoderMissing) as failed:
            log.info("media.run_failed", failure=failed.failure.description)
            return await self._fail(video, failed)
        except BaseException:  # we are stopping, or the database or the disk does not answer
            await self._release(video)
            raise
        finally:
            await self.files.remove_folder(self.files.work_folder(video.id, video.job_token))
        return True

    async def _fail(
        self, video: Video, failed: SourceRefused | RunFailed | TranscoderMissing
    ) -> bool:
        now = self.clock.now()
        try:
            changed = await self._change(
                video,
                lambda current: current.held_by(video.job_token).run_failed(failed.failure),
                announce=lambda current: (
                    [events.video_failed(current, now=now)] if current.state.is_final else []
                ),
            )
        except RunLost:
            return False
        if not changed.is_source_of_use:
            await self.files.remove_upload(video.upload_id)
        return changed.state.is_final

    async def _release(self, video: Video) -> None:
        """Stopped from outside: let another begin at once, if the database answers in time."""
        with suppress(RunLost, TenfoldError, TimeoutError):
            async with asyncio.timeout(RELEASE_S):
                await self._change(
                    video, lambda current: current.held_by(video.job_token).released()
                )

    async def _convert_while_held(self, video: Video) -> None:
        """Convert, and stop at once when the video is deleted or claimed by another."""
        try:
            async with asyncio.TaskGroup() as tasks:
                keeper = tasks.create_task(self._keep_lease(video))
                await self._convert(video)
                keeper.cancel()
        except BaseExceptionGroup as group:
            # The work's own end says more than the loss that may follow from it.
            raise group.exceptions[0] from None

    async def _keep_lease(self, video: Video) -> None:
        """Renew until cancelled.

        Raises:
            RunLost: the video is not ours any more.
        """
        scope, renew_s = Scope.of_tenant(video.tenant), self.config.lease_s / 3
        renewed_s = self.clock.monotonic_s()
        with self.signal.listening(video.id) as changed:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(renew_s):
                        await changed.wait()
                changed.clear()
                current = await self.store.get_video(video.id, scope)
                current.held_by(video.job_token)
                if self.clock.monotonic_s() - renewed_s >= renew_s:
                    renewed_s = self.clock.monotonic_s()
                    await self.progress(video, current.progress_percent)

    async def _convert(self, video: Video) -> None:
        CLAIMED_NOT_PROBED.visit()
        path = self.files.upload_path(video.upload_id)
        if not path.is_file():
            raise RunFailed("The uploaded bytes are gone.")
        probe = await self.sandbox.probe(path)
        source = check_source(probe, self.config.source_limits)
        await self._take_source(video, source)
        renditions = await self._make(video, path, probe)
        MADE_NOT_PUBLISHED.visit()
        await self.files.publish(video.id, video.job_token)
        PUBLISHED_NOT_RECORDED.visit()
        await self._record(video, renditions)
        RECORDED_NOT_ACKED.visit()

    async def _take_source(self, video: Video, source: Source) -> None:
        """Say what is converted; its length is reserved in the owner's stock."""
        try:
            await self._change(
                video, lambda current: current.held_by(video.job_token).probed(source)
            )
        except StockExceeded as error:
            reason = FailureReason.TRANSCODE_QUOTA_EXCEEDED
            raise SourceRefused(reason, error.message) from error

    async def _make(self, video: Video, path: Path, probe: Probe) -> tuple[Rendition, ...]:
        """Segments first, then the variant lists, the master list last."""
        folder, rungs = self.files.work_folder(video.id, video.job_token), ladder(probe.source)
        await self.files.make_folder(folder)
        report = _Throttled(self, video, probe.source)
        done_us = await self.sandbox.transcode(path, folder, probe, rungs, report)
        _check_whole(probe.source, done_us)
        variants = await asyncio.to_thread(_measure, folder, rungs, probe.source)
        await asyncio.to_thread((folder / MASTER_NAME).write_text, master_list(variants))
        return tuple(_rendition_of(variant) for variant in variants)

    async def _record(self, video: Video, renditions: tuple[Rendition, ...]) -> None:
        """The one switch: from here on the output is what is played."""
        now = self.clock.now()
        try:
            await self._change(
                video,
                lambda current: current.held_by(video.job_token).ready(renditions, now=now),
                announce=lambda current: [events.video_ready(current)],
            )
        except RunLost:
            await self.files.remove_folder(self.files.output_folder(video.id, video.job_token))
            raise

    async def progress(self, video: Video, percent: int) -> None:
        """Say how far a run is, and that its worker lives.

        Raises:
            RunLost: the video is not ours any more.
        """
        lease_ends_at = self.clock.now() + self._lease
        await self._change(
            video,
            lambda current: current.held_by(video.job_token).progressed(
                percent, lease_ends_at=lease_ends_at
            ),
        )

    async def _change(
        self,
        video: Video,
        change: Callable[[Video], Video],
        *,
        announce: Callable[[Video], Sequence[OutboxRow]] = lambda _: (),
    ) -> Video:
        changed = await self.store.change_video(
            video.id,
            Scope.of_tenant(video.tenant),
            change,
            now=self.clock.now(),
            announce=announce,
        )
        self.signal.ring(video.id)
        return changed


class _Throttled:
    """Stores progress when the percentage has changed, about four times a second at most."""

    def __init__(self, worker: TranscodeWorker, video: Video, source: Source) -> None:
        self._worker = worker
        self._video = video
        self._source = source
        self._percent = 0
        self._stored_at_s = 0.0

    async def __call__(self, done_us: int) -> None:
        percent = percent_of(done_us, self._source.duration_s)
        now_s = self._worker.clock.monotonic_s()
        if percent > self._percent and now_s - self._stored_at_s >= PROGRESS_S:
            self._percent, self._stored_at_s = percent, now_s
            await self._worker.progress(self._video, percent)


def _check_whole(source: Source, done_us: int) -> None:
    """Refuse a film that ended before its time: its index promises more than its bytes hold."""
    made_s = done_us / MICROSECONDS
    if made_s < source.duration_s * (1 - MISSING_SHARE_MAX) - MISSING_S_MAX:
        text = f"The file is cut short: it ends after {made_s:.1f} of {source.duration_s:.1f} s."
        raise SourceRefused(FailureReason.NOT_A_VIDEO, text)


def _measure(folder: Path, rungs: Sequence[Rung], source: Source) -> list[Variant]:
    """What was made. Blocking.

    Raises:
        RunFailed: a list is not whole, or a segment that it names is missing.
    """
    return [_measure_one(folder, rung, source) for rung in rungs]


def _measure_one(folder: Path, rung: Rung, source: Source) -> Variant:
    try:
        playlist = (folder / f"{rung.name}.m3u8").read_text()
        segments = segments_of(playlist)
        sizes = [(folder / segment.name).stat().st_size for segment in segments]
    except OSError as error:
        raise RunFailed("ffmpeg left a part of its output out.") from error
    length_s = sum(segment.duration_s for segment in segments)
    if not is_whole(playlist) or length_s <= 0:
        raise RunFailed("ffmpeg made no film.")
    rates = [
        size * 8 / max(segment.duration_s, 0.1)
        for size, segment in zip(sizes, segments, strict=True)
    ]
    frames = min(source.frames_per_second, FRAMES_PER_SECOND_MAX)
    return Variant(rung, frames, int(sum(sizes) * 8 / length_s), int(max(rates)))


def _rendition_of(variant: Variant) -> Rendition:
    rung = variant.rung
    return Rendition(rung.name, rung.width, rung.height, variant.bits_per_second)
