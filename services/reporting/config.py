"""ReportingConfig: every setting, its unit, its default."""

from dataclasses import dataclass, field

from shared.db.engines import DATABASE_SETTING


@dataclass(frozen=True)
class ReportingConfig:
    """Settings of the reporting service, from TENFOLD_REPORTING_…."""

    database: str = field(default="", metadata=DATABASE_SETTING)
    shard_count: int = field(
        default=4,
        metadata={"help": "shards of a new data folder", "min": 1, "max": 64},
    )
