"""PaymentConfig: every setting, its unit, its default."""

from dataclasses import dataclass, field

from shared.db.engines import DATABASE_SETTING


@dataclass(frozen=True)
class PaymentConfig:
    """Settings of the payment service, from TENFOLD_PAYMENT_…."""

    database: str = field(default="", metadata=DATABASE_SETTING)
    shard_count: int = field(
        default=1,
        metadata={
            "help": "database files; the first holds every bucket until transfers cross shards",
            "unit": "files",
            "min": 1,
            "max": 64,
        },
    )
    verify_entries_max: int = field(
        default=500_000,
        metadata={
            "help": "add up the whole ledger at start if it has no more entries than this; "
            "0 never does",
            "unit": "entries",
            "min": 0,
        },
    )
