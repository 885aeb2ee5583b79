"""The database keeps the books, whoever writes: raw SQL is refused or stays even."""

from uuid import UUID

import pytest

from services.payment.store import SqlLedgerStore
from shared.db.errors import DatabaseDamaged
from shared.db.ids import new_id
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


def insert_entry(books, account: str, side: int, units: object, transaction_id, number: int, **but):
    values = {
        "bucket": 77,
        "id": typed(books, new_id(77)),
        "tenant": "'default'",
        "owner": typed(books, books.ada.subject),
        "owner_kind": 1,
        "transaction_bucket": 77,
        "transaction_id": typed(books, transaction_id),
        "position": side,
        "account_id": typed(books, account),
        "account_sequence": number,
        "side": side,
        "currency_code": "'EUR'",
        "minor_units": units,
        "recorded_at_us": MOMENT_US,
        **but,
    }
    return (
        f"INSERT INTO entry ({', '.join(values)}) VALUES ({', '.join(map(str, values.values()))})"
    )


def insert_seal(books, transaction_id, count: int) -> str:
    return (
        "INSERT INTO ledger_transaction (bucket, id, tenant, owner, owner_kind, description, "
        f"entry_count, recorded_at_us) VALUES (77, {typed(books, transaction_id)}, 'default', "
        f"{typed(books, books.ada.subject)}, 1, '', {count}, {MOMENT_US})"
    )


async def balances(books) -> list[int]:
    return [await books.available(books.ada, name) for name in (books.first, books.second)]


async def run_all(books, *statements: str) -> None:
    await books.place.run_raw(0, *statements, admitted=[9, 77])


async def test_even_entries_with_their_seal_are_taken(books):
    made = new_id(77)
    await run_all(
        books,
        insert_entry(books, books.first, 1, 30, made, 2),
        insert_entry(books, books.second, 2, 30, made, 1),
        insert_seal(books, made, 2),
    )
    assert await balances(books) == [9_970, 30]


@pytest.mark.parametrize(
    ("refusal", "make"),
    [
        ("(?i)foreign key", lambda b, t: [insert_entry(b, b.second, 2, 30, t, 1)]),
        (
            "entries_unbalanced",
            lambda b, t: [
                insert_entry(b, b.first, 1, 30, t, 2),
                insert_entry(b, b.second, 2, 31, t, 1),
                insert_seal(b, t, 2),
            ],
        ),
        (
            "entries_missing",
            lambda b, t: [insert_entry(b, b.second, 2, 30, t, 1), insert_seal(b, t, 1)],
        ),
        (
            "entries_missing",
            lambda b, t: [
                insert_entry(b, b.first, 1, 30, t, 2),
                insert_entry(b, b.second, 2, 30, t, 1),
                insert_seal(b, t, 3),
            ],
        ),
        ("entries_missing", lambda b, t: [insert_seal(b, t, 0)]),
        ("account_floor", lambda b, t: [insert_entry(b, b.second, 1, 1, t, 1)]),
        ("account_sequence_gap", lambda b, t: [insert_entry(b, b.second, 2, 1, t, 2)]),
        ("entry_amount", lambda b, t: [insert_entry(b, b.second, 2, 0, t, 1)]),
        ("entry_amount", lambda b, t: [insert_entry(b, b.second, 2, -1, t, 1)]),
        (
            "currency_mismatch",
            lambda b, t: [insert_entry(b, b.second, 2, 1, t, 1, currency_code="'USD'")],
        ),
        ("balance_overflow", lambda b, t: [insert_entry(b, b.first, 2, 2**63 - 1, t, 2)]),
        (
            "entry.transaction_id, entry.account_id|entry_account_once",
            lambda b, t: [
                insert_entry(b, b.second, 2, 1, t, 1),
                insert_entry(b, b.second, 2, 1, t, 2),
            ],
        ),
        ("account_missing", lambda b, t: [insert_entry(b, b.second, 2, 1, t, 1, tenant="'x'")]),
        ("account_missing", lambda b, t: [insert_entry(b, new_id(77), 2, 1, t, 1)]),
        ("append_only", lambda b, t: ["UPDATE entry SET minor_units = 1"]),
        ("append_only", lambda b, t: ["DELETE FROM entry"]),
        ("append_only", lambda b, t: ["UPDATE ledger_transaction SET description = 'x'"]),
        ("append_only", lambda b, t: ["DELETE FROM ledger_transaction"]),
        ("accounts_are_kept", lambda b, t: ["DELETE FROM account"]),
        ("balances_follow", lambda b, t: ["UPDATE account SET posted_credit = posted_credit + 1"]),
        ("balances_follow", lambda b, t: ["UPDATE account SET entry_count = entry_count + 1"]),
        ("account_is_fixed", lambda b, t: ["UPDATE account SET may_overdraw = NOT may_overdraw"]),
        ("account_is_fixed", lambda b, t: ["UPDATE account SET currency_code = 'USD'"]),
        (
            "transaction_sealed",
            lambda b, t: [
                insert_entry(b, b.first, 1, 30, t, 2),
                insert_entry(b, b.second, 2, 30, t, 1),
                insert_seal(b, t, 2),
                insert_entry(b, b.second, 2, 30, t, 2),
            ],
        ),
    ],
)
async def test_raw_sql_cannot_cook_the_books(books, refusal, make):
    with pytest.raises(Exception, match=refusal):
        await run_all(books, *make(books, new_id(77)))
    assert await balances(books) == [10_000, 0]
    assert await books.count("entry") == 2


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_half_a_cent_is_no_integer(books):
    # Postgres makes it one: the column's type rounds before any trigger sees it.
    with pytest.raises(Exception, match="not_an_integer"):
        await run_all(books, insert_entry(books, books.second, 2, 1.5, new_id(77), 1))


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE account SET posted_credit = 99 WHERE posted_credit > 0",
        "UPDATE entry SET minor_units = 99 WHERE side = 2",
        "DELETE FROM ledger_transaction",
    ],
)
async def test_a_ledger_that_does_not_add_up_is_not_served(books, clock, sql):
    store = SqlLedgerStore(books.shards, clock)
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
