"""A media service of its own, as a process that can be killed, and a tus client for it."""

import asyncio
import base64
import contextlib
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import grpc.aio
from google.api.httpbody_pb2 import HttpBody
from tenfold.media.v1 import media_pb2
from tenfold.media.v1.media_service_pb2 import (
    DeleteVideoRequest,
    GetUploadRequest,
    GetVideoRequest,
    ListVideosRequest,
    ListVideosResponse,
    WatchVideoRequest,
)
from tenfold.media.v1.media_service_pb2_grpc import UploadServiceStub, VideoServiceStub

from deploy.local.data_folder import DataFolder
from shared.db.ids import new_id
from shared.identity import IdentitySigner, Principal, PrincipalKind

READY_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 30.0
VIDEO_TIMEOUT_S = 90.0
SCOPES = frozenset({"media.upload", "media.read", "media.write"})
FINAL = {
    media_pb2.Video.STATE_READY,
    media_pb2.Video.STATE_FAILED,
    media_pb2.Video.STATE_DELETED,
}


async def until(condition: Callable[[], object], *, timeout_s: float = VIDEO_TIMEOUT_S) -> None:
    """Return when the condition holds; TimeoutError when it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 -- files and processes ring no bell
            await asyncio.sleep(0.05)


def new_user(tenant: str = "default") -> Principal:
    subject = str(new_id(secrets.randbelow(4096)))
    return Principal(PrincipalKind.USER, subject, tenant=tenant, scopes=SCOPES, credential="c")


@dataclass
class RawAnswer:
    """What the edge would answer."""

    status: int
    headers: Mapping[str, str]
    content_type: str
    body: bytes


@dataclass
class MediaProcess:
    """`python -m services media` on a data folder; start it as often as you kill it."""

    folder: Path
    nats_url: str
    environ: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    port: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = DataFolder(self.folder)
        data.make_folders()
        data.make_keys()

    async def start(self, **environ: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = {
            "TENFOLD_DATA": str(self.folder),
            "TENFOLD_LISTEN": f"127.0.0.1:{self.port}",
            "TENFOLD_NATS_URL": self.nats_url,
            "TENFOLD_MEDIA_PRESET": "ultrafast",
            "TENFOLD_MEDIA_LEASE_S": "2",
            "TENFOLD_MEDIA_JOB_ACK_WAIT_S": "2",
            "TENFOLD_MEDIA_RETRY_S": "0.1",
            "TENFOLD_MEDIA_SWEEP_S": "0.5",
        }
        self._spawn({**os.environ, **settings, **self.environ, **environ})
        async with asyncio.timeout(READY_TIMEOUT_S), self.channel() as channel:
            await channel.channel_ready()

    def _spawn(self, environ: dict[str, str]) -> None:
        argv = [sys.executable, "-m", "services", "media"]
        with (self.folder / "media.log").open("ab") as log:
            self.process = subprocess.Popen(argv, env=environ, stdout=log, stderr=log)

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    async def wait_dead(self) -> None:
        await until(lambda: self.process is None or self.process.poll() is not None)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    @property
    def log(self) -> str:
        return (self.folder / "media.log").read_text()

    @property
    def media(self) -> Path:
        return self.folder / "services" / "media"

    def stocks(self) -> dict[str, tuple[int, int]]:
        """Of all owners together: kind -> used, reserved."""
        found: dict[str, tuple[int, int]] = {}
        for path in (self.media / "shards").glob("shard-*.sqlite"):
            with contextlib.closing(sqlite3.connect(path)) as connection:
                for kind, used, reserved in connection.execute(
                    "SELECT kind, used, reserved FROM stock WHERE used + reserved > 0"
                ):
                    sums = found.get(kind, (0, 0))
                    found[kind] = (sums[0] + used, sums[1] + reserved)
        return found

    @asynccontextmanager
    async def client(self, principal: Principal) -> AsyncIterator["MediaClient"]:
        key = (self.folder / "identity" / "edge.pem").read_bytes()
        signer = IdentitySigner("edge", key)
        async with self.channel() as channel:
            yield MediaClient(channel, signer, principal)


class MediaClient:
    """One user's calls, raw ones as the edge makes them."""

    def __init__(
        self, channel: grpc.aio.Channel, signer: IdentitySigner, principal: Principal
    ) -> None:
        self._uploads = UploadServiceStub(channel)
        self._videos = VideoServiceStub(channel)
        self._signer = signer
        self.principal = principal

    @property
    def _identity(self) -> list[tuple[str, str]]:
        return [("tenfold-identity", self._signer.token_for(self.principal))]

    async def raw(
        self,
        method: Callable,
        headers: Mapping[str, str] | None = None,
        *,
        path: Mapping[str, str] | None = None,
        body: Iterable[bytes] = (),
        cut: bool = False,
        key: str = "",
    ) -> RawAnswer | None:
        """One raw call; with `cut` it is cancelled after the body instead of ended."""
        metadata = [*self._identity]
        metadata += [(f"http-header-{name}", value) for name, value in (headers or {}).items()]
        metadata += [(f"http-path-{name}", value) for name, value in (path or {}).items()]
        metadata += [("idempotency-key", key)] if key else []
        call = method(metadata=metadata, timeout=CALL_TIMEOUT_S)
        try:
            for part in body:
                await call.write(HttpBody(data=part))
            if cut:
                await asyncio.sleep(0.2)  # the wire carries what was written
                call.cancel()
                return None
            await call.done_writing()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError, grpc.aio.InternalError):
            pass  # answered before the body was over
        # In this order, as the edge does it: a message says that the metadata is there.
        parts = []
        try:
            parts = [part async for part in call]
        except grpc.aio.AioRpcError as error:
            # A write that met the end of the call has replaced the status, not the headers.
            is_answered = "http-status" in dict(await call.initial_metadata())
            if error.code() is not grpc.StatusCode.INTERNAL or not is_answered:
                raise
        initial = dict(await call.initial_metadata())
        return RawAnswer(
            int(initial.get("http-status", "0")),
            {
                name.removeprefix("http-header-"): value
                for name, value in initial.items()
                if name.startswith("http-header-")
            },
            parts[0].content_type if parts else "",
            b"".join(part.data for part in parts),
        )

    async def tus(self, verb: str, upload: str = "", **options) -> RawAnswer | None:
        methods = {
            "OPTIONS": self._uploads.DescribeTus,
            "POST": self._uploads.CreateTusUpload,
            "HEAD": self._uploads.HeadTusUpload,
            "PATCH": self._uploads.PatchTusUpload,
            "DELETE": self._uploads.TerminateTusUpload,
        }
        headers = {"tus-resumable": "1.0.0", **options.pop("headers", {})}
        path = {"upload": upload} if upload else {}
        return await self.raw(methods[verb], headers, path=path, **options)

    async def create(self, size: int, *, name: str = "film.mp4", key: str = "") -> str:
        metadata = f"filename {base64.b64encode(name.encode()).decode()}"
        headers = {"upload-length": str(size), "upload-metadata": metadata}
        answer = await self.tus("POST", headers=headers, key=key)
        assert answer is not None and answer.status == 201, answer
        return answer.headers["location"].rpartition("/")[2]

    async def patch(self, upload: str, offset: int, data: bytes, **options) -> RawAnswer | None:
        headers = {
            "content-type": "application/offset+octet-stream",
            "upload-offset": str(offset),
            **options.pop("headers", {}),
        }
        parts = [data[start : start + 262_144] for start in range(0, len(data), 262_144)]
        return await self.tus("PATCH", upload, headers=headers, body=parts, **options)

    async def offset(self, upload: str) -> int:
        answer = await self.tus("HEAD", upload)
        assert answer is not None and answer.status == 200, answer
        return int(answer.headers["upload-offset"])

    async def upload(self, data: bytes, *, name: str = "film.mp4") -> str:
        """Upload everything; the video's name."""
        upload = await self.create(len(data), name=name)
        answer = await self.patch(upload, 0, data)
        assert answer is not None and answer.status == 204, answer
        return answer.headers["upload-video"]

    async def get_upload(self, upload: str) -> media_pb2.Upload:
        request = GetUploadRequest(name=f"uploads/{upload}")
        return await self._uploads.GetUpload(request, metadata=self._identity, timeout=10)

    async def get(self, video: str) -> media_pb2.Video:
        request = GetVideoRequest(name=video)
        return await self._videos.GetVideo(request, metadata=self._identity, timeout=10)

    async def list(self, **fields) -> ListVideosResponse:
        request = ListVideosRequest(**fields)
        return await self._videos.ListVideos(request, metadata=self._identity, timeout=10)

    async def delete(self, video: str) -> None:
        request = DeleteVideoRequest(name=video)
        await self._videos.DeleteVideo(request, metadata=self._identity, timeout=10)

    async def watch(self, video: str) -> AsyncIterator[media_pb2.Video]:
        request = WatchVideoRequest(name=video)
        call = self._videos.WatchVideo(request, metadata=self._identity, timeout=VIDEO_TIMEOUT_S)
        async for message in call:
            yield message.video

    async def finished(self, video: str) -> media_pb2.Video:
        """The video, once it is READY, FAILED or DELETED; asks anew when a server dies."""
        async with asyncio.timeout(VIDEO_TIMEOUT_S):
            while True:
                newest = await self.get(video)
                if newest.state in FINAL:
                    return newest
                await asyncio.sleep(0.1)

    async def file(self, video: str, name: str) -> RawAnswer:
        path = {"video": video.removeprefix("videos/"), "file": name}
        answer = await self.raw(self._videos.GetVideoFile, path=path)
        assert answer is not None
        return answer

    async def download(self, video: media_pb2.Video, folder: Path) -> Path:
        """Everything that is played, as files; the master list's path."""
        names, done = ["master.m3u8"], set()
        while names:
            name = names.pop()
            if name in done:
                continue
            done.add(name)
            answer = await self.file(video.name, name)
            (folder / name).write_bytes(answer.body)
            if name.endswith(".m3u8"):
                lines = answer.body.decode().splitlines()
                names += [line for line in lines if line and not line.startswith("#")]
        return folder / "master.m3u8"


def id_of(name: str) -> UUID:
    return UUID(name.rpartition("/")[2])
