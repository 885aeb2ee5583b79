"""The live stream of one video: bounded, correct without being told.

The truth is the video's row; a change in this process wakes the stream at once, one in
another process is found by looking again. Nothing is buffered: a slow reader skips to the
newest state.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

from services.media.domain import Video, VideoNotFound, VideoState
from services.media.store import MediaStore, Scope
from shared.errors import Overloaded

RETRY_AFTER_S = 5.0


class VideoSignal:
    """Wakes whoever waits for a change of a video in this process."""

    def __init__(self) -> None:
        self._waiting: defaultdict[UUID, set[asyncio.Event]] = defaultdict(set)
        self.count = 0

    def ring(self, video_id: UUID) -> None:
        """The video has changed."""
        for event in self._waiting.get(video_id, ()):
            event.set()

    @contextmanager
    def listening(self, video_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set with each change, until the block is left."""
        event = asyncio.Event()
        self._waiting[video_id].add(event)
        self.count += 1
        try:
            yield event
        finally:
            self.count -= 1
            self._waiting[video_id].discard(event)
            if not self._waiting[video_id]:
                del self._waiting[video_id]


class VideoWatch:
    """Opens streams, at most `watches_max` in this process.

    Args:
        poll_s: how soon a change made by another process is seen.
    """

    def __init__(
        self, store: MediaStore, *, signal: VideoSignal, poll_s: float, watches_max: int
    ) -> None:
        self._store = store
        self._signal = signal
        self._poll_s = poll_s
        self._watches_max = watches_max

    async def run(self, video_id: UUID, scope: Scope) -> AsyncGenerator[Video, None]:
        """Yield the video at once, then each time it has changed, until nothing more can.

        Raises:
            VideoNotFound: absent, not in scope, or deleted before the stream began.
            Overloaded: too many streams are open.
        """
        if self._signal.count >= self._watches_max:
            raise Overloaded("too many streams are open", retry_after_s=RETRY_AFTER_S)
        with self._signal.listening(video_id) as changed:
            video = await self._store.get_video(video_id, scope)
            if video.state is VideoState.DELETED:
                raise VideoNotFound(video_id)
            yield video
            while not video.state.is_final:
                await self._wait(changed)
                newest = await self._store.get_video(video_id, scope)
                if newest.version > video.version:
                    video = newest
                    yield video

    async def _wait(self, changed: asyncio.Event) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                await changed.wait()
        changed.clear()
