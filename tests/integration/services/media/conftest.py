import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import imageio_ffmpeg
import pytest

from deploy.local import servers
from deploy.local.address import free_addresses
from tests.integration.services.media.service import MediaProcess
from tests.mesh import running_program

Films = dict[str, Path]


def make_film(path: Path, *options: str, size: str = "1280x720", seconds: float = 2.0) -> Path:
    subprocess.run(
        [
            imageio_ffmpeg.get_ffmpeg_exe(),
            *("-y", "-loglevel", "error", "-t", str(seconds)),
            *("-f", "lavfi", "-i", f"testsrc2=size={size}:rate=30"),
            *("-t", str(seconds), "-f", "lavfi", "-i", "sine"),
            *("-c:v", "libx264", "-preset", "ultrafast", "-c:a", "aac", *options, str(path)),
        ],
        check=True,
        timeout=60,
    )
    return path


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two seconds of 720p H.264 and AAC; its index is at its beginning."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return make_film(path, "-movflags", "+faststart", "-b:v", "4M").read_bytes()


@pytest.fixture(scope="session")
def small_film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Half a second, for tests that are about something else."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return make_film(path, size="320x180", seconds=0.5).read_bytes()


@pytest.fixture(scope="session")
async def media(
    tmp_path_factory: pytest.TempPathFactory, nats_url: str
) -> AsyncIterator[MediaProcess]:
    """One media service for tests that do not kill it."""
    process = MediaProcess(tmp_path_factory.mktemp("media") / "data", nats_url)
    await process.start()
    yield process
    process.stop()


@pytest.fixture
def own_nats_url(tmp_path: Path) -> Iterator[str]:
    """A NATS of the test's own: jobs of one service never reach another's."""
    folder, [address] = tmp_path / "nats", free_addresses(1)
    folder.mkdir()
    token = servers.new_token()
    program = servers.nats_program(folder, address, token=token, environ=os.environ)
    with running_program(program, folder):
        yield servers.nats_url(address, token)


@pytest.fixture
def own_media(tmp_path: Path, own_nats_url: str) -> Iterator[MediaProcess]:
    """A media service of the test's own, not started yet."""
    process = MediaProcess(tmp_path / "data", own_nats_url)
    yield process
    process.stop()
