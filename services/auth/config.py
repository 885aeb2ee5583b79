"""AuthConfig: every setting, its unit, its default."""

from dataclasses import dataclass, field

from shared.db.engines import DATABASE_SETTING


@dataclass(frozen=True)
class AuthConfig:
    """Settings of the auth service, from TENFOLD_AUTH_…."""

    database: str = field(default="", metadata=DATABASE_SETTING)
    session_life_s: float = field(
        default=30 * 86_400,
        metadata={"help": "when a session ends, however often refreshed", "unit": "s", "min": 60},
    )
    hashing_threads: int = field(
        default=2,
        metadata={"help": "password hashes at once, 19 MiB each", "min": 1, "max": 64},
    )
    hashing_waiting_max: int = field(
        default=64, metadata={"help": "password hashes that may wait; more are refused", "min": 0}
    )
