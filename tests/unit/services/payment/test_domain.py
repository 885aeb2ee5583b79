import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.payment.currencies import EXPONENTS
from services.payment.domain import (
    INT64_MAX,
    BalanceOverflow,
    EntriesUnbalanced,
    NewEntry,
    Side,
    account_id_of_name,
    account_name,
    exponent_of,
    require_balanced,
)
from shared.db.ids import new_id
from shared.errors import InvalidRequest

amounts = st.integers(1, INT64_MAX) | st.integers(1, 1000)


def entry(side: Side, minor_units: int, code: str = "EUR", account_id=None) -> NewEntry:
    account_id = account_id or new_id(1)
    return NewEntry(account_id, side, code, minor_units, "account", "amount")


sides = st.sampled_from(Side)


@given(st.lists(st.tuples(sides, amounts, st.sampled_from(["EUR", "USD"])), max_size=8))
def test_entries_pass_only_if_each_currency_is_even(asked):
    entries = [entry(side, units, code) for side, units, code in asked]
    sums = {}
    for side, units, code in asked:
        sums.setdefault(code, [0, 0])[side - 1] += units
    is_even = len(asked) >= 2 and all(d == c <= INT64_MAX for d, c in sums.values())
    try:
        require_balanced(entries)
        has_passed = True
    except (InvalidRequest, EntriesUnbalanced, BalanceOverflow):
        has_passed = False
    assert has_passed == is_even


@pytest.mark.parametrize("minor_units", [0, -1, INT64_MAX + 1])
def test_an_amount_is_one_to_the_largest_int64(minor_units):
    with pytest.raises(InvalidRequest):
        require_balanced([entry(Side.DEBIT, minor_units), entry(Side.CREDIT, minor_units)])


def test_the_same_account_twice_is_refused_and_the_second_is_named():
    twice = new_id(1)
    entries = [entry(Side.DEBIT, 1, account_id=twice), entry(Side.CREDIT, 1, account_id=twice)]
    with pytest.raises(InvalidRequest, match="must not be named twice"):
        require_balanced(entries)


def test_a_name_gives_its_id_back():
    account_id = new_id(5)
    assert account_id_of_name(account_name(account_id), field="name") == account_id


@pytest.mark.parametrize(
    "name",
    [
        "accounts/",
        str(new_id(1)),
        f"accounts/{new_id(1)}/",
        f"accounts/{str(new_id(1)).upper()}",
        f"accounts/{new_id(1).hex}",
        "accounts/{" + str(new_id(1)) + "}",
        "accounts/00000000-0000-4000-8000-000000000000",
        f"transactions/{new_id(1)}",
        f"accounts/accounts/{new_id(1)}",
    ],
    ids=["none", "bare", "slash", "upper", "undashed", "braced", "v4", "transaction", "twice"],
)
def test_a_name_in_any_other_spelling_is_refused(name):
    with pytest.raises(InvalidRequest, match=r"^name: must be accounts/"):
        account_id_of_name(name, field="name")


@pytest.mark.parametrize(
    ("code", "exponent"), [("EUR", 2), ("JPY", 0), ("KWD", 3), ("CLF", 4), ("HUF", 2), ("ISK", 0)]
)
def test_a_currency_has_the_digits_that_iso_4217_gives_it(code, exponent):
    assert exponent_of(code, field="currency_code") == exponent


def test_the_table_of_currencies_is_whole():
    assert len(EXPONENTS) == sum(1 for code in EXPONENTS if len(code) == 3 and code.isupper())
    assert 160 <= len(EXPONENTS) <= 180
