"""LedgerStore and its SQL: a decision, its answer and its event are permanent together."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
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
    NewEntry,
    Owner,
    OwnerKind,
    ReferenceTaken,
    Side,
    Transaction,
    TransactionNotFound,
    bucket_account,
    post_entries,
)
from shared.clock import Clock, of_us, to_us
from shared.db.errors import DatabaseDamaged, UniqueViolation
from shared.db.ids import bucket_of, new_id
from shared.db.port import Once, Row, Shard, Shards
from shared.db.port import Transaction as DbTransaction
from shared.db.scatter import scatter

# Above every real id and sequence: where a list that goes down starts.
LAST_ID = UUID(int=(1 << 128) - 1)
LAST_SEQUENCE = INT64_MAX

_ACCOUNT_COLUMNS = """id, tenant, owner, owner_kind, currency_code, exponent, normal_side,
    may_overdraw, display_name, state, posted_debit, posted_credit, entry_count, created_at_us"""
_TRANSACTION_COLUMNS = """t.id AS transaction_id, t.tenant, t.owner AS poster,
    t.owner_kind AS poster_kind, t.reference, t.description, t.recorded_at_us,
    e.account_id, e.owner, e.owner_kind, e.side, e.currency_code, e.minor_units,
    e.account_sequence"""
# ruff: noqa: S608 - statements are put together from these constants only
SELECT_ACCOUNT = f"""
SELECT {_ACCOUNT_COLUMNS} FROM account WHERE bucket = $1 AND id = $2 AND tenant = $3
"""
SELECT_OWN_ACCOUNT = SELECT_ACCOUNT + " AND owner = $4"
LOCK_ACCOUNT = SELECT_ACCOUNT + " FOR UPDATE"
LIST_ACCOUNTS = f"""
SELECT {_ACCOUNT_COLUMNS} FROM account
WHERE bucket = $1 AND tenant = $2 AND owner = $3 AND id < $4 ORDER BY id DESC LIMIT $5
"""
INSERT_ACCOUNT = """
INSERT INTO account (bucket, id, tenant, owner, owner_kind, currency_code, exponent, normal_side,
                     may_overdraw, display_name, state, created_at_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
"""
INSERT_ENTRY = """
INSERT INTO entry (bucket, id, tenant, owner, owner_kind, transaction_bucket, transaction_id,
                   position, account_id, account_sequence, side, currency_code, minor_units,
                   recorded_at_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
"""
INSERT_TRANSACTION = """
INSERT INTO ledger_transaction (bucket, id, tenant, owner, owner_kind, reference, description,
                                entry_count, recorded_at_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""
SELECT_TRANSACTION = f"""
SELECT {_TRANSACTION_COLUMNS} FROM ledger_transaction AS t
JOIN entry AS e ON e.transaction_id = t.id AND e.tenant = t.tenant
WHERE t.bucket = $1 AND t.id = $2 AND t.tenant = $3
"""
SELECT_OWN_TRANSACTION = (
    SELECT_TRANSACTION
    + """ AND EXISTS (SELECT 1 FROM entry AS own
    WHERE own.transaction_id = t.id AND own.tenant = $3 AND own.owner = $4)"""
)
LIST_TRANSACTIONS = f"""
SELECT {_TRANSACTION_COLUMNS}, page.account_sequence AS page_sequence
FROM (SELECT transaction_bucket, transaction_id, account_sequence FROM entry
      WHERE bucket = $1 AND tenant = $2 AND account_id = $3 AND account_sequence < $4
      ORDER BY account_sequence DESC LIMIT $5) AS page
JOIN ledger_transaction AS t ON t.bucket = page.transaction_bucket
    AND t.id = page.transaction_id AND t.tenant = $2
JOIN entry AS e ON e.transaction_id = t.id AND e.tenant = $2
ORDER BY page.account_sequence DESC, e.position
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
SELECT account.id FROM account LEFT JOIN (
    SELECT bucket, account_id, count(*) AS n,
           sum(CASE side WHEN 1 THEN minor_units ELSE 0 END) AS debit,
           sum(CASE side WHEN 2 THEN minor_units ELSE 0 END) AS credit
    FROM entry GROUP BY bucket, account_id) AS sums
ON sums.bucket = account.bucket AND sums.account_id = account.id
WHERE account.posted_debit <> coalesce(sums.debit, 0)
    OR account.posted_credit <> coalesce(sums.credit, 0)
    OR account.entry_count <> coalesce(sums.n, 0)
LIMIT 1
"""
FIND_WRONG_TRANSACTION = """
/* any tenant: the check is of the whole file */
SELECT entry.transaction_id FROM entry
LEFT JOIN ledger_transaction AS t
    ON t.bucket = entry.transaction_bucket AND t.id = entry.transaction_id
GROUP BY entry.transaction_id, entry.currency_code
HAVING sum(CASE side WHEN 1 THEN minor_units ELSE -minor_units END) <> 0 OR count(t.id) = 0
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


@dataclass(frozen=True)
class NewTransaction:
    """What is to be posted."""

    entries: Sequence[NewEntry]
    reference: str
    description: str


Check = Callable[[dict[UUID, Account]], None]


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

    async def post(
        self, new: NewTransaction, caller: Caller, *, once: Once, check: Check
    ) -> Transaction:
        """Post entries, all or none; under a known request id, the transaction it made.

        Args:
            new: balanced.
            caller: becomes the transaction's owner.
            once: the request.
            check: raises if these accounts may not be used so; called with every account
                that the tenant has, inside the transaction.

        Raises:
            AccountNotFound, AccountClosed, CurrencyMismatch, BalanceOverflow,
            InsufficientFunds: an account does not take its entry.
            ReferenceTaken: the reference belongs to another transaction.
        """
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

    def __init__(self, shards: Shards, clock: Clock) -> None:
        self._shards = shards
        self._clock = clock

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

    async def post(
        self, new: NewTransaction, caller: Caller, *, once: Once, check: Check
    ) -> Transaction:
        """See LedgerStore.post."""
        bucket = bucket_of(bucket_account(new.entries))
        also = {bucket_of(entry.account_id) for entry in new.entries} - {bucket}
        async with self._shards.bucket(bucket).transaction(once, also=also) as tx:
            if tx.answered:
                return transaction_of_bytes(tx.answer)
            accounts = await _lock_accounts(tx, new.entries, caller.tenant)
            check(accounts)
            transaction = Transaction(
                new_id(bucket),
                caller.tenant,
                caller.owner,
                new.reference,
                new.description,
                post_entries(accounts, new.entries),
                self._clock.now(),
            )
            await _insert(tx, transaction)
            await tx.append_outbox(events.encode_posted(transaction))
            await tx.answer_with(transaction_to_bytes(transaction))
        return transaction

    async def get_transaction(self, transaction_id: UUID, caller: Caller) -> Transaction:
        """See LedgerStore.get_transaction."""
        key = (bucket_of(transaction_id), transaction_id, caller.tenant)
        holding = self._shards.holding(transaction_id)
        order = " ORDER BY e.position"
        if caller.is_operator:
            rows = await holding.fetch_all(SELECT_TRANSACTION + order, *key)
        else:
            rows = await holding.fetch_all(SELECT_OWN_TRANSACTION + order, *key, caller.owner.id)
        if not rows:
            raise TransactionNotFound(transaction_id)
        return transaction_of_rows(rows)

    async def list_transactions(
        self, account_id: UUID, caller: Caller, *, before: int, limit: int
    ) -> list[tuple[int, Transaction]]:
        """See LedgerStore.list_transactions."""
        await self.get_account(account_id, caller)
        rows = await self._shards.holding(account_id).fetch_all(
            LIST_TRANSACTIONS, bucket_of(account_id), caller.tenant, account_id, before, limit
        )
        pages: dict[int, list[Row]] = {}
        for row in rows:
            pages.setdefault(row["page_sequence"], []).append(row)
        return [(sequence, transaction_of_rows(page)) for sequence, page in pages.items()]

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


async def _lock_accounts(
    tx: DbTransaction, entries: Collection[NewEntry], tenant: str
) -> dict[UUID, Account]:
    accounts = {}
    # In one order everywhere, so that two transactions never wait for each other.
    for account_id in sorted(entry.account_id for entry in entries):
        row = await tx.fetch_one(LOCK_ACCOUNT, bucket_of(account_id), account_id, tenant)
        if row is not None:
            accounts[account_id] = account_of_row(row)
    return accounts


async def _insert(tx: DbTransaction, transaction: Transaction) -> None:
    bucket, recorded_at_us = bucket_of(transaction.transaction_id), to_us(transaction.recorded_at)
    for position, entry in enumerate(transaction.entries):
        entry_bucket = bucket_of(entry.account_id)
        await tx.execute(
            INSERT_ENTRY,
            *(entry_bucket, new_id(entry_bucket), transaction.tenant),
            *(entry.owner.id, entry.owner.kind.value, bucket, transaction.transaction_id),
            *(position, entry.account_id, entry.account_sequence, entry.side.value),
            *(entry.currency_code, entry.minor_units, recorded_at_us),
        )
    try:
        await tx.execute(
            INSERT_TRANSACTION,
            *(bucket, transaction.transaction_id, transaction.tenant),
            *(transaction.owner.id, transaction.owner.kind.value, transaction.reference or None),
            *(transaction.description, len(transaction.entries), recorded_at_us),
        )
    except UniqueViolation as error:
        if error.constraint != "ledger_transaction_reference":
            raise
        raise ReferenceTaken(transaction.reference) from error


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
        posted_debit=row["posted_debit"],
        posted_credit=row["posted_credit"],
        entry_count=row["entry_count"],
    )


def transaction_of_rows(rows: Sequence[Row]) -> Transaction:
    """A transaction from the rows of its entries, by position."""
    first = rows[0]
    return Transaction(
        transaction_id=first["transaction_id"],
        tenant=first["tenant"],
        owner=Owner(OwnerKind(first["poster_kind"]), first["poster"]),
        reference=first["reference"] or "",
        description=first["description"],
        entries=tuple(_entry_of_row(row) for row in rows),
        recorded_at=of_us(first["recorded_at_us"]),
    )


def _entry_of_row(row: Row) -> Entry:
    return Entry(
        account_id=row["account_id"],
        owner=Owner(OwnerKind(row["owner_kind"]), row["owner"]),
        side=Side(row["side"]),
        currency_code=row["currency_code"],
        minor_units=row["minor_units"],
        account_sequence=row["account_sequence"],
    )


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


def transaction_to_bytes(transaction: Transaction) -> bytes:
    """A transaction as it was answered."""
    return orjson.dumps(transaction)


def transaction_of_bytes(content: bytes) -> Transaction:
    """What transaction_to_bytes stored."""
    stored: dict[str, Any] = orjson.loads(content)
    return Transaction(
        **{
            **stored,
            "transaction_id": UUID(stored["transaction_id"]),
            "owner": _owner_of(stored["owner"]),
            "entries": tuple(_entry_of(entry) for entry in stored["entries"]),
            "recorded_at": datetime.fromisoformat(stored["recorded_at"]).astimezone(UTC),
        }
    )


def _entry_of(stored: dict[str, Any]) -> Entry:
    return Entry(
        **{
            **stored,
            "account_id": UUID(stored["account_id"]),
            "owner": _owner_of(stored["owner"]),
            "side": Side(stored["side"]),
        }
    )


def _owner_of(stored: dict[str, Any]) -> Owner:
    return Owner(OwnerKind(stored["kind"]), UUID(stored["id"]))
