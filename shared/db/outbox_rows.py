"""What a transaction leaves for the relay: rows that are numbered per aggregate."""

from uuid import UUID

import orjson

from shared.db.port import OutboxRow, Transaction

# Reads as "every bucket" where one is expected: a shard's own transaction has none.
EVERY_BUCKET = -1

_NEXT_EVENT_NO = """
INSERT INTO event_counter (bucket, aggregate, event_no) VALUES ($1, $2, 1)
ON CONFLICT (bucket, aggregate) DO UPDATE SET event_no = event_counter.event_no + 1
RETURNING event_no
"""
_INSERT_OUTBOX = """
INSERT INTO outbox (bucket, event_id, aggregate, event_no, subject, headers, payload,
                    tenant, created_at_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""


async def insert_outbox_row(
    tx: Transaction, row: OutboxRow, *, service: str, event_id: UUID, now_us: int
) -> None:
    """Number a row and write it, in the transaction's bucket.

    Raises:
        ValueError: the transaction is of no single bucket.
    """
    if tx.bucket == EVERY_BUCKET:
        raise ValueError("an outbox row belongs to one bucket")
    numbered = numbered_as(row, bucket=tx.bucket)
    counted = await tx.fetch_one(_NEXT_EVENT_NO, tx.bucket, numbered)
    assert counted is not None
    headers = {"tenfold-type": row.type, **row.headers, "tenfold-aggregate": row.aggregate}
    await tx.execute(
        _INSERT_OUTBOX,
        *(tx.bucket, event_id, numbered, counted["event_no"]),
        subject_of(row, service=service, bucket=tx.bucket),
        orjson.dumps(headers).decode(),
        *(row.payload, row.tenant, now_us),
    )


def subject_of(row: OutboxRow, *, service: str, bucket: int) -> str:
    """Where an outbox row is published: evt.<service>.<Type>.<bucket>, or wrk. for a job."""
    target = bucket if row.bucket is None else row.bucket
    if row.queue:
        return f"wrk.{service}.{row.queue}.{target}"
    return f"evt.{service}.{row.type.rpartition('.')[2]}.{target}"


def numbered_as(row: OutboxRow, *, bucket: int) -> str:
    """What an outbox row is numbered under.

    Jobs and hops to another bucket do not reach those who read an aggregate's events in
    order, so they are counted apart: else each would be a gap there.
    """
    if row.queue:
        return f"{row.aggregate}#{row.queue}"
    if row.bucket is not None and row.bucket != bucket:
        return f"{row.aggregate}>{row.bucket}"
    return row.aggregate
