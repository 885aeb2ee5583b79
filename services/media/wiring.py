"""The only place that chooses implementations."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import structlog
from tenfold.media.v1.media_service_pb2_grpc import (
    add_UploadServiceServicer_to_server,
    add_VideoServiceServicer_to_server,
)

from services.media import events
from services.media.config import MediaConfig
from services.media.files import MediaFiles
from services.media.handler import VideoHandler
from services.media.sandbox import FFMPEG_VARIABLE, Sandbox, find_ffmpeg
from services.media.store import MediaStore, OpenUploadLimits, SqlMediaStore
from services.media.sweeper import Sweeper
from services.media.tus_handler import UploadHandler
from services.media.uploads import UploadWriters
from services.media.watch import VideoSignal, VideoWatch
from services.media.worker import TranscodeWorker
from shared.bus.jobs import JobQueue, run_jobs
from shared.bus.outbox import run_relay
from shared.config import load
from shared.db.engines import ShardSettings, open_shards
from shared.db.housekeeping import run_housekeeping
from shared.db.port import Shards
from shared.lifecycle import Loop, Registration, Service
from shared.runtime import Runtime

NAME = "media"
PREFIX = "TENFOLD_MEDIA_"
MIGRATIONS = Path(__file__).parent / "migrations"
# Deliveries of one job. The video's own rules (domain.py) end the tries well before.
JOB_TRIES_MAX = 60

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Parts:
    shards: Shards
    store: MediaStore
    files: MediaFiles
    signal: VideoSignal


def shard_settings(folder: Path, environ: Mapping[str, str]) -> ShardSettings:
    """What its shards are made of; SQLite keeps them in the service's folder.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
    """
    config = load(MediaConfig, PREFIX, environ)
    return ShardSettings(
        NAME,
        config.database,
        folder / "shards",
        MIGRATIONS,
        causal_reads=True,
    )


@asynccontextmanager
async def open_service(runtime: Runtime) -> AsyncIterator[Service]:
    """Open the media service; closed in reverse.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
    """
    config = load(MediaConfig, PREFIX, runtime.environ)
    folder = runtime.folder_of(NAME)
    files = MediaFiles(folder)
    await asyncio.to_thread(files.prepare)
    settings = shard_settings(folder, runtime.environ)
    async with open_shards(settings, secret=runtime.secret, clock=runtime.clock) as shards:
        parts = _Parts(shards, SqlMediaStore(shards, config.stock_limits), files, VideoSignal())
        yield Service(
            name=NAME,
            registrations=_registrations(runtime, config, parts),
            loops=_loops(runtime, config, parts),
        )


def _registrations(
    runtime: Runtime,
    config: MediaConfig,
    parts: _Parts,
) -> list[Registration]:
    store, files, signal = parts.store, parts.files, parts.signal
    clock, lifetime = runtime.clock, timedelta(seconds=config.upload_lifetime_s)
    uploads = UploadHandler(
        store=store,
        files=files,
        writers=UploadWriters(store=store, files=files, clock=clock, lifetime=lifetime),
        clock=clock,
        bytes_max=config.upload_bytes_max,
        limits=OpenUploadLimits(config.open_uploads_max, config.open_bytes_max),
        lifetime=lifetime,
    )
    watch = VideoWatch(
        store, signal=signal, poll_s=config.watch_poll_s, watches_max=config.watches_max
    )
    videos = VideoHandler(
        store=store,
        files=files,
        watch=watch,
        signal=signal,
        clock=clock,
        page_secret=runtime.secret,
    )
    return [
        Registration(add_UploadServiceServicer_to_server, uploads),
        Registration(add_VideoServiceServicer_to_server, videos),
    ]


def _loops(
    runtime: Runtime,
    config: MediaConfig,
    parts: _Parts,
) -> list[Loop]:
    store, files = parts.store, parts.files
    relay = partial(run_relay, parts.shards, runtime.bus, service=NAME, clock=runtime.clock)
    sweeper = Sweeper(
        store=store,
        files=files,
        clock=runtime.clock,
        period_s=config.sweep_s,
        lifetime=timedelta(seconds=config.upload_lifetime_s),
        forgotten=timedelta(seconds=config.forgotten_s),
    )
    housekeeping = partial(run_housekeeping, parts.shards, clock=runtime.clock)
    loops: list[Loop] = [relay, housekeeping, sweeper.run]
    if config.workers:
        queue = job_queue(
            TranscodeWorker(
                store=store,
                files=files,
                sandbox=Sandbox(runtime.spawner, _ffmpeg(), config),
                signal=parts.signal,
                clock=runtime.clock,
                config=config,
            )
        )
        loops.append(partial(run_jobs, runtime.bus, queue))
    return loops


def job_queue(worker: TranscodeWorker) -> JobQueue:
    """The worker's queue: how many at once, how often a job is given."""
    return JobQueue(
        service=NAME,
        queue=events.TRANSCODE_QUEUE,
        handle=worker.handle,
        concurrency=worker.config.workers,
        on_poison=worker.give_up,
        max_tries=JOB_TRIES_MAX,
        ack_wait_s=worker.config.job_ack_wait_s,
    )


def _ffmpeg() -> str | None:
    found = find_ffmpeg()
    if found is None:
        # The service still serves; each video fails with TRANSCODER_MISSING.
        _log.error("media.transcoder_missing", variable=FFMPEG_VARIABLE)
    return found
