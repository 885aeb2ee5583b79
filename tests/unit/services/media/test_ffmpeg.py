from pathlib import Path

import pytest

from services.media.domain import Probe, Rung, Source
from services.media.ffmpeg import (
    Encoding,
    Segment,
    Variant,
    is_whole,
    master_list,
    percent_of,
    progress_us,
    segments_of,
    transcode_arguments,
)
from services.media.files import content_type_of
from shared.errors import NotFound

RUNGS = (Rung(1280, 720, 3_000_000), Rung(640, 360, 800_000))
PLAYLIST = (
    "#EXTM3U\n#EXTINF:4.000000,\n720p_00000.ts\n#EXTINF:1.5,\n720p_00001.ts\n#EXT-X-ENDLIST\n"
)


def arguments(*, audio_index: int = 1, fps: float = 30.0) -> list[str]:
    source = Source("mov,mp4,m4a,3gp,3g2,mj2", "h264", "aac", 1280, 720, fps, 10.0)
    probe = Probe(source, 2, 0, audio_index)
    return transcode_arguments(Path("/in/x"), Path("/out"), probe, RUNGS, Encoding())


def test_the_inputs_format_and_protocols_are_fixed_before_it_is_named():
    before_input = arguments()[: arguments().index("-i")]
    assert before_input[-6:] == [
        *("-protocol_whitelist", "file,pipe", "-format_whitelist", "mov", "-f", "mov")
    ]
    assert arguments()[arguments().index("-i") + 1] == "file:/in/x"


def test_one_run_makes_both_qualities():
    assert arguments().count("-i") == 1
    assert [a for a in arguments() if a.endswith(".m3u8")] == ["/out/720p.m3u8", "/out/360p.m3u8"]


def test_a_film_without_sound_is_made_without_and_a_fast_one_is_slowed():
    silent = arguments(audio_index=-1)
    assert silent.count("-an") == 2 and "aac" not in silent
    assert "fps=60" in " ".join(arguments(fps=120.0))
    assert "fps=" not in " ".join(arguments(fps=60.0))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("out_time_us=1500000\n", 1_500_000),
        ("out_time_us=N/A", None),
        ("out_time_us=-21", None),
        ("frame=9", None),
        ("", None),
    ],
)
def test_progress_lines_are_read(line, expected):
    assert progress_us(line) == expected


def test_a_percentage_stays_within_100():
    assert [percent_of(us, 2.0) for us in (0, 1_000_000, 9_000_000)] == [0, 50, 100]


def test_a_variant_list_is_read():
    assert segments_of(PLAYLIST) == [Segment("720p_00000.ts", 4.0), Segment("720p_00001.ts", 1.5)]
    assert is_whole(PLAYLIST) and not is_whole(PLAYLIST[:-20])


def test_the_master_list_names_each_quality_with_its_rates():
    text = master_list([Variant(rung, 30.0, 100, 150) for rung in RUNGS])
    assert text.startswith("#EXTM3U\n")
    assert "BANDWIDTH=150,AVERAGE-BANDWIDTH=100,RESOLUTION=1280x720,FRAME-RATE=30.000" in text
    assert text.splitlines()[-1] == "360p.m3u8"


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "720p.m3u8/..", "720p_1.ts", "master.m3u8\n", "x.m3u8", "\u0661p.m3u8"],
)
def test_no_other_name_is_served(name):
    with pytest.raises(NotFound):
        content_type_of(name)


def test_names_of_ours_have_their_media_types():
    assert content_type_of("720p_00000.ts") == "video/mp2t"
    assert content_type_of("master.m3u8") == "application/vnd.apple.mpegurl"
