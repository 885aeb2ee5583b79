import asyncio
import email
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import uuid4

import pytest

from services.notification.domain import (
    CLAIM_LOST_TWICE,
    CONTACT_UNKNOWN,
    MAIL_QUOTA_EXCEEDED,
    Contact,
    DeliveryState,
    Notice,
)
from services.notification.mail import Sender
from services.notification.sender import MailSender, SenderSettings
from services.notification.smtp import MailServer, MailServerUnavailable, open_smtp
from services.notification.store import SqlNotificationStore, insert_contact, insert_notice
from services.notification.wake import InboxSignal
from shared.clock import SystemClock
from shared.db.ids import new_id

from .conftest import Mailbox, dropping_mail, serving_mail

TENANT = "default"
ADA = new_id(7)
SENDER = Sender("tenfold@example.com", "Tenfold")
HOLDER = uuid4()


def open_mail_at(port: int):
    server = MailServer.parse(f"smtp://127.0.0.1:{port}")
    return lambda: open_smtp(
        server, local_name="example.com", connect_timeout_s=2, reply_timeout_s=1
    )


@pytest.fixture
def store(shards) -> SqlNotificationStore:
    return SqlNotificationStore(shards, emails_per_day_max=500)


@pytest.fixture
def make_sender(store, clock):
    def make(port: int, *, clock=clock, signal=None) -> MailSender:
        return MailSender(
            store,
            open_mail=open_mail_at(port),
            settings=SenderSettings(SENDER, claim_s=30, poll_s=0.1),
            signal=signal or InboxSignal(),
            clock=clock,
        )

    return make


@pytest.fixture
def tell(shards, clock):
    async def insert(cause="event-1", *, title="“a” is ready", recipient=ADA):
        notice = Notice(
            recipient, TENANT, cause, "video.ready", title, "It is.", "videos/x", email=True
        )
        async with shards.holding(recipient).transaction() as tx:
            await insert_notice(tx, notice, now=clock.now())

    return insert


@pytest.fixture
def meet(shards, clock):
    async def insert(address="ada@example.org", user_id=ADA, name="Ada"):
        async with shards.holding(user_id).transaction() as tx:
            await insert_contact(tx, Contact(user_id, TENANT, address, name, "en"), now=clock.now())

    return insert


@pytest.fixture
def shard(shards):
    return shards.all()[0]


async def only_delivery(store):
    [delivery] = await store.list_deliveries(TENANT, ADA, limit=10)
    return delivery


async def test_a_due_notice_is_mailed_and_recorded(store, make_sender, tell, meet, shard, mailbox):
    await meet()
    await tell()
    sender = make_sender(mailbox.port)
    assert await sender.send_due(shard, HOLDER) == 1
    assert await sender.send_due(shard, HOLDER) == 0
    delivery = await only_delivery(store)
    assert (delivery.state, delivery.attempt_count) == (DeliveryState.SENT, 1)
    message = email.message_from_bytes(mailbox.contents[0])
    assert message["Message-ID"] == f"<{delivery.delivery_id}@example.com>"
    assert mailbox.mails[0].rcpt_tos == ["ada@example.org"]


async def test_a_batch_goes_over_one_connection(make_sender, tell, meet, shard, mailbox):
    await meet()
    for number in range(5):
        await tell(f"event-{number}")
    assert await make_sender(mailbox.port).send_due(shard, HOLDER) == 5
    assert len(mailbox.mails) == 5
    assert len(mailbox.sessions) == 1


async def test_a_server_that_is_down_costs_no_attempt(
    store, make_sender, tell, meet, shard, closed_port
):
    await meet()
    await tell()
    with pytest.raises(MailServerUnavailable):
        await make_sender(closed_port).send_due(shard, HOLDER)
    delivery = await only_delivery(store)
    assert (delivery.state, delivery.attempt_count) == (DeliveryState.QUEUED, 0)


async def test_not_now_is_tried_again_later(store, make_sender, tell, meet, shard, mailbox, clock):
    mailbox.answers["RCPT"] = ["451 busy"]
    await meet()
    await tell()
    sender = make_sender(mailbox.port)
    await sender.send_due(shard, HOLDER)
    delivery = await only_delivery(store)
    assert (delivery.state, delivery.reason) == (DeliveryState.QUEUED, "451 busy")
    assert await sender.send_due(shard, HOLDER) == 0
    clock.advance(40)
    assert await sender.send_due(shard, HOLDER) == 1
    assert (await only_delivery(store)).state is DeliveryState.SENT
    assert len(mailbox.mails) == 1


async def test_never_is_not_tried_again_and_stops_nobody_else(
    store, make_sender, tell, meet, shard, mailbox
):
    bob = new_id(8)
    mailbox.answers["RCPT"] = ["550 no such user"]
    await meet()
    await meet("bob@example.org", bob)
    await tell()
    await tell(recipient=bob)
    assert await make_sender(mailbox.port).send_due(shard, HOLDER) == 2
    states = {
        (await store.list_deliveries(TENANT, owner, limit=1))[0].state for owner in (ADA, bob)
    }
    assert states == {DeliveryState.FAILED, DeliveryState.SENT}


async def test_a_lost_answer_is_unknown_and_never_sent_again(
    store, make_sender, tell, meet, shard, mailbox, clock
):
    await meet()
    await tell()
    async with dropping_mail(drop_at="end") as server:
        await make_sender(server.port).send_due(shard, HOLDER)
        assert len(server.messages) == 1
    assert (await only_delivery(store)).state is DeliveryState.UNKNOWN
    clock.advance(10**6)
    assert await make_sender(mailbox.port).send_due(shard, HOLDER) == 0
    assert mailbox.mails == []


@pytest.mark.parametrize(
    ("address", "name", "reason"),
    [
        ("ada@example.org\r\nRCPT TO:<eve@example.com>", "Ada", "ADDRESS_INVALID"),
        ("ada@example.org", "Ada\r\nBcc: eve@example.com", "HEADER_REFUSED"),
    ],
)
async def test_what_would_break_a_header_fails_before_smtp(
    store, make_sender, tell, meet, shard, mailbox, address, name, reason
):
    await meet(address, name=name)
    await tell()
    await make_sender(mailbox.port).send_due(shard, HOLDER)
    delivery = await only_delivery(store)
    assert (delivery.state, delivery.reason) == (DeliveryState.FAILED, reason)
    assert mailbox.mails == []


async def test_an_unknown_address_waits_without_a_connection_and_then_goes(
    store, make_sender, tell, meet, shard, mailbox, closed_port
):
    await tell()
    assert await make_sender(closed_port).send_due(shard, HOLDER) == 1
    assert (await only_delivery(store)).reason == CONTACT_UNKNOWN
    await meet()
    await make_sender(mailbox.port).send_due(shard, HOLDER)
    assert (await only_delivery(store)).state is DeliveryState.SENT


async def test_two_senders_at_once_send_each_message_once(make_sender, tell, meet, shard, mailbox):
    await meet()
    for number in range(10):
        await tell(f"event-{number}")
    senders = [make_sender(mailbox.port).send_due(shard, uuid4()) for _ in range(3)]
    await asyncio.gather(*senders)
    ids = [email.message_from_bytes(content)["Message-ID"] for content in mailbox.contents]
    assert len(ids) == len(set(ids)) == 10


async def test_what_a_dead_holder_left_is_repeated_once_with_the_same_id(
    store, make_sender, tell, meet, shard, mailbox, clock
):
    await meet()
    await tell()
    delivery = await only_delivery(store)
    lost = delivery.claim(uuid4(), now=clock.now(), claim_s=10**6)
    await store.update(delivery, lost, now=clock.now())
    sender = make_sender(mailbox.port)
    assert await sender.send_due(shard, HOLDER) == 0
    await sender.adopt_orphans(shard, HOLDER)
    assert await sender.send_due(shard, HOLDER) == 1
    sent = await only_delivery(store)
    assert (sent.state, sent.lost_claim_count) == (DeliveryState.SENT, 1)
    assert email.message_from_bytes(mailbox.contents[0])["Message-ID"].startswith(
        f"<{sent.delivery_id}@"
    )


async def test_a_claim_lost_twice_is_unknown_and_not_sent(
    store, make_sender, tell, meet, shard, mailbox, clock
):
    await meet()
    await tell()
    for _ in range(2):
        delivery = await only_delivery(store)
        lost = delivery.claim(uuid4(), now=clock.now(), claim_s=1)
        await store.update(delivery, lost, now=clock.now())
        clock.advance(2)
    await make_sender(mailbox.port).send_due(shard, HOLDER)
    delivery = await only_delivery(store)
    assert (delivery.state, delivery.reason) == (DeliveryState.UNKNOWN, CLAIM_LOST_TWICE)
    assert mailbox.mails == []


@asynccontextmanager
async def running(sender: MailSender, shard):
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(sender.run(shard))
        try:
            yield
        finally:
            task.cancel()


async def test_mail_goes_out_when_the_server_comes_up(
    store, make_sender, tell, meet, shard, closed_port, eventually
):
    await meet()
    await tell()
    mailbox = Mailbox()

    async def is_sent() -> bool:
        return (await only_delivery(store)).state is DeliveryState.SENT

    async with running(make_sender(closed_port, clock=SystemClock()), shard):
        await asyncio.sleep(0)
        async with serving_mail(mailbox, port=closed_port):
            await eventually(is_sent)
    assert len(mailbox.mails) == 1


async def test_a_ring_sends_at_once(store, make_sender, tell, meet, shard, mailbox, eventually):
    signal = InboxSignal()
    await meet()

    async def is_sent() -> bool:
        deliveries = await store.list_deliveries(TENANT, ADA, limit=1)
        return bool(deliveries) and deliveries[0].state is DeliveryState.SENT

    async with running(make_sender(mailbox.port, clock=SystemClock(), signal=signal), shard):
        signal.ring(TENANT, ADA)
        await tell()
        await eventually(is_sent)


async def test_a_stop_finishes_the_message_in_hand(
    store, make_sender, tell, meet, shard, eventually
):
    """The server answers only after the stop began: the answer is still recorded."""
    await meet()
    await tell()
    got_text, may_answer = asyncio.Event(), asyncio.Event()

    class SlowBox(Mailbox):
        async def handle_DATA(self, server, session, envelope):
            got_text.set()
            await may_answer.wait()
            return await super().handle_DATA(server, session, envelope)

    async with serving_mail(SlowBox()) as mailbox:
        task = asyncio.create_task(make_sender(mailbox.port, clock=SystemClock()).run(shard))
        async with asyncio.timeout(10):
            await got_text.wait()
        task.cancel()
        may_answer.set()
        await asyncio.wait([task])
    delivery = await only_delivery(store)
    assert delivery.state is DeliveryState.SENT
    assert delivery.sent_at is not None
    assert delivery.sent_at - delivery.created_at > timedelta(0)


async def test_beyond_its_emails_of_a_day_a_recipient_waits_for_the_next(
    shards, clock, tell, meet, shard, mailbox, make_sender, store
):
    store._emails_per_day_max = 2
    await meet()
    for number in range(5):
        await tell(f"event-{number}")
    sender = make_sender(mailbox.port)
    assert await sender.send_due(shard, HOLDER) == 5
    assert await sender.send_due(shard, HOLDER) == 0
    waiting = [
        delivery
        for delivery in await store.list_deliveries(TENANT, ADA, limit=10)
        if delivery.state is DeliveryState.QUEUED
    ]
    assert len(mailbox.mails) == 2
    assert {(one.reason, one.attempt_count) for one in waiting} == {(MAIL_QUOTA_EXCEEDED, 0)}
    clock.advance(24 * 3600)
    assert await sender.send_due(shard, HOLDER) == 3
    assert len(mailbox.mails) == 4


async def test_a_mail_that_the_server_refuses_or_defers_takes_nothing_of_the_days_stock(
    shards, clock, tell, meet, shard, mailbox, make_sender, store
):
    store._emails_per_day_max = 1
    await meet("ada@bad address")
    await tell("event-1")
    sender = make_sender(mailbox.port)
    await sender.send_due(shard, HOLDER)
    assert (await only_delivery(store)).state is DeliveryState.FAILED
    await meet()
    await tell("event-2")
    await sender.send_due(shard, HOLDER)
    assert len(mailbox.mails) == 1
