"""LedgerStore and its SQL: a decision, its answer and its event are permanent together."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import UUID

import orjson

from services.payment import events
from services.payment.domain import (
    INT64_MAX,
    Account,
    AccountNotFound,
    AccountState,
    BalanceOverflow,
    CurrencyTotal,
    Entry,
    Owner,
    OwnerKind,
    Side,
    Transaction,
    TransactionNotFound,
)
from services.payment.journal import LAST_ENTRY, RECORD_COLUMNS, STANDING_COLUMNS, record_of_row
from services.payment.lane import Lanes
from services.payment.posting import Answer, Order, Record
from shared.clock import of_us, to_us
from shared.db.errors import DatabaseDamaged
from shared.db.ids import bucket_of
from shared.db.once import home_bucket
from shared.db.port import Once, Row, Shard, Shards
from shared.db.scatter import scatter
from shared.identity import PrincipalKind

# Above every real id and sequence: where a list that goes down starts.
LAST_ID = UUID(int=(1 << 128) - 1)
LAST_SEQUENCE = INT64_MAX

_ACCOUNT_COLUMNS = f"""{STANDING_COLUMNS}, a.exponent, a.display_name, a.created_at_us"""
# ruff: noqa: S608 - statements are put together from these constants only
_ACCOUNTS = f"SELECT {_ACCOUNT_COLUMNS} FROM account AS a {LAST_ENTRY}"
SELECT_ACCOUNT = f"{_ACCOUNTS} WHERE a.bucket = $1 AND a.id = $2 AND a.tenant = $3"
SELECT_OWN_ACCOUNT = SELECT_ACCOUNT + " AND a.owner = $4"
LIST_ACCOUNTS = f"""
{_ACCOUNTS} WHERE a.bucket = $1 AND a.tenant = $2 AND a.owner = $3 AND a.id < $4
ORDER BY a.id DESC LIMIT $5
"""
INSERT_ACCOUNT = """
INSERT INTO account (bucket, id, tenant, owner, owner_kind, currency_code, exponent, normal_side,
                     may_overdraw, display_name, state, created_at_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
"""
SELECT_TRANSACTION = f"""
SELECT {RECORD_COLUMNS} FROM ledger_transaction AS t
WHERE t.bucket = $1 AND t.id = $2 AND t.tenant = $3 AND t.state = 1
"""
LIST_TRANSACTIONS = f"""
SELECT {RECORD_COLUMNS}, page.account_sequence AS page_sequence
FROM (SELECT transaction_bucket, transaction_id, account_sequence FROM entry
      WHERE bucket = $1 AND tenant = $2 AND account_id = $3 AND account_sequence < $4
          AND minor_units > 0
      ORDER BY account_sequence DESC LIMIT $5) AS page
JOIN ledger_transaction AS t ON t.bucket = page.transaction_bucket
    AND t.id = page.transaction_id AND t.tenant = $2
ORDER BY page.account_sequence DESC
"""
# Halves of 32 bits, because a sum over many accounts may exceed the int64 that each keeps.
TRIAL_BALANCE = """
SELECT currency_code, side, sum(minor_units >> 32) AS high, sum(minor_units & 4294967295) AS low,
       count(DISTINCT transaction_id) AS transaction_count
FROM entry
WHERE tenant = $1 AND recorded_at_us >= $2 AND recorded_at_us < $3 AND tenfold_owned(entry.bucket)
GROUP BY currency_code, side
"""
COUNT_ENTRIES = "SELECT count(*) AS n FROM entry /* any tenant: the check is of the whole file */"
FIND_WRONG_ACCOUNT = """
/* any tenant: the check is of the whole file */
SELECT account_id FROM (
    SELECT account_id, account_sequence, posted_debit, posted_credit, pending_debit,
        pending_credit, row_number() OVER line AS number,
        sum(CASE side WHEN 1 THEN minor_units ELSE 0 END) OVER line AS debit,
        sum(CASE side WHEN 2 THEN minor_units ELSE 0 END) OVER line AS credit,
        sum(CASE side WHEN 1 THEN held_minor_units ELSE 0 END) OVER line AS held_debit,
        sum(CASE side WHEN 2 THEN held_minor_units ELSE 0 END) OVER line AS held_credit
    FROM entry WINDOW line AS (PARTITION BY bucket, account_id ORDER BY account_sequence)
) AS summed
WHERE number <> account_sequence OR debit <> posted_debit OR credit <> posted_credit
    OR held_debit <> pending_debit OR held_credit <> pending_credit
LIMIT 1
"""
FIND_WRONG_TRANSACTION = """
/* any tenant: the check is of the whole file */
SELECT coalesce(sums.transaction_id, t.id) AS transaction_id FROM ledger_transaction AS t
FULL JOIN (
    SELECT transaction_bucket, transaction_id, sum(present) AS present, max(abs(difference)) AS off
    FROM (
        SELECT transaction_bucket, transaction_id, count(*) AS present,
            sum(CASE side WHEN 1 THEN minor_units ELSE -minor_units END) AS difference
        FROM entry GROUP BY transaction_bucket, transaction_id, currency_code
    ) AS per_currency
    GROUP BY transaction_bucket, transaction_id
) AS sums ON sums.transaction_bucket = t.bucket AND sums.transaction_id = t.id
WHERE t.id IS NULL OR coalesce(sums.present, 0) <> t.entry_count OR coalesce(sums.off, 0) <> 0
LIMIT 1
"""


@dataclass(frozen=True)
class Caller:
    """Whose data a call may see.

    Attributes:
        owner: the caller.
        is_operator: whether the whole tenant may be seen.
    """

    tenant: str
    owner: Owner
    is_operator: bool


class LedgerStore(Protocol):
    """Where accounts and transactions are kept."""

    async def open_account(self, account: Account, *, once: Once) -> Account:
        """Keep a new account; under a known request id, the account it made."""
        ...

    async def get_account(self, account_id: UUID, caller: Caller) -> Account:
        """Read an account.

        Raises:
            AccountNotFound: absent, or not the caller's.
        """
        ...

    async def list_accounts(self, caller: Caller, *, before: UUID, limit: int) -> list[Account]:
        """The caller's own accounts with an id below `before`, newest first."""
        ...

    async def decide(self, orders: Sequence[Order], *, once: Once) -> list[Answer]:
        """Have orders decided in their order, all in one batch; a repeat is answered alike.

        Args:
            orders: see posting.Order; their accounts are on one shard.
            once: the request; a key that came with another request is refused.

        Raises:
            IdempotencyKeyReused: it did.
        """
        ...

    async def preview(self, orders: Sequence[Order]) -> list[Answer]:
        """What `decide` would answer now; nothing is written."""
        ...

    def order_id(self, once: Once, bucket: int, *, at: int = 0) -> UUID:
        """The id of the `at`-th order of a request: the same for every repeat of it."""
        ...

    async def get_transaction(self, transaction_id: UUID, caller: Caller) -> Transaction:
        """Read a transaction that touches an account of the caller.

        Raises:
            TransactionNotFound: absent, or none of the caller's.
        """
        ...

    async def list_transactions(
        self, account_id: UUID, caller: Caller, *, before: int, limit: int
    ) -> list[tuple[int, Transaction]]:
        """Transactions of one account, newest first, each with its number in the account.

        Args:
            account_id: an account of the caller.
            caller: who asks.
            before: only numbers below this one.
            limit: how many at most.

        Raises:
            AccountNotFound: absent, or not the caller's.
        """
        ...

    async def add_up(self, tenant: str, *, since: datetime, until: datetime) -> list[CurrencyTotal]:
        """Sums per currency of what was recorded from `since` up to, not including, `until`."""
        ...


class SqlLedgerStore:
    """See LedgerStore."""

    def __init__(self, shards: Shards, lanes: Lanes, *, secret: bytes) -> None:
        self._shards = shards
        self._lanes = lanes
        self._secret = secret

    async def open_account(self, account: Account, *, once: Once) -> Account:
        """See LedgerStore.open_account."""
        async with self._shards.holding(account.account_id).transaction(once) as tx:
            if tx.answered:
                return account_of_bytes(tx.answer)
            await tx.execute(INSERT_ACCOUNT, *row_of_account(account))
            await tx.append_outbox(events.encode_opened(account))
            await tx.answer_with(account_to_bytes(account))
        return account

    async def get_account(self, account_id: UUID, caller: Caller) -> Account:
        """See LedgerStore.get_account."""
        key = (bucket_of(account_id), account_id, caller.tenant)
        holding = self._shards.holding(account_id)
        if caller.is_operator:
            row = await holding.fetch_one(SELECT_ACCOUNT, *key)
        else:
            row = await holding.fetch_one(SELECT_OWN_ACCOUNT, *key, caller.owner.id)
        if row is None:
            raise AccountNotFound(account_id)
        return account_of_row(row)

    async def list_accounts(self, caller: Caller, *, before: UUID, limit: int) -> list[Account]:
        """See LedgerStore.list_accounts."""
        bucket = bucket_of(caller.owner.id)
        rows = await self._shards.bucket(bucket).fetch_all(
            LIST_ACCOUNTS, bucket, caller.tenant, caller.owner.id, before, limit
        )
        return [account_of_row(row) for row in rows]

    async def decide(self, orders: Sequence[Order], *, once: Once) -> list[Answer]:
        """See LedgerStore.decide."""
        if once.principal.kind is not PrincipalKind.USER:
            await self._claim(once)
        return await self._lanes.submit(orders)

    async def preview(self, orders: Sequence[Order]) -> list[Answer]:
        """See LedgerStore.preview."""
        return await self._lanes.preview(orders)

    def order_id(self, once: Once, bucket: int, *, at: int = 0) -> UUID:
        """See LedgerStore.order_id."""
        return keyed_id(self._secret, bucket, once.scope, once.request_id, str(at))

    async def _claim(self, once: Once) -> None:
        """Tie a key to its request, before anything is decided under it.

        A user's key needs none: the payer is in the user's own bucket, so the key means the same
        id in every request.
        """
        quiet = replace(once, on_replay=lambda: None)
        home = home_bucket(once, self._secret)
        async with self._shards.bucket(home).transaction(quiet) as tx:
            if not tx.answered:
                await tx.answer_with(b"")

    async def get_transaction(self, transaction_id: UUID, caller: Caller) -> Transaction:
        """See LedgerStore.get_transaction."""
        key = (bucket_of(transaction_id), transaction_id, caller.tenant)
        row = await self._shards.holding(transaction_id).fetch_one(SELECT_TRANSACTION, *key)
        if row is None:
            raise TransactionNotFound(transaction_id)
        transaction = transaction_of_record(record_of_row(row))
        if not caller.is_operator and all(
            entry.owner != caller.owner for entry in transaction.entries
        ):
            raise TransactionNotFound(transaction_id)
        return transaction

    async def list_transactions(
        self, account_id: UUID, caller: Caller, *, before: int, limit: int
    ) -> list[tuple[int, Transaction]]:
        """See LedgerStore.list_transactions."""
        await self.get_account(account_id, caller)
        rows = await self._shards.holding(account_id).fetch_all(
            LIST_TRANSACTIONS, bucket_of(account_id), caller.tenant, account_id, before, limit
        )
        return [(row["page_sequence"], transaction_of_record(record_of_row(row))) for row in rows]

    async def add_up(self, tenant: str, *, since: datetime, until: datetime) -> list[CurrencyTotal]:
        """See LedgerStore.add_up."""
        gathered = await scatter(self._shards, TRIAL_BALANCE, tenant, to_us(since), to_us(until))
        return totals_of_rows(gathered.rows)

    async def verify(self, *, entries_max: int) -> None:
        """Add up every account and transaction, unless there are too many to do it at start.

        The integrity check of a file sees a broken page, not a wrong number in a sound one.

        Raises:
            DatabaseDamaged: an account's sums are not its entries', or a transaction does
                not balance.
        """
        for shard in self._shards.all():
            row = await shard.fetch_one(COUNT_ENTRIES)
            if row is not None and 0 < row["n"] <= entries_max:
                await _verify_shard(shard)


async def _verify_shard(shard: Shard) -> None:
    for statement, what in (
        (FIND_WRONG_ACCOUNT, "account"),
        (FIND_WRONG_TRANSACTION, "transaction"),
    ):
        wrong = await shard.fetch_one(statement)
        if wrong is not None:
            raise DatabaseDamaged(
                f"the ledger does not add up: {what} {next(iter(wrong.values()))} in shard "
                f"{shard.index}. Nothing is served; restore the payment folder from a backup"
            )


def row_of_account(account: Account) -> tuple[object, ...]:
    """The arguments of INSERT_ACCOUNT."""
    return (
        *(bucket_of(account.account_id), account.account_id, account.tenant),
        *(account.owner.id, account.owner.kind.value, account.currency_code, account.exponent),
        *(account.normal_side.value, account.may_overdraw, account.display_name),
        *(account.state.value, to_us(account.created_at)),
    )


def account_of_row(row: Row) -> Account:
    """An account from its columns."""
    return Account(
        account_id=row["id"],
        tenant=row["tenant"],
        owner=Owner(OwnerKind(row["owner_kind"]), row["owner"]),
        currency_code=row["currency_code"],
        exponent=row["exponent"],
        normal_side=Side(row["normal_side"]),
        may_overdraw=bool(row["may_overdraw"]),
        display_name=row["display_name"],
        state=AccountState(row["state"]),
        created_at=of_us(row["created_at_us"]),
        posted_debit=row["posted_debit"] or 0,
        posted_credit=row["posted_credit"] or 0,
        pending_debit=row["pending_debit"] or 0,
        pending_credit=row["pending_credit"] or 0,
        entry_count=row["account_sequence"] or 0,
    )


def transaction_of_record(record: Record) -> Transaction:
    """What was posted under an id."""
    return Transaction(
        transaction_id=record.order_id,
        tenant=record.tenant,
        owner=record.owner,
        reference=record.reference,
        description=record.description,
        entries=tuple(
            Entry(
                entry.account_id,
                entry.owner,
                Side(entry.side),
                entry.currency_code,
                entry.minor_units,
                entry.sequence,
            )
            for entry in record.entries
        ),
        recorded_at=of_us(record.recorded_at_us),
    )


def keyed_id(secret: bytes, bucket: int, *parts: str) -> UUID:
    """A UUIDv7 that only these parts and this bucket have; its moment is 1970, for it has none."""
    digest = hmac.digest(secret, "\0".join(parts).encode(), "sha256")
    tail = int.from_bytes(digest[:8]) & ((1 << 62) - 1)
    return UUID(int=0x7 << 76 | bucket << 64 | 0b10 << 62 | tail)


def totals_of_rows(rows: Sequence[Row]) -> list[CurrencyTotal]:
    """Sums of several shards' TRIAL_BALANCE rows, by currency.

    Raises:
        BalanceOverflow: a sum does not fit the contract's int64.
    """
    sums: dict[tuple[str, int], int] = {}
    counts: dict[tuple[str, int], int] = {}
    for row in rows:
        key = (row["currency_code"], row["side"])
        sums[key] = sums.get(key, 0) + (row["high"] << 32) + row["low"]
        counts[key] = counts.get(key, 0) + row["transaction_count"]
    if max(sums.values(), default=0) > INT64_MAX:
        raise BalanceOverflow("the sums of this ledger exceed 2^63-1; ask for a single day")
    return [
        CurrencyTotal(
            code,
            sums.get((code, Side.DEBIT), 0),
            sums.get((code, Side.CREDIT), 0),
            counts.get((code, Side.DEBIT), 0),
        )
        for code in sorted({code for code, _ in sums})
    ]


# Answers under a request id: whole values, so that a repeat needs no second read.


def account_to_bytes(account: Account) -> bytes:
    """An account as it was answered."""
    return orjson.dumps(account)


def account_of_bytes(content: bytes) -> Account:
    """What account_to_bytes stored."""
    stored: dict[str, Any] = orjson.loads(content)
    return Account(
        **{
            **stored,
            "account_id": UUID(stored["account_id"]),
            "owner": _owner_of(stored["owner"]),
            "normal_side": Side(stored["normal_side"]),
            "state": AccountState(stored["state"]),
            "created_at": datetime.fromisoformat(stored["created_at"]).astimezone(UTC),
        }
    )


def _owner_of(stored: dict[str, Any]) -> Owner:
    return Owner(OwnerKind(stored["kind"]), UUID(stored["id"]))
