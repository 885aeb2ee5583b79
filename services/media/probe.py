"""Looks into one file and prints what it is, as JSON: a program of its own.

    python -I -m services.media.probe '{"path": …, "pixels_max": …, …}'

It runs apart because it decodes hostile bytes: it ties its own hands (confine.py) once
its libraries are loaded, so that the file is all it can still open. Only containers of
the allow-list are opened: none of them names other files or URLs, as play-lists do.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import av.container
import av.error
from av.stream import Disposition
from av.video.stream import VideoStream

from services.media.confine import confine_files, drop_network

# As libavformat names them: mov reads mp4, m4a, 3gp and mj2; matroska reads webm.
DEMUXERS = ("mov", "matroska", "mpegts", "avi")
OPTIONS = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "file"}
# How far a file without a length is read to find one.
PACKETS_MAX = 5_000_000
FRAMES_TRIED_MAX = 200


class NotAVideo(Exception):
    """What was read is no film; the message says why."""


def probe(path: str, *, pixels_max: int) -> dict[str, Any]:
    """What the file is.

    Args:
        path: of the file.
        pixels_max: a larger picture is measured from its header, never decoded.

    Raises:
        NotAVideo: the container is not of the allow-list, or holds no picture.
    """
    try:
        with av.open(f"file:{path}", options=OPTIONS, metadata_errors="replace") as container:
            return _describe(container, pixels_max)
    except av.error.FFmpegError as error:
        text = f"The bytes are no film that we read ({error.strerror or error})."
        raise NotAVideo(text) from error


def _describe(container: av.container.InputContainer, pixels_max: int) -> dict[str, Any]:
    video = next((stream for stream in container.streams.video if _is_film(stream)), None)
    if video is None:
        raise NotAVideo("The file holds no moving picture.")
    audio = next(iter(container.streams.audio), None)
    # The name of a codec that this build cannot decode is not known either.
    if video.codec_context is None:
        raise NotAVideo("The picture's format is not one that we read.")
    width, height = video.codec_context.width, video.codec_context.height
    found = {
        "container": container.format.name,
        "video_codec": video.codec_context.name,
        "audio_codec": audio.codec_context.name if audio and audio.codec_context else "",
        "frames_per_second": float(video.average_rate or video.guessed_rate or 0),
        "duration_s": _duration_s(container),
    }
    if 0 < width * height <= pixels_max:
        width, height = _shown_size(container, video)
    return {
        "source": {**found, "width": width, "height": height},
        "stream_count": len(container.streams),
        "video_index": video.index,
        "audio_index": audio.index if audio and audio.codec_context else -1,
    }


def _is_film(stream: VideoStream) -> bool:
    return not stream.disposition & Disposition.attached_pic


def _duration_s(container: av.container.InputContainer) -> float:
    if container.duration:
        return container.duration / av.time_base
    # Recorders in browsers leave it out: read to the end once.
    end_s = 0.0
    for number, packet in enumerate(container.demux()):
        if number >= PACKETS_MAX:
            break
        if packet.pts is not None and packet.time_base is not None:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    container.seek(0)
    return end_s


def _shown_size(container: av.container.InputContainer, video: VideoStream) -> tuple[int, int]:
    """Width and height as shown: a telephone held upright stores its film lying down."""
    for number, frame in enumerate(container.decode(video)):
        if frame.width and frame.height:
            is_lying = frame.rotation % 180 != 0
            size = frame.width, frame.height
            return (size[1], size[0]) if is_lying else size
        if number >= FRAMES_TRIED_MAX:
            break
    raise NotAVideo("No picture could be decoded.")


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What to print for a request; from its first byte on, only the file can be opened."""
    drop_network()
    # The library reads some of its own modules late.
    own_files = [str(Path(module.__file__ or "").parent) for module in (os, av)]
    confine_files([request["path"], *own_files], [])
    try:
        return {"probe": probe(request["path"], pixels_max=request["pixels_max"])}
    except NotAVideo as refusal:
        return {"refused": str(refusal)}


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))  # noqa: T201 -- its answer
