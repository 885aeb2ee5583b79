from dataclasses import replace
from datetime import timedelta

import pytest

from services.notification.domain import (
    CONTACT_UNKNOWN,
    Contact,
    DeliveryState,
    InboxItemNotFound,
    InboxSummary,
    Notice,
    Outcome,
    Reply,
)
from services.notification.store import SqlNotificationStore, insert_contact, insert_notice
from shared.db.ids import bucket_of, new_id

ADA, BOB, EVE = new_id(7), new_id(3000), new_id(7)
TENANT = "default"


def notice(cause: str = "event-1", **changes) -> Notice:
    usual = Notice(
        recipient=ADA,
        tenant=TENANT,
        cause=cause,
        category="video.ready",
        title="“a” is ready",
        body="Your video can be played.",
        subject="videos/x",
        email=True,
    )
    return replace(usual, **changes)


@pytest.fixture
def store(shards) -> SqlNotificationStore:
    return SqlNotificationStore(shards, emails_per_day_max=500)


@pytest.fixture
def tell(shards, clock):
    async def insert(told: Notice) -> bool:
        async with shards.holding(told.recipient).transaction() as tx:
            return await insert_notice(tx, told, now=clock.now())

    return insert


@pytest.fixture
def meet(shards, clock):
    async def insert(user_id=ADA, tenant=TENANT, email="ada@example.org") -> None:
        async with shards.holding(user_id).transaction() as tx:
            await insert_contact(tx, Contact(user_id, tenant, email, "Ada", "en"), now=clock.now())

    return insert


async def items_of(store, owner=ADA, tenant=TENANT):
    return await store.list_items(tenant, owner, limit=100)


async def outbox_types(shards) -> list[str]:
    rows = [
        row
        for shard in shards.all()
        for row in await shard.fetch_all("SELECT subject FROM outbox ORDER BY seq")
    ]
    return [row["subject"].split(".")[2] for row in rows]


async def test_a_notice_is_one_item_one_count_and_one_delivery(store, tell):
    assert await tell(notice())
    [item] = await items_of(store)
    assert (item.title, item.subject, item.read_at) == ("“a” is ready", "videos/x", None)
    assert await store.get_summary(TENANT, ADA) == InboxSummary(1, 1, 1)
    [delivery] = await store.list_deliveries(TENANT, ADA, limit=10)
    assert (delivery.state, delivery.item_id) == (DeliveryState.QUEUED, item.item_id)


async def test_the_same_cause_tells_nobody_twice(store, tell):
    assert await tell(notice())
    assert not await tell(notice())
    assert len(await items_of(store)) == 1
    assert await store.get_summary(TENANT, ADA) == InboxSummary(1, 1, 1)


async def test_another_cause_recipient_or_category_is_another_notice(store, tell):
    await tell(notice())
    assert await tell(notice("event-2"))
    assert await tell(notice(category="video.failed"))
    assert await tell(notice(recipient=BOB))
    assert await store.get_summary(TENANT, ADA) == InboxSummary(3, 3, 3)
    assert await store.get_summary(TENANT, BOB) == InboxSummary(1, 1, 1)


async def test_an_inbox_that_never_held_anything_counts_zero(store):
    assert await store.get_summary(TENANT, ADA) == InboxSummary(0, 0, 0)


async def test_a_notice_without_e_mail_has_no_delivery(store, tell):
    await tell(notice(email=False))
    assert await store.list_deliveries(TENANT, ADA, limit=10) == []


async def test_items_come_newest_first_page_by_page(store, tell):
    for number in range(5):
        await tell(notice(f"event-{number}", title=str(number)))
    first = await store.list_items(TENANT, ADA, limit=2)
    rest = await store.list_items(TENANT, ADA, before=first[-1].item_id, limit=10)
    assert [item.title for item in (*first, *rest)] == ["4", "3", "2", "1", "0"]


async def test_reading_a_notice_counts_once_however_often_it_is_done(store, tell, clock):
    await tell(notice())
    [item] = await items_of(store)
    read = await store.mark_read(TENANT, ADA, item.item_id, now=clock.now())
    assert read.read_at == clock.now()
    clock.advance(5)
    assert await store.mark_read(TENANT, ADA, item.item_id, now=clock.now()) == read
    assert await items_of(store) == [read]
    assert await store.get_summary(TENANT, ADA) == InboxSummary(0, 1, 2)


@pytest.mark.parametrize(
    ("tenant", "owner"),
    [(TENANT, EVE), (TENANT, BOB), ("other", ADA)],
    ids=["same bucket", "other bucket", "other tenant"],
)
async def test_anothers_notice_looks_absent(store, tell, clock, tenant, owner):
    await tell(notice())
    [item] = await items_of(store)
    with pytest.raises(InboxItemNotFound):
        await store.mark_read(tenant, owner, item.item_id, now=clock.now())
    assert await items_of(store, owner, tenant) == []
    assert await store.list_changes(tenant, owner, after_position=0, limit=10) == []
    assert await store.list_deliveries(tenant, owner, limit=10) == []
    assert await store.get_summary(tenant, owner) == InboxSummary(0, 0, 0)


async def test_changes_follow_a_position_each_in_its_last_state(store, tell, clock):
    for number in range(3):
        await tell(notice(f"event-{number}", title=str(number)))
    first = (await store.list_changes(TENANT, ADA, after_position=0, limit=1))[0]
    await store.mark_read(TENANT, ADA, first.item_id, now=clock.now())
    changes = await store.list_changes(TENANT, ADA, after_position=1, limit=10)
    assert [(change.title, change.position) for change in changes] == [("1", 2), ("2", 3), ("0", 4)]


async def due_in(store, shards, clock):
    shard_lists = [await store.list_due(shard, now=clock.now(), limit=10) for shard in shards.all()]
    return [delivery for due in shard_lists for delivery in due]


async def test_a_delivery_is_due_until_it_is_claimed_and_again_when_the_claim_ends(
    store, tell, shards, clock
):
    await tell(notice())
    [delivery] = await due_in(store, shards, clock)
    claimed = delivery.claim(EVE, now=clock.now(), claim_s=60)
    assert await store.update(delivery, claimed, now=clock.now())
    assert await due_in(store, shards, clock) == []
    clock.advance(60)
    [again] = await due_in(store, shards, clock)
    assert again.claim_holder == EVE


async def test_a_decision_on_an_old_version_changes_nothing(store, tell, shards, clock):
    await tell(notice())
    [delivery] = await due_in(store, shards, clock)
    claimed = delivery.claim(EVE, now=clock.now(), claim_s=60)
    assert await store.update(delivery, claimed, now=clock.now())
    assert await store.update(delivery, claimed, now=clock.now()) is None


async def test_a_final_state_and_its_event_are_stored_together(store, tell, shards, clock):
    await tell(notice())
    [delivery] = await due_in(store, shards, clock)
    before = await store.update(
        delivery, delivery.claim(EVE, now=clock.now(), claim_s=60), now=clock.now()
    )
    assert before is not None
    assert await outbox_types(shards) == []
    after = before.conclude(Outcome(Reply.ACCEPTED), now=clock.now(), jitter=0)
    stored = await store.update(before, after, now=clock.now())
    assert await store.list_deliveries(TENANT, ADA, limit=10) == [stored]
    assert await outbox_types(shards) == ["DeliveryFinished"]


async def test_claims_of_other_holders_are_found(store, tell, shards, clock):
    await tell(notice())
    [delivery] = await due_in(store, shards, clock)
    shard = shards.all()[0]
    await store.update(delivery, delivery.claim(EVE, now=clock.now(), claim_s=60), now=clock.now())
    assert await store.list_orphaned(shard, holder=EVE, limit=10) == []
    assert len(await store.list_orphaned(shard, holder=BOB, limit=10)) == 1


async def test_a_letter_needs_a_contact_and_a_contact_wakes_what_waits(
    store, tell, meet, shards, clock
):
    await tell(notice())
    [delivery] = await due_in(store, shards, clock)
    assert await store.get_letter(delivery) is None
    await store.update(delivery, delivery.wait_for_contact(now=clock.now()), now=clock.now())
    assert await due_in(store, shards, clock) == []
    await meet()
    [woken] = await due_in(store, shards, clock)
    assert woken.reason == CONTACT_UNKNOWN
    letter = await store.get_letter(woken)
    assert letter is not None
    assert (letter.address, letter.title) == ("ada@example.org", "“a” is ready")
    assert letter.sent_for == clock.now()


async def test_a_contact_of_another_tenant_is_nobodys_address(store, tell, meet, shards, clock):
    await tell(notice())
    await meet(tenant="other")
    [delivery] = await due_in(store, shards, clock)
    assert await store.get_letter(delivery) is None


async def test_a_contact_can_be_learned_again(store, tell, meet, shards, clock):
    await meet(email="old@example.org")
    await meet(email="new@example.org")
    await tell(notice())
    [delivery] = await due_in(store, shards, clock)
    letter = await store.get_letter(delivery)
    assert letter is not None
    assert letter.address == "new@example.org"
    assert bucket_of(delivery.delivery_id) == bucket_of(ADA)
    assert delivery.created_at + timedelta(0) == clock.now()
