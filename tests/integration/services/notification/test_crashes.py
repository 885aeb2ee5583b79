"""The process dies at its crash points: at most one duplicate, under the same Message-ID."""

import asyncio
import email
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.local.data_folder import DataFolder
from services.notification.domain import CLAIM_LOST_TWICE, DeliveryState
from services.notification.store import SqlNotificationStore
from services.notification.wiring import MIGRATIONS
from shared.clock import SystemClock
from shared.db.ids import new_id
from shared.db.sqlite import open_sqlite_shards
from tests.mesh import ROOT

from .service import TENANT, registered, video_ready

pytestmark = pytest.mark.slow

ADA = new_id(7)
KILL_S = 30.0


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    folder = DataFolder(tmp_path)
    folder.make_folders()
    folder.make_keys()
    return folder


@pytest.fixture
def environ(data: DataFolder, own_nats_url: str, mailbox) -> dict[str, str]:
    return {
        **os.environ,
        "TENFOLD_DATA": str(data.path),
        "TENFOLD_LISTEN": "127.0.0.1:0",
        "TENFOLD_NATS_URL": own_nats_url,
        "TENFOLD_CRASH_JOURNAL": str(data.path / "crashes"),
        "TENFOLD_NOTIFICATION_SMTP_URL": f"smtp://127.0.0.1:{mailbox.port}",
        "TENFOLD_NOTIFICATION_SMTP_REPLY_TIMEOUT_S": "5",
    }


@contextmanager
def running_process(environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m services notification`, gone for certain at the end."""
    with log_of(environ).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services", "notification"],
            cwd=ROOT,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


COUNTED = "SELECT used, reserved FROM stock WHERE tenant = $1 AND owner = $2"


def log_of(environ: dict[str, str]) -> Path:
    return Path(environ["TENFOLD_DATA"]) / "process.log"


async def ended(process: subprocess.Popen[bytes]) -> int:
    return await asyncio.wait_for(asyncio.to_thread(process.wait), KILL_S)


async def stored_in(data: DataFolder):
    """The items, the only delivery, and the e-mails counted; asked when nothing runs."""
    async with open_sqlite_shards(
        data.path / "services/notification/shards",
        migrations=MIGRATIONS,
        secret=data.secret.read_bytes(),
        clock=SystemClock(),
    ) as shards:
        store = SqlNotificationStore(shards, emails_per_day_max=500)
        [delivery] = await store.list_deliveries(TENANT, ADA, limit=10)
        rows = await shards.holding(ADA).fetch_all(COUNTED, TENANT, ADA)
        counted = [(row["used"], row["reserved"]) for row in rows]
        return await store.list_items(TENANT, ADA, limit=10), delivery, counted


@pytest.fixture
def finish(environ, bus, eventually):
    """Runs the process, with nothing armed that has killed before, until the delivery is final."""

    async def run() -> None:
        async def is_final() -> bool:
            is_serving = b'"serving"' in log_of(environ).read_bytes()
            stream = await bus.jetstream.stream_info("EVT_notification")
            return is_serving and stream.state.messages == 1

        with running_process(environ) as process:
            await eventually(is_final, within_s=KILL_S)
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 0

    return run


@pytest.fixture
async def told(bus) -> None:
    for cause in (registered(ADA, "ada@example.org"), video_ready(ADA)):
        await cause.publish(bus)


async def die(environ: dict[str, str]) -> None:
    with running_process(environ) as process:
        assert await ended(process) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("point", "mails_at_death", "mails_at_end"),
    [
        ("notification.claimed_not_sent", 0, 1),
        ("notification.sent_not_recorded", 1, 2),
        ("relay.published_not_marked", 1, 1),
    ],
)
async def test_a_process_that_was_killed_finishes_with_at_most_one_duplicate(
    data, environ, mailbox, told, finish, point, mails_at_death, mails_at_end
):
    environ["TENFOLD_CRASH_POINT"] = point
    await die(environ)
    assert len(mailbox.mails) == mails_at_death
    await finish()
    items, delivery, counted = await stored_in(data)
    assert sorted(item.category for item in items) == ["user.welcome", "video.ready"]
    assert delivery.state is DeliveryState.SENT
    assert len(mailbox.mails) == mails_at_end
    assert counted == [(1, 0)]  # one notice is one e-mail of the day's stock, whatever died
    # The duplicate is the same message to the last byte, Message-ID and all.
    assert len(set(mailbox.contents)) == 1
    message_id = email.message_from_bytes(mailbox.contents[0])["Message-ID"]
    assert message_id.startswith(f"<{delivery.delivery_id}@")


@pytest.mark.rare
async def test_a_process_killed_twice_over_one_mail_leaves_it_unknown_and_sends_no_third(
    data, environ, mailbox, told, finish
):
    environ["TENFOLD_CRASH_POINT"] = "notification.claimed_not_sent,notification.sent_not_recorded"
    await die(environ)
    await die(environ)
    await finish()
    _, delivery, counted = await stored_in(data)
    assert (delivery.state, delivery.reason) == (DeliveryState.UNKNOWN, CLAIM_LOST_TWICE)
    assert counted == [(1, 0)]
    assert len(mailbox.mails) == 1
