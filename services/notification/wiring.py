"""The only place that chooses implementations."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from tenfold.notification.v1.notification_service_pb2_grpc import (
    add_DeliveryServiceServicer_to_server,
    add_InboxServiceServicer_to_server,
)

from services.notification.config import NotificationConfig
from services.notification.handler import NotificationHandler
from services.notification.listener import NotificationListener
from services.notification.mail import MailRefused, Sender, check_address, header_text
from services.notification.sender import MailSender, SenderSettings
from services.notification.smtp import MailServer, open_smtp
from services.notification.store import SqlNotificationStore
from services.notification.wake import InboxSignal
from services.notification.watch import InboxWatch
from shared.bus.outbox import run_relay
from shared.bus.worker import run_subscription
from shared.config import ConfigError, load
from shared.db.engines import ShardSettings, open_shards
from shared.db.growing import run_on_each
from shared.db.housekeeping import run_housekeeping
from shared.db.port import Shards
from shared.lifecycle import Loop, Registration, Service
from shared.runtime import Runtime

NAME = "notification"
PREFIX = "TENFOLD_NOTIFICATION_"
MIGRATIONS = Path(__file__).parent / "migrations"
SENDER_NAME_CHARS_MAX = 100
# MAIL, RCPT, DATA and the text each wait for one answer; the rest is for the database.
ANSWERS_PER_MESSAGE = 4
CLAIM_SPARE_S = 5.0


def shard_settings(folder: Path, environ: Mapping[str, str]) -> ShardSettings:
    """What its shards are made of; SQLite keeps them in the service's folder.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
    """
    config = load(NotificationConfig, PREFIX, environ)
    return ShardSettings(
        NAME,
        config.database,
        folder / "shards",
        MIGRATIONS,
        causal_reads=True,
    )


@asynccontextmanager
async def open_service(runtime: Runtime) -> AsyncIterator[Service]:
    """Open the notification service; closed in reverse.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
    """
    config = load(NotificationConfig, PREFIX, runtime.environ)
    server, sender = mail_server_of(config), sender_of(config)
    settings = shard_settings(runtime.folder_of(NAME), runtime.environ)
    async with open_shards(settings, secret=runtime.secret, clock=runtime.clock) as shards:
        store = SqlNotificationStore(shards, emails_per_day_max=config.emails_per_day_max)
        signal = InboxSignal()
        mail = MailSender(
            store,
            open_mail=partial(
                open_smtp,
                server,
                local_name=sender.domain,
                connect_timeout_s=config.smtp_connect_timeout_s,
                reply_timeout_s=config.smtp_reply_timeout_s,
            ),
            settings=SenderSettings(
                sender=sender,
                claim_s=ANSWERS_PER_MESSAGE * config.smtp_reply_timeout_s + CLAIM_SPARE_S,
                poll_s=config.sender_poll_s,
            ),
            signal=signal,
            clock=runtime.clock,
        )
        watch = InboxWatch(store, signal=signal, clock=runtime.clock, poll_s=config.watch_poll_s)
        handler = NotificationHandler(
            store, watch=watch, signal=signal, page_secret=runtime.secret, clock=runtime.clock
        )
        yield Service(
            name=NAME,
            registrations=(
                Registration(add_InboxServiceServicer_to_server, handler),
                Registration(add_DeliveryServiceServicer_to_server, handler),
            ),
            loops=_loops(runtime, shards, mail, signal),
        )


def _loops(runtime: Runtime, shards: Shards, mail: MailSender, signal: InboxSignal) -> list[Loop]:
    listener = NotificationListener(signal=signal, clock=runtime.clock)
    relay = partial(run_relay, shards, runtime.bus, service=NAME, clock=runtime.clock)
    housekeeping = partial(run_housekeeping, shards, clock=runtime.clock)
    subscriptions = [
        partial(run_subscription, runtime.bus, shards, subscription, clock=runtime.clock)
        for subscription in listener.subscriptions()
    ]
    senders = partial(run_on_each, shards, mail.run)
    return [relay, housekeeping, *subscriptions, senders]


def mail_server_of(config: NotificationConfig) -> MailServer:
    """Where mail goes.

    Raises:
        ConfigError: the URL or the authorities' file is wrong.
    """
    if config.smtp_ca_file and not Path(config.smtp_ca_file).is_file():
        raise ConfigError(f"{PREFIX}SMTP_CA_FILE={config.smtp_ca_file} is not a file.")
    try:
        return MailServer.parse(config.smtp_url, ca_file=config.smtp_ca_file)
    except ValueError as error:
        # The URL may hold a password: it is not repeated.
        raise ConfigError(f"{PREFIX}SMTP_URL is not allowed: {error}.") from error


def sender_of(config: NotificationConfig) -> Sender:
    """Who mail is from.

    Raises:
        ConfigError: the address or the name cannot stand in a header.
    """
    try:
        check_address(config.mail_from)
    except MailRefused as error:
        raise ConfigError(
            f"{PREFIX}MAIL_FROM={config.mail_from!r} is not allowed: it must be a plain address."
        ) from error
    try:
        name = header_text(config.mail_from_name, SENDER_NAME_CHARS_MAX)
    except MailRefused as error:
        raise ConfigError(
            f"{PREFIX}MAIL_FROM_NAME is not allowed: it must be one printable line."
        ) from error
    return Sender(config.mail_from, name)
