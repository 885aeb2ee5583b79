import asyncio
import email
from email import policy
from pathlib import Path

import pytest

from services.notification.domain import DeliveryState
from services.notification.store import SqlNotificationStore
from services.notification.wiring import MIGRATIONS
from shared.clock import SystemClock
from shared.db.ids import bucket_of, new_id
from shared.db.sqlite import open_sqlite_shards

from .conftest import forget_everything
from .service import TENANT, posted, registered, running_service, video_failed, video_ready

SETTLE_S = 1.0


def mails_of(mailbox) -> list[email.message.EmailMessage]:
    return [email.message_from_bytes(raw, policy=policy.default) for raw in mailbox.contents]


@pytest.fixture
async def store(tmp_path: Path):
    """What the service has stored, through connections of our own."""
    async with open_sqlite_shards(
        tmp_path / "services/notification/shards",
        migrations=MIGRATIONS,
        secret=b"s" * 32,
        clock=SystemClock(),
    ) as shards:
        yield SqlNotificationStore(shards, emails_per_day_max=500)


async def titles_of(store, user) -> list[str]:
    return [item.title for item in await store.list_items(TENANT, user, limit=100)]


async def test_a_video_that_is_ready_is_told_in_the_inbox_and_by_mail(
    tmp_path, bus, mailbox, store, eventually
):
    ada = new_id(7)
    ready = video_ready(ada)

    async def has_mail() -> bool:
        return bool(mailbox.mails)

    async with running_service(tmp_path, bus, mailbox.port):
        await registered(ada, "ada@example.org").publish(bus)
        await ready.publish(bus)
        await eventually(has_mail)
    assert sorted(await titles_of(store, ada)) == ["Welcome, Ada", "“holiday.mp4” is ready"]
    [mail] = mails_of(mailbox)
    assert mail["Subject"] == "“holiday.mp4” is ready"
    assert mail["To"] == "Ada <ada@example.org>"
    assert ready.aggregate in mail.get_content()


async def test_a_video_that_failed_says_why(tmp_path, bus, mailbox, store, eventually):
    ada = new_id(9)

    async def has_mail() -> bool:
        return bool(mailbox.mails)

    async with running_service(tmp_path, bus, mailbox.port):
        await registered(ada, "ada@example.org").publish(bus)
        await video_failed(ada, "It holds no picture.").publish(bus)
        await eventually(has_mail)
    [mail] = mails_of(mailbox)
    assert "It holds no picture." in mail.get_content()


async def test_mail_waits_for_an_address_that_comes_later(
    tmp_path, bus, mailbox, store, eventually
):
    ada = new_id(11)

    async def waits() -> bool:
        deliveries = await store.list_deliveries(TENANT, ada, limit=1)
        return bool(deliveries) and deliveries[0].reason == "CONTACT_UNKNOWN"

    async def has_mail() -> bool:
        return bool(mailbox.mails)

    async with running_service(tmp_path, bus, mailbox.port):
        await video_ready(ada).publish(bus)
        await eventually(waits)
        await registered(ada, "ada@example.org").publish(bus)
        await eventually(has_mail)


async def test_whoever_receives_money_is_told_in_his_own_bucket(
    tmp_path, bus, mailbox, store, eventually
):
    ada, bob, eve = new_id(7), new_id(3000), new_id(100)
    names = {user: f"users/{user}" for user in (ada, bob, eve)}

    async def both_know() -> bool:
        return bool(await titles_of(store, bob)) and bool(await titles_of(store, eve))

    async with running_service(tmp_path, bus, mailbox.port):
        cause = posted(names[ada], bucket_of(ada), {names[bob]: 1250, names[eve]: 5})
        await cause.publish(bus)
        await eventually(both_know)
    assert await titles_of(store, bob) == ["You received 12.50 EUR"]
    assert await titles_of(store, eve) == ["You received 0.05 EUR"]
    assert await titles_of(store, ada) == []
    [item] = await store.list_items(TENANT, bob, limit=10)
    assert (item.subject, bucket_of(item.item_id)) == (cause.aggregate, 3000)


async def test_what_the_broker_delivers_again_is_told_once(
    tmp_path, bus, mailbox, store, eventually
):
    ada, bob = new_id(7), new_id(3000)
    causes = [
        registered(ada, "ada@example.org"),
        video_ready(ada),
        posted(f"users/{ada}", 7, {f"users/{bob}": 1}),
    ]

    async def all_told() -> bool:
        return len(mailbox.mails) == 1 and bool(await titles_of(store, bob))

    async with running_service(tmp_path, bus, mailbox.port):
        for cause in causes:
            await cause.publish(bus)
        await eventually(all_told)
        await forget_everything(bus)  # and with it the broker's own memory of duplicates
        for cause in causes:
            await cause.publish(bus)
        sentinel = video_ready(ada, "sentinel")
        await sentinel.publish(bus)

        async def sentinel_mailed() -> bool:
            return len(mailbox.mails) >= 2

        await eventually(sentinel_mailed)
        await asyncio.sleep(SETTLE_S)
    assert len(await titles_of(store, ada)) == 3
    assert len(await titles_of(store, bob)) == 1
    assert len(mailbox.mails) == 2


async def test_a_service_account_has_no_inbox_and_stops_nobody(
    tmp_path, bus, mailbox, store, eventually
):
    bob = new_id(3000)
    account = f"serviceAccounts/{new_id(5)}"

    async def bob_knows() -> bool:
        return bool(await titles_of(store, bob))

    async with running_service(tmp_path, bus, mailbox.port):
        await posted(account, 5, {account: 1, f"users/{bob}": 2}, "JPY").publish(bus)
        await eventually(bob_knows)
    assert await titles_of(store, bob) == ["You received 2 JPY"]


async def test_a_stop_and_a_start_lose_nothing(tmp_path, bus, mailbox, store, eventually):
    ada = new_id(7)

    async def all_sent() -> bool:
        deliveries = await store.list_deliveries(TENANT, ada, limit=20)
        states = [delivery.state for delivery in deliveries]
        return states == [DeliveryState.SENT] * 6

    await registered(ada, "ada@example.org").publish(bus)
    for _ in range(3):
        async with running_service(tmp_path, bus, mailbox.port):
            for _ in range(2):
                await video_ready(ada).publish(bus)
            await asyncio.sleep(0.1)
    async with running_service(tmp_path, bus, mailbox.port):
        await eventually(all_sent)
    ids = [mail["Message-ID"] for mail in mails_of(mailbox)]
    assert len(ids) == len(set(ids)) == 6
