"""Stocks: bytes stored, seconds converted, mails a day; reserved, then committed or released.

Every step is part of the transaction of its effect, in the owner's bucket: an upload's row and
its reservation commit together, so that no kill leaves one without the other. All steps may be
repeated: an entry is known by the id of the thing that it stands for.

    reserve ──► commit_held ──► release      what is held: a file's bytes, until it is deleted
            ├─► commit_used                  what is used up: a mail that was sent
            └─► release                      it came to nothing
"""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from shared.db.port import Reader, Transaction
from shared.errors import QuotaExceeded

_MAKE = """
INSERT INTO stock (bucket, tenant, owner, kind, period, used, reserved)
VALUES ($1, $2, $3, $4, $5, 0, 0) ON CONFLICT (bucket, tenant, owner, kind, period) DO NOTHING
"""
_KEY = "bucket = $1 AND tenant = $2 AND owner = $3 AND kind = $4"
_RESERVE = f"""
UPDATE stock SET reserved = reserved + $6
WHERE {_KEY} AND period = $5 AND used + reserved + $6 <= $7
"""  # noqa: S608 - constants of ours, here and below
_CHANGE = f"""
UPDATE stock SET used = used + $6, reserved = reserved + $7 WHERE {_KEY} AND period = $5
"""  # noqa: S608
# Earlier days of which nothing is open any more.
_FORGET = f"DELETE FROM stock WHERE {_KEY} AND period <> '' AND period < $5 AND reserved = 0"  # noqa: S608
_READ = f"SELECT used, reserved FROM stock WHERE {_KEY} AND period = $5"  # noqa: S608
_INSERT_ENTRY = """
INSERT INTO stock_entry (bucket, id, kind, tenant, owner, period, amount, is_held)
VALUES ($1, $2, $3, $4, $5, $6, $7, 0)
"""
_SELECT_ENTRY = """
SELECT owner, period, amount, is_held FROM stock_entry
WHERE bucket = $1 AND id = $2 AND kind = $3 AND tenant = $4
FOR UPDATE
"""
_HOLD_ENTRY = """
UPDATE stock_entry SET is_held = 1 WHERE bucket = $1 AND id = $2 AND kind = $3 AND tenant = $4
"""
_DELETE_ENTRY = """
DELETE FROM stock_entry WHERE bucket = $1 AND id = $2 AND kind = $3 AND tenant = $4
"""


class StockExceeded(QuotaExceeded):
    """The owner holds, or has used, as much as it may."""

    reason = "STOCK_EXCEEDED"

    def __init__(self, stock: "Stock", amount: int, left: int, limit: int) -> None:
        period = f" on {stock.period}" if stock.period else ""
        super().__init__(
            f"{amount} of {stock.kind}{period} are asked for, and {left} of {limit} are left.",
            metadata={
                "quota": stock.kind,
                "subject": "owner",
                "asked": str(amount),
                "left": str(left),
                "limit": str(limit),
            },
        )


@dataclass(frozen=True)
class Stock:
    """What is counted.

    Attributes:
        tenant: whose owner.
        owner: who holds or uses it; the transaction is of the owner's bucket.
        kind: "stored-bytes".
        period: "" for what is held; a day (`day_of`) for what is used up.
    """

    tenant: str
    owner: UUID
    kind: str
    period: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """Its key beside the bucket."""
        return self.tenant, self.owner, self.kind, self.period


@dataclass(frozen=True)
class Level:
    """How much of a stock is used for good or held, and how much is reserved."""

    used: int = 0
    reserved: int = 0


def day_of(now: datetime) -> str:
    """The period of what is counted by days: "2026-11-25", UTC."""
    return now.date().isoformat()


async def reserve(
    tx: Transaction, stock: Stock, entry_id: UUID, amount: int, *, limit: int
) -> None:
    """Take a part of a stock for something that may come to nothing; once for each id.

    Args:
        tx: of the effect.
        stock: what is counted.
        entry_id: of what it is for.
        amount: 1 or more.
        limit: what may be used and reserved together.

    Raises:
        StockExceeded: there is not so much left; nothing was reserved.
    """
    if amount < 1:
        raise ValueError(f"{amount} of {stock.kind} cannot be reserved")
    if await _entry(tx, stock.tenant, stock.kind, entry_id) is not None:
        return
    await tx.execute(_MAKE, tx.bucket, *stock.key)
    if not await tx.execute(_RESERVE, tx.bucket, *stock.key, amount, limit):
        level = await level_of(tx, tx.bucket, stock)
        left = max(0, limit - level.used - level.reserved)
        raise StockExceeded(stock, amount, left, limit)
    owner, period = stock.owner, stock.period
    entry = (stock.kind, stock.tenant, owner, period, amount)
    await tx.execute(_INSERT_ENTRY, tx.bucket, entry_id, *entry)
    if period:
        await tx.execute(_FORGET, tx.bucket, *stock.key)


async def commit_held(tx: Transaction, tenant: str, kind: str, entry_id: UUID) -> None:
    """It exists now, and takes its part until `release`; harmless if that was never reserved."""
    entry = await _entry(tx, tenant, kind, entry_id)
    if entry is None or entry.is_held:
        return
    await tx.execute(_CHANGE, tx.bucket, *entry.stock.key, entry.amount, -entry.amount)
    await tx.execute(_HOLD_ENTRY, tx.bucket, entry_id, kind, tenant)


async def commit_used(tx: Transaction, tenant: str, kind: str, entry_id: UUID) -> None:
    """It has been used up; harmless if it was never reserved, or has been committed before."""
    entry = await _entry(tx, tenant, kind, entry_id)
    if entry is None:
        return
    await tx.execute(_CHANGE, tx.bucket, *entry.stock.key, entry.amount, -entry.amount)
    await tx.execute(_DELETE_ENTRY, tx.bucket, entry_id, kind, tenant)


async def release(tx: Transaction, tenant: str, kind: str, entry_id: UUID) -> None:
    """It came to nothing, or is not held any more; harmless if there is no such entry."""
    entry = await _entry(tx, tenant, kind, entry_id)
    if entry is None:
        return
    change = (-entry.amount, 0) if entry.is_held else (0, -entry.amount)
    await tx.execute(_CHANGE, tx.bucket, *entry.stock.key, *change)
    await tx.execute(_DELETE_ENTRY, tx.bucket, entry_id, kind, tenant)


async def level_of(reader: Reader | Transaction, bucket: int, stock: Stock) -> Level:
    """How much there is of it."""
    row = await reader.fetch_one(_READ, bucket, *stock.key)
    return Level() if row is None else Level(row["used"], row["reserved"])


@dataclass(frozen=True)
class _Entry:
    stock: Stock
    amount: int
    is_held: bool


async def _entry(tx: Transaction, tenant: str, kind: str, entry_id: UUID) -> _Entry | None:
    row = await tx.fetch_one(_SELECT_ENTRY, tx.bucket, entry_id, kind, tenant)
    if row is None:
        return None
    stock = Stock(tenant, row["owner"], kind, row["period"])
    return _Entry(stock, row["amount"], bool(row["is_held"]))
