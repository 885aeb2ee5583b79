"""The database keeps the books, whoever writes: raw SQL is refused or stays even."""

from uuid import UUID

import pytest

from services.payment.lane import open_lanes
from services.payment.store import SqlLedgerStore
from shared.db.errors import DatabaseDamaged
from shared.db.ids import new_id
from tests.databases import SECRET
from tests.integration.services.payment.conftest import euros, new_user, serving_ledger

MOMENT_US = 1_767_225_600_000_000


def typed(books, name_or_id) -> str:
    """A resource name or an id, as it is typed into the database's shell."""
    return books.place.literal(UUID(str(name_or_id).rpartition("/")[2]))


@pytest.fixture
async def books(ledger):
    """Two accounts of one user, the first with 100.00 EUR from cash."""
    ada = new_user()
    ledger.ada = ada
    ledger.first, ledger.second = [await ledger.open_account(ada) for _ in range(2)]
    await ledger.deposit(ledger.first, 10_000)
    return ledger


def entry(books, account: str, side: int, units: object, number: int, **but) -> dict[str, object]:
    """A row of an account's journal that follows on what the books fixture left."""
    before = 10_000 if account == books.first else 0
    debit = units if side == 1 and isinstance(units, int) else 0
    return {
        "bucket": 77,
        "tenant": "'default'",
        "owner": typed(books, books.ada.subject),
        "owner_kind": 1,
        "transaction_bucket": 77,
        "account_id": typed(books, account),
        "account_sequence": number,
        "side": side,
        "currency_code": "'EUR'",
        "minor_units": units,
        "recorded_at_us": MOMENT_US,
        "held_minor_units": 0,
        "posted_debit": debit,
        "posted_credit": before + (units if not debit and isinstance(units, int) else 0),
        "pending_debit": 0,
        "pending_credit": 0,
        "floor_side": 2,
        **but,
    }


def seal(books, count: int) -> dict[str, object]:
    return {
        "bucket": 77,
        "tenant": "'default'",
        "owner": typed(books, books.ada.subject),
        "owner_kind": 1,
        "description": "''",
        "entry_count": count,
        "recorded_at_us": MOMENT_US,
        "state": 1,
        "result": 0,
        "account_id": typed(books, books.first),
        "account_sequence": 2,
        "fingerprint": "''",
        "entries": "'[]'",
    }


def insert(table: str, *rows: dict[str, object]) -> str:
    values = ", ".join(f"({', '.join(map(str, row.values()))})" for row in rows)
    return f"INSERT INTO {table} ({', '.join(rows[0])}) VALUES {values}"


def written(books, *rows: dict[str, object], sealed: int | None = None) -> list[str]:
    """A transaction as raw SQL: on Postgres one statement, for its rules look at whole ones."""
    made = typed(books, new_id(77))
    entries = insert("entry", *({**row, "transaction_id": made} for row in rows))
    if sealed is None:
        return [entries]
    sealing = insert("ledger_transaction", {**seal(books, sealed), "id": made})
    if books.shards.engine == "sqlite":
        return [entries, sealing]
    return [f"WITH lines AS ({entries}) {sealing}"]


async def balances(books) -> list[int]:
    return [await books.available(books.ada, name) for name in (books.first, books.second)]


async def run_all(books, *statements: str) -> None:
    await books.place.run_raw(0, *statements, admitted=[9, 77])


def pair(books, units: int = 30, **but) -> list[dict[str, object]]:
    """A debit of the first account and a credit of the second."""
    return [entry(books, books.first, 1, units, 2, **but), entry(books, books.second, 2, units, 1)]


async def test_even_entries_with_their_seal_are_taken(books):
    await run_all(books, *written(books, *pair(books), sealed=2))
    assert await balances(books) == [9_970, 30]


def change(at: int, **but):
    """The pair with something wrong in one of its entries."""

    def make(books) -> list[str]:
        rows = pair(books)
        rows[at] |= {key: value(books) if callable(value) else value for key, value in but.items()}
        return written(books, *rows, sealed=2)

    return make


@pytest.mark.parametrize(
    ("refusal", "make"),
    [
        ("entries_unbalanced", change(1, minor_units=31, posted_credit=31)),
        ("(?i)foreign key|transaction_missing", lambda b: written(b, *pair(b))),
        ("entries_missing", lambda b: written(b, *pair(b), sealed=3)),
        (
            "entries_missing",
            lambda b: [insert("ledger_transaction", {**seal(b, 2), "id": typed(b, new_id(77))})],
        ),
        ("account_floor", lambda b: written(b, *pair(b, 10_001), sealed=2)),
        ("account_sequence_gap", change(1, account_sequence=2)),
        ("entry_amount", change(1, minor_units=0, posted_credit=0)),
        ("account_floor|account_sums|entry_amount", change(1, minor_units=-1, posted_credit=-1)),
        (
            "currency_mismatch",
            lambda b: written(b, *(row | {"currency_code": "'USD'"} for row in pair(b)), sealed=2),
        ),
        ("balances_follow_entries", change(1, posted_credit=31)),
        ("balances_follow_entries", change(0, floor_side=0)),
        ("account_missing", change(1, tenant="'x'")),
        ("account_missing", change(1, account_id=lambda b: typed(b, new_id(77)))),
        ("append_only", lambda b: ["UPDATE entry SET minor_units = 1"]),
        ("append_only", lambda b: ["DELETE FROM entry"]),
        ("append_only", lambda b: ["UPDATE ledger_transaction SET description = 'x'"]),
        ("append_only", lambda b: ["UPDATE ledger_transaction SET state = 4"]),
        ("append_only", lambda b: ["DELETE FROM ledger_transaction"]),
        ("accounts_are_kept", lambda b: ["DELETE FROM account"]),
        ("account_is_fixed", lambda b: ["UPDATE account SET may_overdraw = NOT may_overdraw"]),
        ("account_is_fixed", lambda b: ["UPDATE account SET currency_code = 'USD'"]),
    ],
)
async def test_raw_sql_cannot_cook_the_books(books, refusal, make):
    with pytest.raises(Exception, match=refusal):
        await run_all(books, *make(books))
    assert await balances(books) == [10_000, 0]
    assert await books.count("entry") == 2


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_half_a_cent_is_no_integer(books):
    # Postgres makes it one: the column's type rounds before any trigger sees it.
    with pytest.raises(Exception, match="not_an_integer"):
        await run_all(books, *written(books, entry(books, books.second, 2, 1.5, 1)))


async def test_a_sealed_transaction_takes_no_more_entries(books):
    statements = written(books, *pair(books), sealed=2)
    await run_all(books, *statements)
    row = await books.shards.bucket(77).fetch_one(
        "SELECT id FROM ledger_transaction WHERE tenant = 'default' AND owner = $1",
        UUID(books.ada.subject),
    )
    later = [
        entry(books, books.first, 1, 5, 3, posted_debit=35, posted_credit=10_000),
        entry(books, books.second, 2, 5, 2, posted_credit=35),
    ]
    more = insert("entry", *({**one, "transaction_id": typed(books, row["id"])} for one in later))
    with pytest.raises(Exception, match="transaction_sealed"):
        await run_all(books, more)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE entry SET posted_credit = 99 WHERE posted_credit > 0",
        "UPDATE entry SET minor_units = 99 WHERE side = 2",
        "DELETE FROM ledger_transaction",
    ],
)
async def test_a_ledger_that_does_not_add_up_is_not_served(books, clock, sql):
    async with open_lanes(books.shards, clock) as lanes:
        store = SqlLedgerStore(books.shards, lanes, secret=SECRET)
        await store.verify(entries_max=1_000)
        await books.place.run_unguarded(0, sql)
        with pytest.raises(DatabaseDamaged, match="does not add up"):
            await store.verify(entries_max=1_000)
        await store.verify(entries_max=1)  # too many to add up at start


async def test_books_are_the_same_after_opening_again(place, clock):
    ada, bob = new_user(), new_user(3000)
    async with serving_ledger(place, clock) as ledger:
        payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
        await ledger.deposit(payer, 100)
        posted = await ledger.transfer(ada, payer, payee, euros(30), request_id="the key")
    async with serving_ledger(place, clock) as ledger:
        again = await ledger.transfer(ada, payer, payee, euros(30), request_id="the key")
        assert again == posted
        assert await ledger.available(ada, payer) == 70
