"""Uploads and videos in their owners' buckets.

What a caller asks for is filtered by tenant and owner (an operator's by tenant); what a
worker does names the video and its tenant, and is fenced by the video's job token.
"""

import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.media import events
from services.media.domain import (
    Failure,
    FailureReason,
    OffsetMismatch,
    Rendition,
    Source,
    StockLimits,
    TooManyUploads,
    Upload,
    UploadClosed,
    UploadNotFound,
    UploadState,
    Video,
    VideoNotFound,
    VideoState,
)
from shared.clock import of_us, to_us
from shared.db.ids import bucket_of, new_id
from shared.db.port import Once, OutboxRow, Reader, Row, Shards, Transaction
from shared.db.stock import Stock, commit_held, commit_used, day_of, release, reserve
from shared.identity import Principal, PrincipalKind

NOBODY = UUID(int=0)
# What an owner may hold, and use up in a day; their names are told in refusals.
STORED_BYTES, TRANSCODE_SECONDS = "stored-bytes", "transcode-seconds"
# UUIDs of version 7 compare by their time, newest last: a page starts below this.
LAST_ID = UUID(int=2**128 - 1)

# $3 tenant, $4 whether the caller sees the whole tenant, $5 owner.
_IN_SCOPE = "bucket = $1 AND id = $2 AND tenant = $3 AND ($4 OR owner = $5)"

_UPLOAD_COLUMNS = (
    "id, tenant, owner, size_bytes, committed_bytes, mime_type, display_name, tus_metadata, "
    "state, video_id, writer_token, created_at_us, expires_at_us"
)
INSERT_UPLOAD = f"""
INSERT INTO upload (bucket, version, {_UPLOAD_COLUMNS})
VALUES ($1, 1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
"""  # noqa: S608 -- constants only, here and below
SELECT_UPLOAD = f"SELECT {_UPLOAD_COLUMNS} FROM upload WHERE {_IN_SCOPE}"  # noqa: S608
COUNT_OPEN_UPLOADS = """
SELECT count(*) AS open_count, coalesce(sum(size_bytes), 0) AS open_bytes FROM upload
WHERE bucket = $1 AND tenant = $2 AND owner = $3 AND state = 'OPEN'
"""
# The compare-and-set: only the newest writer, only from where it stood.
ADVANCE_UPLOAD = """
UPDATE upload SET committed_bytes = $6, expires_at_us = $7, version = version + 1
WHERE bucket = $1 AND id = $2 AND tenant = $3 AND writer_token = $4 AND committed_bytes = $5
  AND state = 'OPEN'
"""
UPDATE_UPLOAD = """
UPDATE upload SET committed_bytes = $4, state = $5, video_id = $6, writer_token = $7,
  expires_at_us = $8, version = version + 1
WHERE bucket = $1 AND id = $2 AND tenant = $3
"""
SELECT_STALE_UPLOADS = f"""
SELECT {_UPLOAD_COLUMNS} FROM upload
WHERE state = 'OPEN' AND expires_at_us < $1 AND tenfold_owned(bucket)
ORDER BY expires_at_us LIMIT $2
"""  # noqa: S608
SELECT_ENDED_UPLOADS = f"""
SELECT {_UPLOAD_COLUMNS} FROM upload
WHERE state IN ('TERMINATED', 'EXPIRED') AND expires_at_us < $1 AND tenfold_owned(bucket)
ORDER BY expires_at_us LIMIT $2
"""  # noqa: S608
DELETE_UPLOAD = """
DELETE FROM upload
WHERE bucket = $1 AND id = $2 AND tenant = $3 AND state IN ('TERMINATED', 'EXPIRED')
  AND expires_at_us < $4
"""

_VIDEO_COLUMNS = (
    "id, tenant, owner, version, upload_id, display_name, state, size_bytes, sha256, source, "
    "renditions, progress_percent, failure_reason, failure_description, failure_is_retryable, "
    "job_token, lease_ends_at_us, failure_count, claim_count, output_token, created_at_us, "
    "changed_at_us, ready_at_us"
)
INSERT_VIDEO = f"""
INSERT INTO video (bucket, {_VIDEO_COLUMNS})
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19,
  $20, $21, $22, $23, $24)
"""  # noqa: S608
SELECT_VIDEO = f"SELECT {_VIDEO_COLUMNS} FROM video WHERE {_IN_SCOPE}"  # noqa: S608
SELECT_VIDEO_PAGE = f"""
SELECT {_VIDEO_COLUMNS} FROM video
WHERE bucket = $1 AND tenant = $2 AND owner = $3 AND state <> 'DELETED' AND id < $4
ORDER BY id DESC LIMIT $5
"""  # noqa: S608
UPDATE_VIDEO = """
UPDATE video SET state = $4, source = $5, renditions = $6, progress_percent = $7,
  failure_reason = $8, failure_description = $9, failure_is_retryable = $10, job_token = $11,
  lease_ends_at_us = $12, failure_count = $13, claim_count = $14, output_token = $15,
  changed_at_us = $16, ready_at_us = $17, version = version + 1
WHERE bucket = $1 AND id = $2 AND tenant = $3
"""
SELECT_FORGOTTEN_VIDEOS = f"""
SELECT {_VIDEO_COLUMNS} FROM video
WHERE state IN ('QUEUED', 'PROBING', 'TRANSCODING') AND changed_at_us < $1
  AND tenfold_owned(bucket)
ORDER BY changed_at_us LIMIT $2
"""  # noqa: S608
TOUCH_VIDEO = """
UPDATE video SET changed_at_us = $4, version = version + 1
WHERE bucket = $1 AND id = $2 AND tenant = $3 AND changed_at_us < $4
"""


@dataclass(frozen=True)
class Scope:
    """Whose rows a statement may touch."""

    tenant: str
    is_whole_tenant: bool
    owner: UUID

    @classmethod
    def of(cls, principal: Principal) -> "Scope":
        """An operator's key sees its tenant, everyone else what they own."""
        if principal.kind is PrincipalKind.ADMIN:
            return cls(principal.tenant, True, NOBODY)
        return cls(principal.tenant, False, principal.owner)

    @classmethod
    def of_tenant(cls, tenant: str) -> "Scope":
        """A worker's: the job says which tenant."""
        return cls(tenant, True, NOBODY)


@dataclass(frozen=True)
class OpenUploadLimits:
    """What one owner may have unfinished at once."""

    count_max: int
    bytes_max: int


class MediaStore(Protocol):
    """Keeps uploads and videos; every method is one transaction or one snapshot."""

    async def insert_upload(
        self, upload: Upload, *, once: Once, limits: OpenUploadLimits
    ) -> Upload:
        """Keep a new upload; under a repeated request id, the first one.

        Raises:
            TooManyUploads: the owner has as much open as it may.
            StockExceeded: the owner stores as much as it may.
        """
        ...

    async def get_upload(self, upload_id: UUID, scope: Scope) -> Upload:
        """The upload as it is.

        Raises:
            UploadNotFound: absent, or not in scope.
        """
        ...

    async def take_upload(self, upload_id: UUID, scope: Scope, *, offset: int) -> Upload:
        """Make the caller its newest writer.

        Raises:
            UploadNotFound, UploadClosed, OffsetMismatch: see Upload.with_writer.
        """
        ...

    async def advance_upload(self, upload: Upload, offset: int, *, expires_at: datetime) -> Upload:
        """Commit the offset, by compare-and-set from where `upload` stands.

        Raises:
            UploadClosed, OffsetMismatch: someone else has changed it; nothing is committed.
        """
        ...

    async def complete_upload(
        self, upload: Upload, *, sha256: str, now: datetime, expires_at: datetime
    ) -> tuple[Upload, Video]:
        """In one transaction: the upload COMPLETED, its video QUEUED, the event and the job.

        Raises:
            UploadClosed, OffsetMismatch: someone else has changed it; nothing is committed.
        """
        ...

    async def end_upload(
        self,
        upload_id: UUID,
        scope: Scope,
        state: UploadState,
        *,
        keep_until: datetime,
        if_stale_at: datetime | None = None,
    ) -> Upload:
        """Terminate or expire it; once ended it stays as it is.

        Args:
            upload_id: which.
            scope: whose.
            state: how it ends.
            keep_until: when its row may be forgotten.
            if_stale_at: leave it open if its time is not over at this moment.

        Raises:
            UploadNotFound, UploadClosed: see Upload.ended.
        """
        ...

    async def list_stale_uploads(self, now: datetime, *, count_max: int) -> Sequence[Upload]:
        """OPEN ones past their time."""
        ...

    async def forget_ended_uploads(self, now: datetime, *, count_max: int) -> int:
        """Delete the rows of terminated and expired uploads past their time; how many."""
        ...

    async def find_upload(self, upload_id: UUID) -> Upload | None:
        """For the sweeper, which meets files before rows: of any tenant."""
        ...

    async def find_video(self, video_id: UUID) -> Video | None:
        """For the sweeper, as find_upload."""
        ...

    async def get_video(self, video_id: UUID, scope: Scope) -> Video:
        """The video as it is, a DELETED one too.

        Raises:
            VideoNotFound: absent, or not in scope.
        """
        ...

    async def list_videos(self, scope: Scope, *, before: UUID, count_max: int) -> Sequence[Video]:
        """The owner's, newest first, below an id; without deleted ones."""
        ...

    async def change_video(
        self,
        video_id: UUID,
        scope: Scope,
        change: Callable[[Video], Video],
        *,
        now: datetime,
        announce: Callable[[Video], Sequence[OutboxRow]] = lambda _: (),
    ) -> Video:
        """Store what `change` returns, with the events of `announce`; the same object: nothing.

        Raises:
            VideoNotFound: absent, or not in scope; and whatever `change` raises.
            StockExceeded: the owner has had as much converted today as it may.
        """
        ...

    async def list_forgotten_videos(self, before: datetime, *, count_max: int) -> Sequence[Video]:
        """Unfinished ones that nobody has changed since then."""
        ...

    async def requeue_video(self, video: Video, *, now: datetime) -> None:
        """Give its job once more."""
        ...


class SqlMediaStore:
    """See MediaStore."""

    def __init__(self, shards: Shards, stocks: StockLimits) -> None:
        self._shards = shards
        self._stocks = stocks

    async def insert_upload(
        self, upload: Upload, *, once: Once, limits: OpenUploadLimits
    ) -> Upload:
        """See MediaStore.insert_upload."""
        bucket = bucket_of(upload.id)
        async with self._shards.bucket(bucket).transaction(once) as tx:
            if tx.answered:
                first_id = UUID(bytes=tx.answer)
                return _upload_of(await _select_upload(tx, first_id, Scope.of(once.principal)))
            row = await tx.fetch_one(COUNT_OPEN_UPLOADS, bucket, upload.tenant, upload.owner)
            assert row is not None  # an aggregate has one row
            if row["open_count"] >= limits.count_max:
                raise TooManyUploads(f"{limits.count_max} files")
            if row["open_bytes"] + upload.size_bytes > limits.bytes_max:
                raise TooManyUploads(f"{limits.bytes_max} bytes")
            stored = Stock(upload.tenant, upload.owner, STORED_BYTES)
            limit = self._stocks.stored_bytes_max
            await reserve(tx, stored, upload.id, upload.size_bytes, limit=limit)
            await tx.execute(INSERT_UPLOAD, bucket, *_row_of_upload(upload))
            await tx.answer_with(upload.id.bytes)
        return upload

    async def get_upload(self, upload_id: UUID, scope: Scope) -> Upload:
        """See MediaStore.get_upload."""
        return _upload_of(await _select_upload(self._shards.holding(upload_id), upload_id, scope))

    async def take_upload(self, upload_id: UUID, scope: Scope, *, offset: int) -> Upload:
        """See MediaStore.take_upload."""
        async with self._changing_upload(upload_id, scope) as (tx, upload):
            taken = upload.with_writer(offset)
            await _update_upload(tx, taken)
        return taken

    async def advance_upload(self, upload: Upload, offset: int, *, expires_at: datetime) -> Upload:
        """See MediaStore.advance_upload."""
        advanced = upload.advanced(offset, token=upload.writer_token, expires_at=expires_at)
        key = (bucket_of(upload.id), upload.id, upload.tenant)
        async with self._shards.holding(upload.id).transaction() as tx:
            changed = await tx.execute(
                ADVANCE_UPLOAD,
                *key,
                upload.writer_token,
                upload.committed_bytes,
                offset,
                to_us(expires_at),
            )
            if changed == 0:
                await _raise_lost_writer(tx, upload)
        return advanced

    async def complete_upload(
        self, upload: Upload, *, sha256: str, now: datetime, expires_at: datetime
    ) -> tuple[Upload, Video]:
        """See MediaStore.complete_upload."""
        scope = Scope.of_tenant(upload.tenant)
        async with self._changing_upload(upload.id, scope) as (tx, current):
            current.check_writer(upload.writer_token)
            if current.committed_bytes != upload.committed_bytes:
                raise OffsetMismatch(current.committed_bytes)
            video = _video_of_upload(current, sha256=sha256, now=now)
            completed = replace(current.completed(video.id), expires_at=expires_at)
            await _update_upload(tx, completed)
            await commit_held(tx, upload.tenant, STORED_BYTES, upload.id)
            await tx.execute(INSERT_VIDEO, tx.bucket, *_row_of_video(video, now))
            await tx.append_outbox(events.video_queued(video))
            await tx.append_outbox(events.transcode_job(video))
        return completed, video

    async def end_upload(
        self,
        upload_id: UUID,
        scope: Scope,
        state: UploadState,
        *,
        keep_until: datetime,
        if_stale_at: datetime | None = None,
    ) -> Upload:
        """See MediaStore.end_upload."""
        async with self._changing_upload(upload_id, scope) as (tx, upload):
            if if_stale_at is not None and upload.expires_at >= if_stale_at:
                return upload
            ended = upload.ended(state)
            if ended is not upload:
                await _update_upload(tx, replace(ended, expires_at=keep_until))
                await release(tx, upload.tenant, STORED_BYTES, upload.id)
        return ended

    async def list_stale_uploads(self, now: datetime, *, count_max: int) -> Sequence[Upload]:
        """See MediaStore.list_stale_uploads."""
        return [
            _upload_of(row)
            for shard in self._shards.all()
            for row in await shard.fetch_all(SELECT_STALE_UPLOADS, to_us(now), count_max)
        ]

    async def forget_ended_uploads(self, now: datetime, *, count_max: int) -> int:
        """See MediaStore.forget_ended_uploads."""
        count = 0
        for shard in self._shards.all():
            for row in await shard.fetch_all(SELECT_ENDED_UPLOADS, to_us(now), count_max):
                key = (bucket_of(row["id"]), row["id"], row["tenant"])
                async with self._shards.holding(row["id"]).transaction() as tx:
                    count += await tx.execute(DELETE_UPLOAD, *key, to_us(now))
        return count

    async def find_upload(self, upload_id: UUID) -> Upload | None:
        """See MediaStore.find_upload."""
        sql = f"SELECT {_UPLOAD_COLUMNS} FROM upload WHERE bucket = $1 AND id = $2"  # noqa: S608
        row = await self._shards.holding(upload_id).fetch_one(sql, bucket_of(upload_id), upload_id)
        return None if row is None else _upload_of(row)

    async def find_video(self, video_id: UUID) -> Video | None:
        """See MediaStore.find_video."""
        sql = f"SELECT {_VIDEO_COLUMNS} FROM video WHERE bucket = $1 AND id = $2"  # noqa: S608
        row = await self._shards.holding(video_id).fetch_one(sql, bucket_of(video_id), video_id)
        return None if row is None else _video_of(row)

    async def get_video(self, video_id: UUID, scope: Scope) -> Video:
        """See MediaStore.get_video."""
        bucket = self._shards.holding(video_id).causal
        return _video_of(await _select_video(bucket, video_id, scope))

    async def list_videos(self, scope: Scope, *, before: UUID, count_max: int) -> Sequence[Video]:
        """See MediaStore.list_videos."""
        bucket = bucket_of(scope.owner)
        rows = await self._shards.bucket(bucket).causal.fetch_all(
            SELECT_VIDEO_PAGE, bucket, scope.tenant, scope.owner, before, count_max
        )
        return [_video_of(row) for row in rows]

    async def change_video(
        self,
        video_id: UUID,
        scope: Scope,
        change: Callable[[Video], Video],
        *,
        now: datetime,
        announce: Callable[[Video], Sequence[OutboxRow]] = lambda _: (),
    ) -> Video:
        """See MediaStore.change_video."""
        async with self._shards.holding(video_id).transaction() as tx:
            video = _video_of(await _select_video(tx, video_id, scope, for_update=True))
            changed = change(video)
            if changed is video:
                return video
            await self._count(tx, video, changed, now)
            await _update_video(tx, changed, now)
            for row in announce(changed):
                await tx.append_outbox(row)
        return replace(changed, version=video.version + 1)

    async def _count(self, tx: Transaction, before: Video, after: Video, now: datetime) -> None:
        """What a change of a video means for its owner's stocks."""
        tenant = after.tenant
        if before.source is None and after.source is not None:
            seconds = Stock(tenant, after.owner, TRANSCODE_SECONDS, day_of(now))
            length_s = max(1, math.ceil(after.source.duration_s))
            limit = self._stocks.transcode_s_per_day_max
            await reserve(tx, seconds, after.id, length_s, limit=limit)
        elif after.state is VideoState.READY and before.state is not VideoState.READY:
            await commit_used(tx, tenant, TRANSCODE_SECONDS, after.id)
        elif after.state.is_final:
            await release(tx, tenant, TRANSCODE_SECONDS, after.id)
        if before.is_source_of_use and not after.is_source_of_use:
            await release(tx, tenant, STORED_BYTES, after.upload_id)

    async def list_forgotten_videos(self, before: datetime, *, count_max: int) -> Sequence[Video]:
        """See MediaStore.list_forgotten_videos."""
        return [
            _video_of(row)
            for shard in self._shards.all()
            for row in await shard.fetch_all(SELECT_FORGOTTEN_VIDEOS, to_us(before), count_max)
        ]

    async def requeue_video(self, video: Video, *, now: datetime) -> None:
        """See MediaStore.requeue_video."""
        key = (bucket_of(video.id), video.id, video.tenant)
        async with self._shards.holding(video.id).transaction() as tx:
            if await tx.execute(TOUCH_VIDEO, *key, to_us(now)):
                await tx.append_outbox(events.transcode_job(video))

    @asynccontextmanager
    async def _changing_upload(
        self, upload_id: UUID, scope: Scope
    ) -> AsyncIterator[tuple[Transaction, Upload]]:
        async with self._shards.holding(upload_id).transaction() as tx:
            row = await _select_upload(tx, upload_id, scope, for_update=True)
            yield tx, _upload_of(row)


async def _select_upload(
    reader: Reader | Transaction, upload_id: UUID, scope: Scope, *, for_update: bool = False
) -> Row:
    row = await _select(reader, SELECT_UPLOAD, upload_id, scope, for_update)
    if row is None:
        raise UploadNotFound(upload_id)
    return row


async def _select_video(
    reader: Reader | Transaction, video_id: UUID, scope: Scope, *, for_update: bool = False
) -> Row:
    row = await _select(reader, SELECT_VIDEO, video_id, scope, for_update)
    if row is None:
        raise VideoNotFound(video_id)
    return row


async def _select(
    reader: Reader | Transaction, sql: str, row_id: UUID, scope: Scope, for_update: bool
) -> Row | None:
    statement = f"{sql} FOR UPDATE" if for_update else sql
    return await reader.fetch_one(
        statement, bucket_of(row_id), row_id, scope.tenant, scope.is_whole_tenant, scope.owner
    )


async def _raise_lost_writer(tx: Transaction, upload: Upload) -> None:
    current = _upload_of(await _select_upload(tx, upload.id, Scope.of_tenant(upload.tenant)))
    if not current.is_open:
        raise UploadClosed(current.state)
    raise OffsetMismatch(current.committed_bytes)


async def _update_upload(tx: Transaction, upload: Upload) -> None:
    await tx.execute(
        UPDATE_UPLOAD,
        bucket_of(upload.id),
        upload.id,
        upload.tenant,
        upload.committed_bytes,
        upload.state.value,
        upload.video_id,
        upload.writer_token,
        to_us(upload.expires_at),
    )


async def _update_video(tx: Transaction, video: Video, now: datetime) -> None:
    failure = video.failure
    await tx.execute(
        UPDATE_VIDEO,
        bucket_of(video.id),
        video.id,
        video.tenant,
        video.state.value,
        _source_text(video.source),
        _renditions_text(video.renditions),
        video.progress_percent,
        failure.reason.value if failure else "",
        failure.description if failure else "",
        int(failure is not None and failure.is_retryable),
        video.job_token,
        to_us(video.lease_ends_at) if video.lease_ends_at else None,
        video.failure_count,
        video.claim_count,
        video.output_token,
        to_us(now),
        to_us(video.ready_at) if video.ready_at else None,
    )


def _row_of_upload(upload: Upload) -> tuple[object, ...]:
    return (
        upload.id,
        upload.tenant,
        upload.owner,
        upload.size_bytes,
        upload.committed_bytes,
        upload.mime_type,
        upload.display_name,
        upload.tus_metadata,
        upload.state.value,
        upload.video_id,
        upload.writer_token,
        to_us(upload.created_at),
        to_us(upload.expires_at),
    )


def _upload_of(row: Row) -> Upload:
    return Upload(
        id=row["id"],
        tenant=row["tenant"],
        owner=row["owner"],
        size_bytes=row["size_bytes"],
        committed_bytes=row["committed_bytes"],
        mime_type=row["mime_type"],
        display_name=row["display_name"],
        tus_metadata=row["tus_metadata"],
        state=UploadState(row["state"]),
        video_id=row["video_id"],
        writer_token=row["writer_token"],
        created_at=of_us(row["created_at_us"]),
        expires_at=of_us(row["expires_at_us"]),
    )


def _video_of_upload(upload: Upload, *, sha256: str, now: datetime) -> Video:
    return Video(
        id=new_id(bucket_of(upload.id)),
        tenant=upload.tenant,
        owner=upload.owner,
        version=1,
        upload_id=upload.id,
        display_name=upload.display_name,
        state=VideoState.QUEUED,
        size_bytes=upload.size_bytes,
        sha256=sha256,
        created_at=now,
    )


def _row_of_video(video: Video, now: datetime) -> tuple[object, ...]:
    """Every column of a new video: nothing is probed, claimed or made yet."""
    return (
        video.id,
        video.tenant,
        video.owner,
        video.version,
        video.upload_id,
        video.display_name,
        video.state.value,
        video.size_bytes,
        video.sha256,
        _source_text(None),
        _renditions_text(()),
        video.progress_percent,
        "",
        "",
        0,
        video.job_token,
        None,
        video.failure_count,
        video.claim_count,
        video.output_token,
        to_us(video.created_at),
        to_us(now),
        None,
    )


def _video_of(row: Row) -> Video:
    return Video(
        id=row["id"],
        tenant=row["tenant"],
        owner=row["owner"],
        version=row["version"],
        upload_id=row["upload_id"],
        display_name=row["display_name"],
        state=VideoState(row["state"]),
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        source=Source(**json.loads(row["source"])) if row["source"] else None,
        renditions=tuple(Rendition(**entry) for entry in json.loads(row["renditions"])),
        progress_percent=row["progress_percent"],
        failure=_failure_of(row),
        job_token=row["job_token"],
        lease_ends_at=_moment(row["lease_ends_at_us"]),
        failure_count=row["failure_count"],
        claim_count=row["claim_count"],
        output_token=row["output_token"],
        created_at=of_us(row["created_at_us"]),
        ready_at=_moment(row["ready_at_us"]),
    )


def _failure_of(row: Row) -> Failure | None:
    if not row["failure_reason"]:
        return None
    return Failure(
        FailureReason(row["failure_reason"]),
        row["failure_description"],
        bool(row["failure_is_retryable"]),
    )


def _moment(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else of_us(microseconds)


def _source_text(source: Source | None) -> str:
    return json.dumps(asdict(source)) if source else ""


def _renditions_text(renditions: tuple[Rendition, ...]) -> str:
    return json.dumps([asdict(rendition) for rendition in renditions])
