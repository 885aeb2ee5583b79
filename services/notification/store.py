"""Notices, inboxes, contacts and deliveries in the recipients' buckets."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.notification import events
from services.notification.domain import (
    CONTACT_UNKNOWN,
    NOBODY,
    Contact,
    Delivery,
    DeliveryState,
    InboxItem,
    InboxItemNotFound,
    InboxSummary,
    Notice,
    item_name,
)
from services.notification.mail import Letter
from shared.clock import of_us, to_us
from shared.db.ids import bucket_of, new_id
from shared.db.port import Row, Shard, Shards, Transaction
from shared.db.stock import Stock, commit_used, day_of, release, reserve

# UUIDs of version 7 compare by their time, newest last: a page starts below this.
LAST_ID = UUID(int=2**128 - 1)
# The stock of which each delivery takes one.
EMAILS = "emails"

INSERT_CONTACT = """
INSERT INTO contact (bucket, id, tenant, owner, version, email, display_name, locale, created_us)
VALUES ($1, $2, $3, $2, 1, $4, $5, $6, $7)
ON CONFLICT (bucket, id) DO UPDATE SET
  email = excluded.email, display_name = excluded.display_name, locale = excluded.locale,
  version = contact.version + 1
WHERE contact.tenant = excluded.tenant
"""

WAKE_WAITING_DELIVERIES = """
UPDATE delivery SET next_attempt_us = $1, version = version + 1
WHERE bucket = $2 AND tenant = $3 AND owner = $4 AND state = 'QUEUED' AND reason = $5
"""

SELECT_BY_CAUSE = """
SELECT id FROM inbox_item
WHERE bucket = $1 AND tenant = $2 AND owner = $3 AND cause = $4 AND category = $5
"""

# One statement creates or moves the row: its lock gives every change its own position.
COUNT_NEW_ITEM = """
INSERT INTO inbox_summary (bucket, id, tenant, owner, version, unread_count, total_count)
VALUES ($1, $2, $3, $2, 1, 1, 1)
ON CONFLICT (bucket, id) DO UPDATE SET
  version = inbox_summary.version + 1,
  unread_count = inbox_summary.unread_count + 1,
  total_count = inbox_summary.total_count + 1
WHERE inbox_summary.tenant = excluded.tenant
RETURNING version
"""

COUNT_READ_ITEM = """
UPDATE inbox_summary SET unread_count = unread_count - 1, version = version + 1
WHERE bucket = $1 AND id = $2 AND tenant = $3 AND owner = $2
RETURNING version
"""

INSERT_ITEM = """
INSERT INTO inbox_item (bucket, id, tenant, owner, version, cause, category, title, body,
  subject, position, created_us, read_us)
VALUES ($1, $2, $3, $4, 1, $5, $6, $7, $8, $9, $10, $11, NULL)
"""

ITEM_COLUMNS = "id, category, title, body, subject, position, created_us, read_us"

SELECT_ITEM = f"""
SELECT {ITEM_COLUMNS} FROM inbox_item
WHERE bucket = $1 AND id = $2 AND tenant = $3 AND owner = $4
FOR UPDATE
"""  # noqa: S608 -- columns of ours

LIST_ITEMS = f"""
SELECT {ITEM_COLUMNS} FROM inbox_item
WHERE bucket = $1 AND tenant = $2 AND owner = $3 AND id < $4
ORDER BY id DESC LIMIT $5
"""  # noqa: S608 -- columns of ours

LIST_CHANGES = f"""
SELECT {ITEM_COLUMNS} FROM inbox_item
WHERE bucket = $1 AND tenant = $2 AND owner = $3 AND position > $4
ORDER BY position LIMIT $5
"""  # noqa: S608 -- columns of ours

MARK_ITEM_READ = """
UPDATE inbox_item SET read_us = $1, position = $2, version = version + 1
WHERE bucket = $3 AND id = $4 AND tenant = $5 AND owner = $6
"""

SELECT_SUMMARY = """
SELECT unread_count, total_count, version FROM inbox_summary
WHERE bucket = $1 AND id = $2 AND tenant = $3 AND owner = $2
"""

DELIVERY_COLUMNS = """id, tenant, owner, item_id, state, attempt_count, lost_claim_count,
  claim_holder, reason, created_us, next_attempt_us, sent_us, version"""

INSERT_DELIVERY = """
INSERT INTO delivery (bucket, id, tenant, owner, version, item_id, channel, state,
  attempt_count, lost_claim_count, claim_holder, reason, created_us, next_attempt_us, sent_us)
VALUES ($1, $2, $3, $4, 1, $5, 'EMAIL', 'QUEUED', 0, 0, $6, '', $7, $7, NULL)
"""

LIST_DELIVERIES = f"""
SELECT {DELIVERY_COLUMNS} FROM delivery
WHERE bucket = $1 AND tenant = $2 AND owner = $3 AND id < $4
ORDER BY id DESC LIMIT $5
"""  # noqa: S608 -- columns of ours

# The sender serves every tenant; each row it touches afterwards is filtered by its own.
LIST_DUE = f"""
/* any tenant: the sender serves them all */
SELECT {DELIVERY_COLUMNS} FROM delivery
WHERE next_attempt_us IS NOT NULL AND next_attempt_us <= $1
ORDER BY next_attempt_us LIMIT $2
"""  # noqa: S608 -- columns of ours

LIST_ORPHANED = f"""
/* any tenant: the sender serves them all */
SELECT {DELIVERY_COLUMNS} FROM delivery
WHERE state = 'SENDING' AND claim_holder <> $1 LIMIT $2
"""  # noqa: S608 -- columns of ours

UPDATE_DELIVERY = """
UPDATE delivery SET state = $1, attempt_count = $2, lost_claim_count = $3, claim_holder = $4,
  reason = $5, next_attempt_us = $6, sent_us = $7, version = version + 1
WHERE bucket = $8 AND id = $9 AND tenant = $10 AND owner = $11 AND version = $12
"""

SELECT_LETTER = """
SELECT item.title, item.body, item.subject, contact.email, contact.display_name
FROM inbox_item AS item JOIN contact
  ON contact.bucket = item.bucket AND contact.id = item.owner AND contact.tenant = item.tenant
WHERE item.bucket = $1 AND item.id = $2 AND item.tenant = $3 AND item.owner = $4
"""


class InboxStore(Protocol):
    """What the handler needs: one caller's inbox and deliveries."""

    async def list_items(
        self, tenant: str, owner: UUID, *, before: UUID = LAST_ID, limit: int
    ) -> Sequence[InboxItem]:
        """Notices whose id is below `before`, newest first."""
        ...

    async def list_changes(
        self, tenant: str, owner: UUID, *, after_position: int, limit: int
    ) -> Sequence[InboxItem]:
        """Notices that changed after that position, each in its last state, in order."""
        ...

    async def get_summary(self, tenant: str, owner: UUID) -> InboxSummary:
        """The counts; zeros for an inbox that never held anything."""
        ...

    async def mark_read(
        self, tenant: str, owner: UUID, item_id: UUID, *, now: datetime
    ) -> InboxItem:
        """Mark a notice as read; repeating it changes nothing.

        Raises:
            InboxItemNotFound: absent, or another's.
        """
        ...

    async def list_deliveries(
        self, tenant: str, owner: UUID, *, before: UUID = LAST_ID, limit: int
    ) -> Sequence[Delivery]:
        """Deliveries whose id is below `before`, newest first."""
        ...


class DeliveryStore(Protocol):
    """What the sender needs: deliveries of every tenant in one shard."""

    async def list_due(self, shard: Shard, *, now: datetime, limit: int) -> Sequence[Delivery]:
        """Deliveries whose time has come, the longest waiting first."""
        ...

    async def list_orphaned(self, shard: Shard, *, holder: UUID, limit: int) -> Sequence[Delivery]:
        """Deliveries that somebody other than the holder began to send and did not end."""
        ...

    async def get_letter(self, delivery: Delivery) -> Letter | None:
        """What to send; None while the recipient's address is unknown."""
        ...

    async def update(self, before: Delivery, after: Delivery, *, now: datetime) -> Delivery | None:
        """Store a decision and, if it is final, its event; None if the row has changed since.

        Raises:
            StockExceeded: it begins an attempt, and the recipient has had its e-mails today.
        """
        ...


class SqlNotificationStore:
    """See InboxStore and DeliveryStore. In the service's shards."""

    def __init__(self, shards: Shards, *, emails_per_day_max: int) -> None:
        self._shards = shards
        self._emails_per_day_max = emails_per_day_max

    async def list_items(
        self, tenant: str, owner: UUID, *, before: UUID = LAST_ID, limit: int
    ) -> Sequence[InboxItem]:
        """See InboxStore.list_items."""
        bucket = self._shards.holding(owner)
        rows = await bucket.causal.fetch_all(
            LIST_ITEMS, bucket.number, tenant, owner, before, limit
        )
        return [item_of_row(row) for row in rows]

    async def list_changes(
        self, tenant: str, owner: UUID, *, after_position: int, limit: int
    ) -> Sequence[InboxItem]:
        """See InboxStore.list_changes."""
        bucket = self._shards.holding(owner)
        arguments = (bucket.number, tenant, owner, after_position, limit)
        return [item_of_row(row) for row in await bucket.fetch_all(LIST_CHANGES, *arguments)]

    async def get_summary(self, tenant: str, owner: UUID) -> InboxSummary:
        """See InboxStore.get_summary."""
        bucket = self._shards.holding(owner)
        row = await bucket.causal.fetch_one(SELECT_SUMMARY, bucket.number, owner, tenant)
        if row is None:
            return InboxSummary()
        return InboxSummary(row["unread_count"], row["total_count"], row["version"])

    async def mark_read(
        self, tenant: str, owner: UUID, item_id: UUID, *, now: datetime
    ) -> InboxItem:
        """See InboxStore.mark_read."""
        # The id of another's notice may carry another bucket: only the caller's own is opened.
        bucket = bucket_of(owner)
        key = (bucket, item_id, tenant, owner)
        async with self._shards.bucket(bucket).transaction() as tx:
            row = await tx.fetch_one(SELECT_ITEM, *key)
            if row is None:
                raise InboxItemNotFound(item_name(item_id))
            if row["read_us"] is None:
                position = await _version_after(tx, COUNT_READ_ITEM, bucket, owner, tenant)
                await tx.execute(MARK_ITEM_READ, to_us(now), position, *key)
                row = {**row, "read_us": to_us(now), "position": position}
        return item_of_row(row)

    async def list_deliveries(
        self, tenant: str, owner: UUID, *, before: UUID = LAST_ID, limit: int
    ) -> Sequence[Delivery]:
        """See InboxStore.list_deliveries."""
        bucket = self._shards.holding(owner)
        key = (bucket.number, tenant, owner)
        rows = await bucket.causal.fetch_all(LIST_DELIVERIES, *key, before, limit)
        return [delivery_of_row(row) for row in rows]

    async def list_due(self, shard: Shard, *, now: datetime, limit: int) -> Sequence[Delivery]:
        """See DeliveryStore.list_due."""
        rows = await shard.fetch_all(LIST_DUE, to_us(now), limit)
        return [delivery_of_row(row) for row in rows]

    async def list_orphaned(self, shard: Shard, *, holder: UUID, limit: int) -> Sequence[Delivery]:
        """See DeliveryStore.list_orphaned."""
        rows = await shard.fetch_all(LIST_ORPHANED, holder, limit)
        return [delivery_of_row(row) for row in rows]

    async def get_letter(self, delivery: Delivery) -> Letter | None:
        """See DeliveryStore.get_letter."""
        bucket = self._shards.holding(delivery.owner)
        key = (bucket.number, delivery.item_id, delivery.tenant, delivery.owner)
        row = await bucket.fetch_one(SELECT_LETTER, *key)
        return None if row is None else letter_of_row(delivery, row)

    async def update(self, before: Delivery, after: Delivery, *, now: datetime) -> Delivery | None:
        """See DeliveryStore.update."""
        async with self._shards.holding(before.owner).transaction() as tx:
            if not await tx.execute(UPDATE_DELIVERY, *_arguments_of_update(before, after)):
                return None
            await self._count(tx, before, after, now)
            if after.state.is_final:
                await tx.append_outbox(events.delivery_finished(after, now))
        return replace(after, version=before.version + 1)

    async def _count(
        self, tx: Transaction, before: Delivery, after: Delivery, now: datetime
    ) -> None:
        """An attempt reserves one e-mail of the day on which it began; who got it, used it up.

        One that may have arrived counts; an attempt that is repeated in doubt is the same one.
        """
        tenant, entry_id = after.tenant, after.delivery_id
        if after.state is DeliveryState.SENDING:
            emails = Stock(tenant, after.owner, EMAILS, day_of(now))
            await reserve(tx, emails, entry_id, 1, limit=self._emails_per_day_max)
        elif after.state in {DeliveryState.SENT, DeliveryState.UNKNOWN}:
            await commit_used(tx, tenant, EMAILS, entry_id)
        elif before.state is DeliveryState.SENDING:
            await release(tx, tenant, EMAILS, entry_id)


async def insert_contact(tx: Transaction, contact: Contact, *, now: datetime) -> None:
    """Learn where a user can be reached, and wake what waited for it."""
    key = (tx.bucket, contact.user_id, contact.tenant)
    details = (contact.email, contact.display_name, contact.locale)
    await tx.execute(INSERT_CONTACT, *key, *details, to_us(now))
    waiting = (tx.bucket, contact.tenant, contact.user_id, CONTACT_UNKNOWN)
    await tx.execute(WAKE_WAITING_DELIVERIES, to_us(now), *waiting)


async def insert_notice(tx: Transaction, notice: Notice, *, now: datetime) -> bool:
    """Put a notice into its recipient's inbox and queue its e-mail; False if it is there."""
    identity = (tx.bucket, notice.tenant, notice.recipient, notice.cause, notice.category)
    if await tx.fetch_one(SELECT_BY_CAUSE, *identity) is not None:
        return False
    position = await _version_after(tx, COUNT_NEW_ITEM, tx.bucket, notice.recipient, notice.tenant)
    item_id = new_id(tx.bucket)
    key = (tx.bucket, item_id, notice.tenant, notice.recipient)
    texts = (notice.cause, notice.category, notice.title, notice.body, notice.subject)
    await tx.execute(INSERT_ITEM, *key, *texts, position, to_us(now))
    if notice.email:
        delivery = (tx.bucket, new_id(tx.bucket), notice.tenant, notice.recipient, item_id)
        await tx.execute(INSERT_DELIVERY, *delivery, NOBODY, to_us(now))
    return True


async def _version_after(tx: Transaction, sql: str, bucket: int, owner: UUID, tenant: str) -> int:
    row = await tx.fetch_one(sql, bucket, owner, tenant)
    # An inbox belongs to one tenant for ever: user ids are never shared between tenants.
    assert row is not None
    return int(row["version"])


def item_of_row(row: Row) -> InboxItem:
    """A row of inbox_item."""
    return InboxItem(
        item_id=row["id"],
        category=row["category"],
        title=row["title"],
        body=row["body"],
        subject=row["subject"],
        position=row["position"],
        created_at=of_us(row["created_us"]),
        read_at=_moment(row["read_us"]),
    )


def delivery_of_row(row: Row) -> Delivery:
    """A row of delivery."""
    return Delivery(
        delivery_id=row["id"],
        tenant=row["tenant"],
        owner=row["owner"],
        item_id=row["item_id"],
        state=DeliveryState(row["state"]),
        attempt_count=row["attempt_count"],
        lost_claim_count=row["lost_claim_count"],
        claim_holder=row["claim_holder"],
        reason=row["reason"],
        created_at=of_us(row["created_us"]),
        next_attempt_at=_moment(row["next_attempt_us"]),
        sent_at=_moment(row["sent_us"]),
        version=row["version"],
    )


def letter_of_row(delivery: Delivery, row: Row) -> Letter:
    """An item joined with its recipient's contact."""
    return Letter(
        delivery_id=delivery.delivery_id,
        address=row["email"],
        display_name=row["display_name"],
        title=row["title"],
        body=row["body"],
        subject=row["subject"],
        sent_for=delivery.created_at,
    )


def _moment(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else of_us(microseconds)


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else to_us(moment)


def _arguments_of_update(before: Delivery, after: Delivery) -> tuple[object, ...]:
    return (
        after.state.value,
        after.attempt_count,
        after.lost_claim_count,
        after.claim_holder,
        after.reason,
        _microseconds(after.next_attempt_at),
        _microseconds(after.sent_at),
        bucket_of(before.delivery_id),
        before.delivery_id,
        before.tenant,
        before.owner,
        before.version,
    )
