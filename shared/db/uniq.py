"""Values that are unique in a whole service, without a transaction across shards.

The value's row lives in the value's bucket, what it names in its own (spec/data.md §5):

1. `claim_unique` reserves the value for an id that is about to be created.
2. The creator's transaction calls `fill_id_slot` beside its inserts, and adds a todo.
3. `confirm_unique` makes the reservation final; the todo does it if the creator dies.
4. A reservation that has expired is stolen: first DEAD goes into the id's slot. Creation
   and theft insert the same row, so the primary key decides between them, and a creator
   that was only slow finds its slot taken and fails.
5. `free_unique` gives the value up; the row stays, so that its version goes on rising.

`reserve_unique` does 1 and 4 over the shards; everything may be repeated.
"""

from dataclasses import dataclass
from uuid import UUID

from shared.clock import is_over
from shared.db.ids import bucket_of, hash_bucket
from shared.db.port import Reader, Row, Shards, Transaction
from shared.errors import Aborted

RESERVED_US = 60_000_000
"""How long a creator has: many times a sign-up, and short for whoever waits for the value."""

_ATTEMPTS_MAX = 5
_SELECT = """
SELECT owner_id, claim_id, state, expires_at_us FROM uniq
WHERE bucket = $1 AND tenant = $2 AND kind = $3 AND value = $4
"""
_CLAIM = """
INSERT INTO uniq (bucket, tenant, kind, value, claim_id, state, expires_at_us)
VALUES ($1, $2, $3, $4, $5, 'RESERVED', $6)
ON CONFLICT (bucket, tenant, kind, value) DO UPDATE
SET claim_id = $5, owner_id = NULL, state = 'RESERVED', expires_at_us = $6
WHERE uniq.state = 'FREE' OR (uniq.state = 'RESERVED' AND uniq.claim_id = $5)
"""
_CONFIRM = """
UPDATE uniq SET state = 'CONFIRMED', owner_id = claim_id
WHERE bucket = $1 AND tenant = $2 AND kind = $3 AND value = $4 AND claim_id = $5
    AND state = 'RESERVED'
"""
_SWAP = """
UPDATE uniq SET claim_id = $6, expires_at_us = $7
WHERE bucket = $1 AND tenant = $2 AND kind = $3 AND value = $4 AND claim_id = $5
    AND state = 'RESERVED'
"""
_FREE = """
UPDATE uniq SET state = 'FREE', owner_id = NULL, claim_id = NULL
WHERE bucket = $1 AND tenant = $2 AND kind = $3 AND value = $4 AND claim_id = $5
"""
_FILL_SLOT = """
INSERT INTO id_slot (bucket, id, state) VALUES ($1, $2, $3) ON CONFLICT (bucket, id) DO NOTHING
"""
_SELECT_SLOT = "SELECT state FROM id_slot WHERE bucket = $1 AND id = $2"


@dataclass(frozen=True)
class UniqueValue:
    """A value and what it must be unique within.

    Attributes:
        tenant: whose.
        kind: "email".
        value: already normalised, so that what is the same looks the same.
    """

    tenant: str
    kind: str
    value: str

    @property
    def bucket(self) -> int:
        """Where its row lives."""
        return hash_bucket(self.tenant, self.kind, self.value)

    @property
    def key(self) -> tuple[int, str, str, str]:
        """The row's primary key."""
        return self.bucket, self.tenant, self.kind, self.value


class UniqueTaken(Exception):
    """The value belongs to another.

    Args:
        owner_id: whose it is; None while another claim is young and undecided.
    """

    def __init__(self, owner_id: UUID | None) -> None:
        super().__init__("the value is taken")
        self.owner_id = owner_id


async def claim_unique(
    tx: Transaction, value: UniqueValue, claim_id: UUID, *, now_us: int
) -> UUID | None:
    """Reserve a value for an id, in the value's bucket.

    Returns:
        None when reserved; else the id whose reservation has expired and must be resolved
        by steal_slot before swap_claim.

    Raises:
        UniqueTaken: confirmed for another, or reserved and not yet expired.
    """
    expires_at_us = now_us + RESERVED_US
    if await tx.execute(_CLAIM, *value.key, claim_id, expires_at_us) == 1:
        return None
    row = await tx.fetch_one(_SELECT, *value.key)
    assert row is not None
    if row["state"] == "CONFIRMED":
        if row["owner_id"] == claim_id:
            return None
        raise UniqueTaken(row["owner_id"])
    if not is_over(row["expires_at_us"], now_us=now_us, lasts_us=RESERVED_US):
        raise UniqueTaken(None)
    expired: UUID = row["claim_id"]
    return expired


async def fill_id_slot(tx: Transaction, id: UUID) -> None:  # noqa: A002 - as in ids.py
    """Say that an id now exists, in the transaction that creates it.

    Raises:
        Aborted: the creator was so slow that its reservation was stolen.
    """
    if await tx.execute(_FILL_SLOT, bucket_of(id), id, "LIVE") == 1:
        return
    if await _slot_state(tx, id) != "LIVE":
        raise Aborted("this took too long and its reservation is gone; try again")


async def steal_slot(tx: Transaction, expired_id: UUID) -> bool:
    """Decide, in its own bucket, that an id will never exist. False: it already does."""
    await tx.execute(_FILL_SLOT, bucket_of(expired_id), expired_id, "DEAD")
    return await _slot_state(tx, expired_id) == "DEAD"


async def confirm_unique(tx: Transaction, value: UniqueValue, claim_id: UUID) -> bool:
    """Make a reservation final; False if the value is not this id's, also on a repeat."""
    if await tx.execute(_CONFIRM, *value.key, claim_id) == 1:
        return True
    row = await tx.fetch_one(_SELECT, *value.key)
    return row is not None and row["state"] == "CONFIRMED" and row["owner_id"] == claim_id


async def swap_claim(
    tx: Transaction, value: UniqueValue, *, expired_id: UUID, claim_id: UUID, now_us: int
) -> bool:
    """Take over a reservation whose id is DEAD; False if another was faster."""
    arguments = (expired_id, claim_id, now_us + RESERVED_US)
    return await tx.execute(_SWAP, *value.key, *arguments) == 1


async def free_unique(tx: Transaction, value: UniqueValue, owner_id: UUID) -> bool:
    """Give a value up; False if it is not this id's."""
    return await tx.execute(_FREE, *value.key, owner_id) == 1


async def find_unique(reader: Reader, value: UniqueValue) -> UUID | None:
    """Whose confirmed value it is, or None; the reader is the value's bucket."""
    row = await reader.fetch_one(_SELECT, *value.key)
    if row is None or row["state"] != "CONFIRMED":
        return None
    owner_id: UUID = row["owner_id"]
    return owner_id


async def reserve_unique(
    shards: Shards, value: UniqueValue, claim_id: UUID, *, now_us: int
) -> None:
    """Reserve a value for an id, resolving an expired reservation in the way.

    Raises:
        UniqueTaken: it belongs to another, or another is about to take it.
    """
    for _ in range(_ATTEMPTS_MAX):
        async with shards.bucket(value.bucket).transaction() as tx:
            expired_id = await claim_unique(tx, value, claim_id, now_us=now_us)
        if expired_id is None:
            return
        async with shards.holding(expired_id).transaction() as tx:
            is_dead = await steal_slot(tx, expired_id)
        async with shards.bucket(value.bucket).transaction() as tx:
            if not is_dead:
                await confirm_unique(tx, value, expired_id)
                continue
            if await swap_claim(tx, value, expired_id=expired_id, claim_id=claim_id, now_us=now_us):
                return
    raise UniqueTaken(None)


async def _slot_state(tx: Transaction, id: UUID) -> str | None:  # noqa: A002 - as in ids.py
    row: Row | None = await tx.fetch_one(_SELECT_SLOT, bucket_of(id), id)
    return None if row is None else str(row["state"])
