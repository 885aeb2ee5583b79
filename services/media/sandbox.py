"""Runs what reads hostile bytes: the probe and ffmpeg, each in a process of its own.

Every run has: processor time, address space, file size and open files limited and a low
priority (shared.spawner.Limits), no network and no files but its own (confine.py), a wall
clock, a limit on its output, and, for ffmpeg, a stall detector. Leaving by any way kills
the whole process group.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from services.media.config import MediaConfig
from services.media.domain import (
    FailureReason,
    Probe,
    RunFailed,
    Rung,
    Source,
    SourceRefused,
    TranscoderMissing,
)
from services.media.ffmpeg import Encoding, progress_us, transcode_arguments
from services.media.files import folder_bytes
from shared.spawner import Limits, Program, Spawner, SpawnError

CONFINE = Path(__file__).with_name("confine.py")
FFMPEG_VARIABLE = "TENFOLD_FFMPEG_BIN"
ENVIRONMENT = {"LANG": "C.UTF-8", "HOME": "/nonexistent"}
NICE = 10
OPEN_FILES_MAX = 256
ANSWER_BYTES_MAX = 64 * 1024
ERROR_CHARS_MAX = 300
CORES_MAX = 64
OUTPUT_BYTES_SPARE = 64 * 1024 * 1024
OUTPUT_FACTOR = 2.0
# What a program that is not linked statically needs to start.
SYSTEM_FILES = ("/lib", "/lib64", "/usr/lib", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")

Progress = Callable[[int], Awaitable[None]]


def find_ffmpeg() -> str | None:
    """The program's path: TENFOLD_FFMPEG_BIN, else the wheel's; None if there is none."""
    override = os.environ.get(FFMPEG_VARIABLE, "")
    if override:
        return override if os.access(override, os.X_OK) else None
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Sandbox:
    """Starts the probe and ffmpeg.

    Attributes:
        ffmpeg: its path; None when it is not installed: probing still works.
    """

    spawner: Spawner
    ffmpeg: str | None
    config: MediaConfig

    async def probe(self, path: Path) -> Probe:
        """What a file is.

        Raises:
            SourceRefused: it is no film that we read.
            RunFailed: the probe broke its limits or died.
        """
        request = {"path": str(path), "pixels_max": self.config.pixels_max}
        argv = [sys.executable, "-I", "-m", "services.media.probe", json.dumps(request)]
        answer = json.loads(await self._answer_of(argv))
        if "refused" in answer:
            raise SourceRefused(FailureReason.NOT_A_VIDEO, answer["refused"])
        found: dict[str, Any] = answer["probe"]
        return Probe(**{**found, "source": Source(**found["source"])})

    async def _answer_of(self, argv: Sequence[str]) -> bytes:
        timeout_s = self.config.probe_timeout_s
        limits = self._limits(timeout_s, file_bytes=ANSWER_BYTES_MAX)
        try:
            async with asyncio.timeout(timeout_s), self._running(argv, limits) as running:
                answer = await running.program.stdout.read(ANSWER_BYTES_MAX)
                await running.succeed()
        except TimeoutError as error:
            raise RunFailed(f"The file could not be read in {timeout_s:g} s.") from error
        return answer

    async def transcode(
        self,
        source: Path,
        folder: Path,
        probe: Probe,
        rungs: Sequence[Rung],
        on_progress: Progress,
    ) -> int:
        """Make segments and variant lists in a folder that exists and is empty.

        Args:
            source: the file.
            folder: for the output.
            probe: what the file is.
            rungs: the qualities.
            on_progress: told the microseconds of film that are done, a few times a second.

        Returns:
            The microseconds of film that were made.

        Raises:
            TranscoderMissing: ffmpeg is not installed.
            RunFailed: ffmpeg failed, hung, or broke its limits.
        """
        if self.ffmpeg is None:
            raise TranscoderMissing
        duration_s = probe.source.duration_s
        wall_s = self.config.wall_clock_s + duration_s * self.config.wall_clock_per_second
        bytes_max = _output_bytes_max(rungs, duration_s)
        encoding = Encoding(self.config.preset, self.config.encoder_threads)
        argv = self._confined(
            [self.ffmpeg, *transcode_arguments(source, folder, probe, rungs, encoding)],
            readable=[str(source), self.ffmpeg],
            writable=[str(folder)],
        )
        try:
            async with (
                asyncio.timeout(wall_s),
                self._running(argv, self._limits(wall_s, file_bytes=bytes_max)) as running,
            ):
                check = partial(_check_output, folder, bytes_max)
                done_us = await self._follow(running.program, on_progress, check)
                await running.succeed()
        except TimeoutError as error:
            raise RunFailed(f"ffmpeg did not end in {wall_s:.0f} s.") from error
        return done_us

    async def _follow(
        self, program: Program, on_progress: Progress, check: Callable[[], Awaitable[None]]
    ) -> int:
        """Pass on progress until the output ends; no news for too long is a stall."""
        newest_us = 0
        while True:
            try:
                async with asyncio.timeout(self.config.stall_s):
                    while line := await program.stdout.readline():
                        done_us = progress_us(line.decode(errors="replace"))
                        if done_us is not None and done_us > newest_us:
                            newest_us = done_us
                            break
            except TimeoutError as error:
                text = f"ffmpeg made no progress for {self.config.stall_s:g} s."
                raise RunFailed(text) from error
            if not line:
                return newest_us
            await check()
            await on_progress(newest_us)

    def _confined(
        self, argv: Sequence[str], *, readable: Sequence[str], writable: Sequence[str]
    ) -> list[str]:
        ties = {"readable": [*SYSTEM_FILES, *readable], "writable": [*writable]}
        return [sys.executable, "-I", "-S", str(CONFINE), json.dumps(ties), *argv]

    def _limits(self, wall_s: float, *, file_bytes: int) -> Limits:
        return Limits(
            cpu_s=int(wall_s * min(os.cpu_count() or 1, CORES_MAX)) + 1,
            memory_bytes=self.config.memory_bytes_max,
            file_bytes=file_bytes,
            files=OPEN_FILES_MAX,
            nice=NICE,
        )

    @asynccontextmanager
    async def _running(self, argv: Sequence[str], limits: Limits) -> AsyncIterator["_Running"]:
        try:
            async with self.spawner.run(
                argv, limits=limits, cwd="/", environment=ENVIRONMENT
            ) as program:
                tail = asyncio.create_task(_tail_of(program.stderr))
                try:
                    yield _Running(program, tail)
                finally:
                    tail.cancel()
                    await asyncio.wait({tail})
        except SpawnError as error:
            raise RunFailed("The program could not be started.") from error


@dataclass(frozen=True)
class _Running:
    program: Program
    tail: "asyncio.Task[str]"

    async def succeed(self) -> None:
        """Wait for the end.

        Raises:
            RunFailed: it did not exit with 0.
        """
        code, tail = await self.program.wait(), await self.tail
        if code != 0:
            what = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise RunFailed(f"The program ended with {what}. {tail}".strip())


async def _tail_of(stream: asyncio.StreamReader) -> str:
    """The last words; everything is read, so that the program never waits for us."""
    tail = b""
    while block := await stream.read(4096):
        tail = (tail + block)[-4 * ERROR_CHARS_MAX :]
    return _without_paths(tail.decode(errors="replace"))


def _without_paths(text: str) -> str:
    """The last lines for people; where our files are is nobody's business."""
    words = (word for word in text.split() if "/" not in word)
    return " ".join(words)[-ERROR_CHARS_MAX:]


def _output_bytes_max(rungs: Sequence[Rung], duration_s: float) -> int:
    bits_per_second = sum(rung.video_bits_per_second_max + 256_000 for rung in rungs)
    return int(bits_per_second / 8 * duration_s * OUTPUT_FACTOR) + OUTPUT_BYTES_SPARE


async def _check_output(folder: Path, bytes_max: int) -> None:
    if await asyncio.to_thread(folder_bytes, folder) > bytes_max:
        raise RunFailed("ffmpeg wrote more than its share of the disk.")
