"""UploadService: tus over the raw binding. Headers in, headers out, bytes to a writer."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from google.api.httpbody_pb2 import HttpBody
from tenfold.media.v1 import media_pb2
from tenfold.media.v1.media_service_pb2 import GetUploadRequest

from services.media import tus
from services.media.domain import (
    UPLOAD_SUCCESSFUL,
    OffsetMismatch,
    Upload,
    UploadClosed,
    UploadState,
    clean_display_name,
    clean_mime_type,
    upload_id_of,
    upload_name,
    video_name,
)
from services.media.files import MediaFiles
from services.media.store import MediaStore, OpenUploadLimits, Scope
from services.media.uploads import UploadWriters
from shared.clock import Clock, to_us
from shared.db.ids import bucket_of, new_id
from shared.db.port import Once
from shared.errors import DeadlineExceeded
from shared.rpc.context import Context

FILES_PATH = "/v1/files/"
PROBLEM_CONTENT_TYPE = "application/problem+json"
_HEADER = "http-header-"


@dataclass(frozen=True)
class Answer:
    """What one tus request is answered with, beside Tus-Resumable."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    problem: bytes = b""


class UploadHandler:
    """See UploadService in the contract.

    Args:
        bytes_max: the largest upload.
        limits: of one owner's open uploads.
    """

    def __init__(
        self,
        *,
        store: MediaStore,
        files: MediaFiles,
        writers: UploadWriters,
        clock: Clock,
        bytes_max: int,
        limits: OpenUploadLimits,
        lifetime: timedelta,
    ) -> None:
        self._store = store
        self._files = files
        self._writers = writers
        self._clock = clock
        self._bytes_max = bytes_max
        self._limits = limits
        self._lifetime = lifetime

    async def DescribeTus(
        self, _requests: AsyncIterator[HttpBody], context: Context
    ) -> AsyncIterator[HttpBody]:
        """What this server speaks; the client's version does not matter here."""
        headers = {
            "tus-version": tus.VERSION,
            "tus-extension": tus.EXTENSIONS,
            "tus-max-size": str(self._bytes_max),
            "tus-checksum-algorithm": ",".join(tus.CHECKSUM_ALGORITHMS),
        }
        await _send(context, Answer(204, headers))
        yield HttpBody()  # see _answering

    async def CreateTusUpload(
        self, _requests: AsyncIterator[HttpBody], context: Context
    ) -> AsyncIterator[HttpBody]:
        """Reserves an upload."""
        async for part in _answering(context, self._create(context)):
            yield part

    async def HeadTusUpload(
        self, _requests: AsyncIterator[HttpBody], context: Context
    ) -> AsyncIterator[HttpBody]:
        """How many bytes are safe."""
        async for part in _answering(context, self._head(context)):
            yield part

    async def PatchTusUpload(
        self, requests: AsyncIterator[HttpBody], context: Context
    ) -> AsyncIterator[HttpBody]:
        """Appends bytes."""
        async for part in _answering(context, self._patch(requests, context)):
            yield part

    async def TerminateTusUpload(
        self, _requests: AsyncIterator[HttpBody], context: Context
    ) -> AsyncIterator[HttpBody]:
        """Gives an upload up."""
        async for part in _answering(context, self._terminate(context)):
            yield part

    async def GetUpload(self, request: GetUploadRequest, context: Context) -> media_pb2.Upload:
        """The state of an upload."""
        upload_id = upload_id_of(request.name)
        return upload_to_proto(await self._store.get_upload(upload_id, Scope.of(context.principal)))

    async def _create(self, context: Context) -> Answer:
        headers = _headers(context)
        tus.check_version(headers)
        creation = tus.creation_of(headers)
        if creation.size_bytes > self._bytes_max:
            detail = f"At most {self._bytes_max} bytes are taken."
            raise tus.TusRefusal(
                413, "UPLOAD_TOO_LARGE", detail, {"tus-max-size": str(self._bytes_max)}
            )
        is_replayed = False

        def on_replay() -> None:
            nonlocal is_replayed
            is_replayed = True
            context.mark_replayed()

        upload = await self._store.insert_upload(
            self._new_upload(context, creation),
            once=_once_of(context, creation, on_replay),
            limits=self._limits,
        )
        answer = {"location": f"{FILES_PATH}{upload.id}", **_expires(upload)}
        return Answer(201, {**answer, "idempotency-replayed": "true"} if is_replayed else answer)

    def _new_upload(self, context: Context, creation: tus.Creation) -> Upload:
        owner, now = context.principal.owner, self._clock.now()
        return Upload(
            id=new_id(bucket_of(owner)),
            tenant=context.principal.tenant,
            owner=owner,
            size_bytes=creation.size_bytes,
            committed_bytes=0,
            mime_type=clean_mime_type(creation.text("filetype", "type")),
            display_name=clean_display_name(creation.text("filename", "name")),
            tus_metadata=creation.header,
            state=UploadState.OPEN,
            video_id=None,
            writer_token=0,
            created_at=now,
            expires_at=now + self._lifetime,
        )

    async def _head(self, context: Context) -> Answer:
        tus.check_version(_headers(context))
        upload = await self._store.get_upload(_upload_id(context), Scope.of(context.principal))
        _refuse_gone(upload.state)
        headers = {
            "upload-offset": str(upload.committed_bytes),
            "upload-length": str(upload.size_bytes),
            "cache-control": "no-store",
            **_expires(upload),
        }
        if upload.tus_metadata:
            headers["upload-metadata"] = upload.tus_metadata
        return Answer(200, headers)

    async def _patch(self, requests: AsyncIterator[HttpBody], context: Context) -> Answer:
        headers = _headers(context)
        tus.check_version(headers)
        tus.check_content_type(headers)
        offset = tus.number_of(headers, "upload-offset")
        length = tus.optional_number_of(headers, "content-length")
        checksum = tus.checksum_of(headers)
        upload_id, scope = _upload_id(context), Scope.of(context.principal)
        upload = await self._store.get_upload(upload_id, scope)
        _refuse_gone(upload.state)
        if offset != upload.committed_bytes:
            raise OffsetMismatch(upload.committed_bytes)
        if offset + (length or 0) > upload.size_bytes:
            detail = f"The upload has {upload.size_bytes} bytes; more were announced."
            raise tus.TusRefusal(413, "UPLOAD_TOO_LONG", detail)
        if upload.state is UploadState.COMPLETED:
            return _patched(upload)  # the last byte's answer was lost; there is nothing to add
        upload = await self._store.take_upload(upload_id, scope, offset=offset)
        return _patched(await self._receive(upload, checksum, requests))

    async def _receive(
        self,
        upload: Upload,
        checksum: tus.Checksum | None,
        requests: AsyncIterator[HttpBody],
    ) -> Upload:
        async with self._writers.open(upload, checksum) as writer:
            try:
                async for body in requests:
                    await writer.feed(body.data)
                await writer.finish()
            except (asyncio.CancelledError, DeadlineExceeded):
                # The client has gone, was silent for too long, or we are stopping.
                await writer.cut()
                raise
            return writer.upload

    async def _terminate(self, context: Context) -> Answer:
        tus.check_version(_headers(context))
        upload = await self._store.end_upload(
            _upload_id(context),
            Scope.of(context.principal),
            UploadState.TERMINATED,
            keep_until=self._clock.now() + self._lifetime,
        )
        await self._files.remove_upload(upload.id)
        return Answer(204)


def upload_to_proto(upload: Upload) -> media_pb2.Upload:
    """An upload as the contract shows it."""
    is_completed = upload.state is UploadState.COMPLETED
    message = media_pb2.Upload(
        name=upload_name(upload.id),
        size_bytes=upload.size_bytes,
        committed_bytes=upload.committed_bytes,
        mime_type=upload.mime_type,
        display_name=upload.display_name,
        state=media_pb2.Upload.State.Value(f"STATE_{upload.state}"),
        video=video_name(upload.video_id) if upload.video_id else "",
        message=UPLOAD_SUCCESSFUL if is_completed else "",
    )
    message.create_time.FromMicroseconds(to_us(upload.created_at))
    message.expire_time.FromMicroseconds(to_us(upload.expires_at))
    return message


async def _answering(
    context: Context, answering: Coroutine[Any, Any, Answer]
) -> AsyncIterator[HttpBody]:
    """Run it, and say what came out in tus's words; other errors take the usual way."""
    try:
        answer = await answering
    except UploadClosed as closed:
        answer = _refused(_ended(closed.state), context)
    except OffsetMismatch as mismatch:
        offset = {"upload-offset": str(mismatch.committed_bytes)}
        refusal = tus.TusRefusal(409, mismatch.reason, mismatch.message, offset)
        answer = _refused(refusal, context)
    except tus.TusRefusal as refusal:
        answer = _refused(refusal, context)
    await _send(context, answer)
    # One message always, be it empty: without any, grpc.aio's client may see the end of the
    # call before its initial metadata, and then shows none of it (7 of 100 under load).
    content_type = PROBLEM_CONTENT_TYPE if answer.problem else ""
    yield HttpBody(content_type=content_type, data=answer.problem)


def _refused(refusal: tus.TusRefusal, context: Context) -> Answer:
    return Answer(refusal.status, refusal.headers, refusal.problem(context.request_id))


def _ended(state: UploadState) -> tus.TusRefusal:
    status = 409 if state is UploadState.COMPLETED else 410
    return tus.TusRefusal(status, UploadClosed.reason, f"The upload is {state}.")


def _refuse_gone(state: UploadState) -> None:
    if state in {UploadState.TERMINATED, UploadState.EXPIRED}:
        raise _ended(state)


async def _send(context: Context, answer: Answer) -> None:
    headers = {tus.RESUMABLE: tus.VERSION, **answer.headers}
    metadata = {f"{_HEADER}{name}": value for name, value in headers.items()}
    await context.send_headers({"http-status": str(answer.status), **metadata})


def _headers(context: Context) -> dict[str, str]:
    return {
        key.removeprefix(_HEADER): value
        for key, value in context.metadata.items()
        if key.startswith(_HEADER)
    }


def _upload_id(context: Context) -> UUID:
    return upload_id_of(context.metadata.get("http-path-upload", ""))


def _once_of(context: Context, creation: tus.Creation, on_replay: Callable[[], None]) -> Once:
    canonical = f"{context.method}\0{creation.size_bytes}\0{creation.header}"
    return Once(
        principal=context.principal,
        method=context.method,
        request_id=context.idempotency_key,
        fingerprint=hashlib.sha256(canonical.encode()).digest(),
        on_replay=on_replay,
    )


def _expires(upload: Upload) -> dict[str, str]:
    return {"upload-expires": tus.expires_header(upload.expires_at)} if upload.is_open else {}


def _patched(upload: Upload) -> Answer:
    headers = {"upload-offset": str(upload.committed_bytes), **_expires(upload)}
    if upload.video_id is not None:
        headers["upload-video"] = video_name(upload.video_id)
        headers["upload-message"] = UPLOAD_SUCCESSFUL
    return Answer(204, headers)
