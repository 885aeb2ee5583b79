"""MediaConfig: every setting, its unit, its default."""

from dataclasses import dataclass, field

from services.media.domain import SourceLimits, StockLimits
from shared.db.engines import DATABASE_SETTING

GIB = 1024**3


@dataclass(frozen=True)
class MediaConfig:
    """Settings of the media service, from TENFOLD_MEDIA_…."""

    database: str = field(default="", metadata=DATABASE_SETTING)
    upload_bytes_max: int = field(
        default=10 * GIB,
        metadata={"help": "the largest file that is taken", "unit": "bytes", "min": 1},
    )
    upload_lifetime_s: float = field(
        default=24 * 3600.0,
        metadata={
            "help": "how long an unfinished upload is kept after its last byte",
            "unit": "s",
            "min": 1,
        },
    )
    open_uploads_max: int = field(
        default=100, metadata={"help": "unfinished uploads of one owner", "min": 1}
    )
    open_bytes_max: int = field(
        default=50 * GIB,
        metadata={"help": "what one owner's unfinished uploads may hold", "unit": "bytes"},
    )
    stored_bytes_max: int = field(
        default=200 * GIB,
        metadata={
            "help": "what one owner may store: uploads, unfinished ones by their whole size",
            "unit": "bytes",
            "min": 1,
        },
    )
    transcode_s_per_day_max: int = field(
        default=24 * 3600,
        metadata={
            "help": "length of film that one owner may have converted in a day (UTC)",
            "unit": "s",
            "min": 1,
        },
    )
    sweep_s: float = field(
        default=30.0,
        metadata={"help": "how often expired uploads and left files are looked for", "unit": "s"},
    )
    forgotten_s: float = field(
        default=600.0,
        metadata={
            "help": "after what silence an unfinished video's job is given once more",
            "unit": "s",
        },
    )
    workers: int = field(
        default=1,
        metadata={"help": "conversions at once in this process; 0 for none", "min": 0, "max": 64},
    )
    preset: str = field(
        default="superfast",
        metadata={
            "help": "x264's preset: time against bits",
            "choices": ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium"),
        },
    )
    encoder_threads: int = field(
        default=0, metadata={"help": "of each encoder; 0 lets ffmpeg choose", "min": 0}
    )
    lease_s: float = field(
        default=10.0,
        metadata={"help": "how long a silent worker is believed to live", "unit": "s", "min": 1},
    )
    job_ack_wait_s: float = field(
        default=10.0,
        metadata={
            "help": "silence after which a dead worker's job is given to another",
            "unit": "s",
            "min": 1,
        },
    )
    probe_timeout_s: float = field(
        default=30.0, metadata={"help": "for looking at a file", "unit": "s", "min": 1}
    )
    stall_s: float = field(
        default=60.0, metadata={"help": "silence after which ffmpeg is killed", "unit": "s"}
    )
    wall_clock_s: float = field(
        default=120.0,
        metadata={"help": "for each conversion, beside its length's share", "unit": "s"},
    )
    wall_clock_per_second: float = field(
        default=20.0,
        metadata={"help": "seconds allowed for each second of film, at most", "min": 0.1},
    )
    memory_bytes_max: int = field(
        default=4 * GIB,
        metadata={"help": "address space of ffmpeg and of the probe", "unit": "bytes"},
    )
    retry_s: float = field(
        default=2.0, metadata={"help": "pause before a failed run's next, doubling", "unit": "s"}
    )
    watch_poll_s: float = field(
        default=0.5,
        metadata={
            "help": "how soon a live stream sees a change made by another process",
            "unit": "s",
            "min": 0.01,
        },
    )
    watches_max: int = field(
        default=1000, metadata={"help": "live streams at once in this process", "min": 1}
    )
    pixels_max: int = field(
        default=SourceLimits.pixels_max, metadata={"help": "of a source's picture", "min": 1}
    )
    frames_per_second_max: float = field(
        default=SourceLimits.frames_per_second_max, metadata={"help": "of a source", "min": 1}
    )
    streams_max: int = field(
        default=SourceLimits.streams_max, metadata={"help": "of a source", "min": 1}
    )
    duration_s_max: float = field(
        default=SourceLimits.duration_s_max,
        metadata={"help": "of a source", "unit": "s", "min": 1},
    )

    @property
    def stock_limits(self) -> StockLimits:
        """What one owner may hold, and use up in a day."""
        return StockLimits(self.stored_bytes_max, self.transcode_s_per_day_max)

    @property
    def source_limits(self) -> SourceLimits:
        """What a source may be at most."""
        return SourceLimits(
            pixels_max=self.pixels_max,
            frames_per_second_max=self.frames_per_second_max,
            streams_max=self.streams_max,
            duration_s_max=self.duration_s_max,
        )
