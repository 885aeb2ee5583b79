from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.reporting import domain
from services.reporting.domain import (
    Addition,
    DailySum,
    DayInterval,
    IntervalInvalid,
    OwnerMalformedError,
    PostedEntry,
    Watermark,
)
from shared.errors import InvalidRequest

TODAY = date(2026, 11, 23)
ANN, BOB = UUID(int=1), UUID(int=2)


def entry(owner: UUID, side: str, units: int, currency: str = "EUR") -> PostedEntry:
    return PostedEntry(f"users/{owner}", side == "debit", currency, units)


@pytest.mark.parametrize(
    ("first", "last", "field"),
    [
        pytest.param("2026-11-23", "2026-11-22", "last_day", id="reversed"),
        pytest.param("2025-11-22", "2026-11-23", "last_day", id="367 days"),
        pytest.param("2026-11-23", "2026-11-24", "last_day", id="tomorrow"),
        pytest.param("2026-02-30", "2026-03-01", "first_day", id="no such day"),
        pytest.param("2026-01-01", "2026-13-01", "last_day", id="no such month"),
        pytest.param("1999-12-31", "2000-01-01", "first_day", id="before anything"),
        pytest.param("1926-01-01", "2026-01-01", "last_day", id="a hundred years"),
        pytest.param("0000-01-01", "2026-01-01", "first_day", id="year 0"),
    ],
)
def test_an_interval_that_cannot_be_is_refused_by_the_name_of_its_field(first, last, field):
    with pytest.raises(IntervalInvalid) as refusal:
        DayInterval.parse(first, last, today=TODAY)
    assert [violation.field for violation in refusal.value.violations] == [field]
    assert refusal.value.error_reason == "INTERVAL_INVALID"


def test_a_leap_year_and_a_single_day_are_intervals():
    year = DayInterval.parse("2025-11-23", "2026-11-23", today=TODAY)
    assert (year.last - year.first).days == 365
    assert DayInterval.parse("2026-11-23", "2026-11-23", today=TODAY).first == TODAY


def test_waiting_for_the_future_is_refused():
    now = datetime(2026, 11, 23, tzinfo=UTC)
    domain.check_min_event_time(now + timedelta(seconds=59), now=now)
    with pytest.raises(IntervalInvalid):
        domain.check_min_event_time(now + timedelta(seconds=61), now=now)


def test_a_transfer_is_debited_credited_and_counted_once():
    additions = domain.additions_of_transaction(
        [entry(ANN, "debit", 500), entry(BOB, "credit", 500)], TODAY
    )
    assert additions == [
        Addition(ANN, TODAY, "ledger.debits", "EUR", 500),
        Addition(BOB, TODAY, "ledger.credits", "EUR", 500),
        Addition(ANN, TODAY, "ledger.transactions", "", 1),
    ]


entries = st.builds(
    entry,
    owner=st.sampled_from([ANN, BOB]),
    side=st.sampled_from(["debit", "credit"]),
    units=st.integers(1, 2**62),
    currency=st.sampled_from(["EUR", "JPY"]),
)


@given(st.lists(entries, max_size=8))
def test_what_is_added_equals_the_entries_per_side_and_currency(posted):
    additions = domain.additions_of_transaction(posted, TODAY)
    for is_debit, metric in ((True, "ledger.debits"), (False, "ledger.credits")):
        for currency in ("EUR", "JPY"):
            booked = sum(
                one.minor_units
                for one in posted
                if one.is_debit is is_debit and one.currency_code == currency
            )
            added = sum(
                one.value
                for one in additions
                if (one.metric, one.currency_code) == (metric, currency)
            )
            assert added == booked
    counted = sum(one.value for one in additions if one.metric == "ledger.transactions")
    assert counted == any(one.is_debit for one in posted)


@pytest.mark.parametrize("name", ["", "users/", "users/x", f"accounts/{ANN}", str(ANN)])
def test_an_owner_that_is_none_is_not_guessed(name):
    with pytest.raises(OwnerMalformedError):
        domain.owner_of_name(name)


def test_users_and_service_accounts_own():
    assert domain.owner_of_name(f"users/{ANN}") == ANN
    assert domain.owner_of_name(f"serviceAccounts/{BOB}") == BOB


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_a_sum_beyond_int64_is_left_out_and_said_so_never_wrapped(values):
    parts = [DailySum("2026-11-23", "ledger.debits", "EUR", value) for value in values]
    small = DailySum("2026-11-23", "ledger.transactions", "", 1)
    added = domain.sums_of_parts([*parts, small])
    total = sum(values)
    assert added.is_complete is (total < 2**63)
    assert small in added.sums
    assert [one.value for one in added.sums if one.currency_code] == [total] * added.is_complete


def test_a_watermark_is_reached_by_an_event_of_that_time():
    moment = datetime(2026, 11, 23, tzinfo=UTC)
    assert Watermark(moment, 1, False).has_reached(moment)
    assert not Watermark(moment, 1, False).has_reached(moment + timedelta(microseconds=1))
    assert not Watermark(None, 0, False).has_reached(moment)
    assert Watermark(None, 0, False).has_reached(None)


@pytest.mark.parametrize(
    "name", ["", "reportRuns/", "reportRuns/x", f"reportRuns/{{{ANN}}}", f"videos/{ANN}", str(ANN)]
)
def test_a_name_of_something_else_is_refused(name):
    with pytest.raises(InvalidRequest):
        domain.run_id_of_name(name)
