"""NotificationConfig: every setting, its unit, its default."""

from dataclasses import dataclass, field

from shared.db.engines import DATABASE_SETTING


@dataclass(frozen=True)
class NotificationConfig:
    """Settings of the notification service, from TENFOLD_NOTIFICATION_….

    A loopback mail server is spoken to in plain text unless ?tls= says otherwise; any
    other must offer STARTTLS with a certificate that verifies.
    """

    database: str = field(default="", metadata=DATABASE_SETTING)
    smtp_url: str = field(
        default="smtp://127.0.0.1:2525",
        metadata={
            "help": "the mail server: smtp[s]://[user:password@]host:port"
            "[?tls=required|opportunistic|none]",
            "secret": True,
        },
    )
    smtp_ca_file: str = field(
        default="",
        metadata={"help": "PEM file of the authorities to trust; empty for the system's"},
    )
    smtp_connect_timeout_s: float = field(
        default=10.0,
        metadata={"help": "time to connect, encrypt and log in", "unit": "s", "min": 0.1},
    )
    smtp_reply_timeout_s: float = field(
        default=10.0,
        metadata={"help": "time for each answer of the mail server", "unit": "s", "min": 0.1},
    )
    mail_from: str = field(
        default="tenfold@localhost.localdomain",
        metadata={"help": "the address that mail comes from; its domain ends message ids"},
    )
    mail_from_name: str = field(
        default="Tenfold", metadata={"help": "the name that mail comes from"}
    )
    emails_per_day_max: int = field(
        default=500, metadata={"help": "e-mails to one recipient in a day (UTC)", "min": 1}
    )
    sender_poll_s: float = field(
        default=2.0,
        metadata={
            "help": "how soon due mail is found that nobody rang for",
            "unit": "s",
            "min": 0.05,
        },
    )
    watch_poll_s: float = field(
        default=1.0,
        metadata={
            "help": "how soon a live stream sees a change made by another process",
            "unit": "s",
            "min": 0.05,
        },
    )
