"""VideoService: message -> domain -> message, and files out."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from uuid import UUID

from google.api.httpbody_pb2 import HttpBody
from google.protobuf.empty_pb2 import Empty
from tenfold.media.v1 import media_pb2
from tenfold.media.v1.media_service_pb2 import (
    DeleteVideoRequest,
    GetVideoRequest,
    ListVideosRequest,
    ListVideosResponse,
    WatchVideoRequest,
    WatchVideoResponse,
)

from services.media import events
from services.media.domain import (
    FileNotServed,
    Video,
    VideoNotFound,
    VideoState,
    user_name,
    video_id_of,
    video_name,
)
from services.media.ffmpeg import MASTER_NAME
from services.media.files import MediaFiles, content_type_of
from services.media.store import LAST_ID, MediaStore, Scope
from services.media.watch import VideoSignal, VideoWatch
from shared.clock import Clock, to_us
from shared.db.paging import PageScope, open_page_token, page_size_of, seal_page_token
from shared.rpc.context import Context

# What is played never changes under its name, but it may be deleted.
FILE_CACHE_CONTROL = "private, max-age=300"


class VideoHandler:
    """See VideoService in the contract."""

    def __init__(
        self,
        *,
        store: MediaStore,
        files: MediaFiles,
        watch: VideoWatch,
        signal: VideoSignal,
        clock: Clock,
        page_secret: bytes,
    ) -> None:
        self._store = store
        self._files = files
        self._watch = watch
        self._signal = signal
        self._clock = clock
        self._page_secret = page_secret

    async def GetVideo(self, request: GetVideoRequest, context: Context) -> media_pb2.Video:
        """A video that is not deleted."""
        return video_to_proto(await self._visible(request.name, context))

    async def _visible(self, name: str, context: Context) -> Video:
        video = await self._store.get_video(video_id_of(name), Scope.of(context.principal))
        if video.state is VideoState.DELETED:
            raise VideoNotFound(video.id)
        return video

    async def ListVideos(self, request: ListVideosRequest, context: Context) -> ListVideosResponse:
        """The caller's videos, newest first."""
        scope = PageScope.of(context.method, context.principal)
        size = page_size_of(request.page_size)
        position = open_page_token(self._page_secret, scope, request.page_token)
        before = UUID(str(position[0])) if position else LAST_ID
        owner = Scope(context.principal.tenant, False, context.principal.owner)
        # One more than is shown tells whether there is a next page.
        videos = await self._store.list_videos(owner, before=before, count_max=size + 1)
        response = ListVideosResponse(videos=map(video_to_proto, videos[:size]))
        if len(videos) > size:
            last_id = videos[size - 1].id
            response.next_page_token = seal_page_token(self._page_secret, scope, last_id)
        return response

    async def WatchVideo(
        self, request: WatchVideoRequest, context: Context
    ) -> AsyncIterator[WatchVideoResponse]:
        """The video now, and each time it has changed."""
        video_id, scope = video_id_of(request.name), Scope.of(context.principal)
        async with aclosing(self._watch.run(video_id, scope)) as changes:
            async for video in changes:
                yield WatchVideoResponse(cursor=str(video.version), video=video_to_proto(video))

    async def DeleteVideo(self, request: DeleteVideoRequest, context: Context) -> Empty:
        """Deletes the video; a worker that runs stops, its bytes and ours are freed."""
        now = self._clock.now()
        video = await self._store.change_video(
            video_id_of(request.name),
            Scope.of(context.principal),
            lambda video: video if video.state is VideoState.DELETED else video.deleted(),
            now=now,
            announce=lambda video: [events.video_deleted(video, now=now)],
        )
        self._signal.ring(video.id)
        await self._files.remove_upload(video.upload_id)
        await self._files.remove_folder(self._files.videos / str(video.id))
        return Empty()

    async def GetVideoFile(
        self, _requests: AsyncIterator[HttpBody], context: Context
    ) -> AsyncIterator[HttpBody]:
        """A play-list or a segment, in pieces."""
        file_name = context.metadata.get("http-path-file", "")
        content_type = content_type_of(file_name)
        video = await self._visible(context.metadata.get("http-path-video", ""), context)
        if video.state is not VideoState.READY:
            raise FileNotServed
        folder = self._files.output_folder(video.id, video.output_token)
        async with self._files.reading(folder / file_name) as (size_bytes, pieces):
            await context.send_headers(
                {
                    "http-status": "200",
                    "http-header-content-length": str(size_bytes),
                    "http-header-cache-control": FILE_CACHE_CONTROL,
                }
            )
            async for piece in pieces:
                yield HttpBody(content_type=content_type, data=piece)


def video_to_proto(video: Video) -> media_pb2.Video:
    """A video as the contract shows it."""
    message = media_pb2.Video(
        name=video_name(video.id),
        owner=user_name(video.owner),
        display_name=video.display_name,
        state=media_pb2.Video.State.Value(f"STATE_{video.state}"),
        source=_source_to_proto(video),
        progress_percent=video.progress_percent,
        failure=events.failure_to_proto(video.failure) if video.failure else None,
        version=video.version,
    )
    message.create_time.FromMicroseconds(to_us(video.created_at))
    if video.ready_at is not None:
        message.ready_time.FromMicroseconds(to_us(video.ready_at))
    if video.state is VideoState.READY:
        _add_renditions(message, video)
    return message


def _add_renditions(message: media_pb2.Video, video: Video) -> None:
    folder = f"/v1/{video_name(video.id)}/files/"
    message.playlist_path = f"{folder}{MASTER_NAME}"
    for rendition in video.renditions:
        message.renditions.add(
            width=rendition.width,
            height=rendition.height,
            bits_per_second=rendition.bits_per_second,
            playlist_path=f"{folder}{rendition.name}.m3u8",
        )


def _source_to_proto(video: Video) -> media_pb2.Source:
    message = media_pb2.Source(size_bytes=video.size_bytes, sha256=video.sha256)
    if video.source is not None:
        message.container = video.source.container
        message.video_codec = video.source.video_codec
        message.audio_codec = video.source.audio_codec
        message.width = video.source.width
        message.height = video.source.height
        message.frames_per_second = video.source.frames_per_second
        message.duration_s = video.source.duration_s
    return message
