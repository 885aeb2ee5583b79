"""ffmpeg's language: its arguments, its progress lines, the play-lists. Pure.

One run makes both qualities: the source is decoded once and split. No user text is in the
arguments; the input's format is forced to what the probe found, so that nothing is guessed
from bytes or names again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.media.domain import Probe, Rung

SEGMENT_S = 4
AUDIO_BITS_PER_SECOND = 128_000
FRAMES_PER_SECOND_MAX = 60
MASTER_NAME = "master.m3u8"
PROGRESS_PERIOD_S = 0.25
MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class Encoding:
    """How to convert.

    Attributes:
        preset: x264's: how much time to spend for how few bits.
        threads: 0 lets ffmpeg choose.
    """

    preset: str = "veryfast"
    threads: int = 0


def transcode_arguments(
    source: Path, folder: Path, probe: Probe, rungs: Sequence[Rung], encoding: Encoding
) -> list[str]:
    """The arguments after the program's name.

    Args:
        source: the file to read.
        folder: where segments and variant lists go; exists, empty.
        probe: what the source is.
        rungs: the qualities to make.
        encoding: how.
    """
    demuxer = probe.source.container.partition(",")[0]
    arguments = [
        *("-hide_banner", "-nostdin", "-nostats", "-loglevel", "error"),
        *("-progress", "pipe:1", "-stats_period", str(PROGRESS_PERIOD_S)),
        *("-protocol_whitelist", "file,pipe", "-format_whitelist", demuxer, "-f", demuxer),
        *("-i", f"file:{source}"),
        *("-filter_complex", _filters(probe, rungs)),
    ]
    for index, rung in enumerate(rungs):
        arguments += ["-map", f"[v{index}]", *_output_arguments(folder, probe, rung, encoding)]
    return arguments


def _filters(probe: Probe, rungs: Sequence[Rung]) -> str:
    outputs = "".join(f"[s{index}]" for index in range(len(rungs)))
    rate = f"fps={FRAMES_PER_SECOND_MAX}," if _is_too_fast(probe) else ""
    chains = [f"[0:{probe.video_index}]{rate}split={len(rungs)}{outputs}"]
    for index, rung in enumerate(rungs):
        scale = f"scale={rung.width}:{rung.height},setsar=1,format=yuv420p"
        chains.append(f"[s{index}]{scale}[v{index}]")
    return ";".join(chains)


def _is_too_fast(probe: Probe) -> bool:
    return probe.source.frames_per_second > FRAMES_PER_SECOND_MAX


def _output_arguments(folder: Path, probe: Probe, rung: Rung, encoding: Encoding) -> list[str]:
    rate = str(rung.video_bits_per_second_max)
    audio = ["-map", f"0:{probe.audio_index}", "-c:a", "aac", "-ac", "2"]
    audio += ["-b:a", str(AUDIO_BITS_PER_SECOND)]
    return [
        *(audio if probe.audio_index >= 0 else ["-an"]),
        *("-sn", "-dn", "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-c:v", "libx264", "-preset", encoding.preset, "-threads", str(encoding.threads)),
        *("-crf", "23", "-maxrate", rate, "-bufsize", str(2 * rung.video_bits_per_second_max)),
        # Both qualities cut at the same moments: a player can change between any two segments.
        *("-force_key_frames", f"expr:gte(t,n_forced*{SEGMENT_S})", "-sc_threshold", "0"),
        *("-f", "hls", "-hls_time", str(SEGMENT_S), "-hls_playlist_type", "vod"),
        *("-hls_flags", "independent_segments"),
        *("-hls_segment_filename", str(folder / f"{rung.name}_%05d.ts")),
        str(folder / f"{rung.name}.m3u8"),
    ]


def progress_us(line: str) -> int | None:
    """The film's time that is done, from one line of -progress; None for other lines."""
    key, _, value = line.strip().partition("=")
    # N/A before the first frame; negative while an encoder fills its look-ahead.
    return int(value) if key == "out_time_us" and value.isdigit() else None


def percent_of(done_us: int, duration_s: float) -> int:
    """How much of the film that is, 0 to 100."""
    return min(100, int(done_us * 100 / (duration_s * MICROSECONDS)))


@dataclass(frozen=True)
class Segment:
    """One entry of a variant list."""

    name: str
    duration_s: float


def segments_of(playlist: str) -> list[Segment]:
    """The segments in a variant list that ffmpeg wrote."""
    segments: list[Segment] = []
    duration_s = 0.0
    for line in playlist.splitlines():
        if line.startswith("#EXTINF:"):
            duration_s = float(line.removeprefix("#EXTINF:").partition(",")[0])
        elif line and not line.startswith("#"):
            segments.append(Segment(line, duration_s))
    return segments


def is_whole(playlist: str) -> bool:
    """Whether the list says that nothing follows."""
    return playlist.rstrip().endswith("#EXT-X-ENDLIST")


@dataclass(frozen=True)
class Variant:
    """One quality as it was made.

    Attributes:
        bits_per_second: on average; peak_bits_per_second: of the densest segment.
    """

    rung: Rung
    frames_per_second: float
    bits_per_second: int
    peak_bits_per_second: int


def master_list(variants: Sequence[Variant]) -> str:
    """The master play-list: each quality's list, by name, with what a player must know.

    Source: RFC 8216 §4.3.4.2.
    """
    lines = ["#EXTM3U", "#EXT-X-VERSION:6", "#EXT-X-INDEPENDENT-SEGMENTS"]
    for variant in variants:
        rung = variant.rung
        attributes = [
            f"BANDWIDTH={variant.peak_bits_per_second}",
            f"AVERAGE-BANDWIDTH={variant.bits_per_second}",
            f"RESOLUTION={rung.width}x{rung.height}",
            f"FRAME-RATE={variant.frames_per_second:.3f}",
        ]
        lines += [f"#EXT-X-STREAM-INF:{','.join(attributes)}", f"{rung.name}.m3u8"]
    return "\n".join(lines) + "\n"
