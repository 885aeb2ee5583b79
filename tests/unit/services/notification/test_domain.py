from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.notification.domain import (
    ATTEMPT_COUNT_MAX,
    CLAIM_LOST_TWICE,
    CONTACT_UNKNOWN,
    CONTACT_WAIT,
    NOBODY,
    RETRY_MAX_S,
    Credited,
    Delivery,
    DeliveryState,
    Outcome,
    PostedEntry,
    Reply,
    credited_users,
    item_id_of_name,
    item_name,
    retry_wait_s,
    user_id_of_name,
)
from shared.errors import InvalidRequest

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
ME = UUID("018f0000-0000-7abc-8000-000000000001")
ADA = "users/018f0000-0000-7abc-8000-00000000000a"
BOB = "users/018f0000-0000-7def-8000-00000000000b"
CASH = "serviceAccounts/018f0000-0000-7def-8000-00000000000c"


def queued() -> Delivery:
    return Delivery(
        delivery_id=ME,
        tenant="default",
        owner=ME,
        item_id=ME,
        state=DeliveryState.QUEUED,
        attempt_count=0,
        lost_claim_count=0,
        claim_holder=NOBODY,
        reason="",
        created_at=NOW,
        next_attempt_at=NOW,
        sent_at=None,
        version=1,
    )


def claimed(delivery: Delivery | None = None) -> Delivery:
    return (delivery or queued()).claim(ME, now=NOW, claim_s=60)


def test_a_claim_counts_the_attempt_before_anything_is_sent():
    delivery = claimed()
    assert delivery.state is DeliveryState.SENDING
    assert delivery.attempt_count == 1
    assert delivery.next_attempt_at == NOW + timedelta(seconds=60)


def test_an_accepted_message_is_sent_and_never_due_again():
    delivery = claimed().conclude(Outcome(Reply.ACCEPTED), now=NOW, jitter=0)
    assert (delivery.state, delivery.next_attempt_at) == (DeliveryState.SENT, None)
    assert delivery.sent_at == NOW


@pytest.mark.parametrize(
    ("reply", "state"), [(Reply.REFUSED, DeliveryState.FAILED), (Reply.LOST, DeliveryState.UNKNOWN)]
)
def test_a_refused_or_lost_message_is_not_sent_again(reply, state):
    delivery = claimed().conclude(Outcome(reply, "why"), now=NOW, jitter=0)
    assert (delivery.state, delivery.next_attempt_at, delivery.reason) == (state, None, "why")


def test_a_deferred_message_waits_longer_each_time():
    delivery, waits = queued(), []
    for _ in range(9):
        delivery = claimed(delivery).conclude(Outcome(Reply.DEFERRED, "busy"), now=NOW, jitter=0)
        assert delivery.next_attempt_at is not None
        waits.append((delivery.next_attempt_at - NOW).total_seconds())
    assert waits[:3] == [30, 60, 120]
    assert waits[-1] == RETRY_MAX_S


def test_a_message_that_is_deferred_for_ever_fails_in_the_end():
    delivery = replace(queued(), attempt_count=ATTEMPT_COUNT_MAX - 1)
    delivery = claimed(delivery).conclude(Outcome(Reply.DEFERRED, "busy"), now=NOW, jitter=0)
    assert (delivery.state, delivery.reason) == (DeliveryState.FAILED, "busy")


def test_a_claim_that_was_lost_once_is_repeated_and_lost_twice_is_unknown():
    once = claimed(claimed())
    assert (once.state, once.lost_claim_count) == (DeliveryState.SENDING, 1)
    twice = claimed(once)
    assert (twice.state, twice.reason) == (DeliveryState.UNKNOWN, CLAIM_LOST_TWICE)
    assert twice.attempt_count == 2


def test_an_orphaned_claim_is_due_at_once_and_still_in_doubt():
    delivery = claimed().orphaned(now=NOW)
    assert (delivery.state, delivery.next_attempt_at) == (DeliveryState.SENDING, NOW)


def test_an_unknown_address_is_waited_for_but_not_for_ever():
    waiting = queued().wait_for_contact(now=NOW)
    assert (waiting.state, waiting.reason) == (DeliveryState.QUEUED, CONTACT_UNKNOWN)
    assert waiting.attempt_count == 0
    ended = waiting.wait_for_contact(now=NOW + CONTACT_WAIT)
    assert (ended.state, ended.reason) == (DeliveryState.FAILED, CONTACT_UNKNOWN)


@given(st.integers(1, 10**6), st.floats(-1, 1))
def test_every_wait_is_positive_and_bounded(attempt_count, jitter):
    assert 24 <= retry_wait_s(attempt_count, jitter=jitter) <= 1.2 * RETRY_MAX_S


def test_an_item_name_is_read_back():
    assert item_id_of_name(item_name(ME)) == ME


@pytest.mark.parametrize(
    "name",
    [
        "",
        "inbox/items/",
        "inbox/items/x",
        str(ME),
        f"items/{ME}",
        f"inbox/items/{str(ME).upper()}",
        f"inbox/items/{{{ME}}}",
        f"inbox/items/{ME.hex}",
        f"inbox/items/inbox/items/{ME}",
        f"inbox/items/urn:uuid:{ME}",
    ],
)
def test_only_the_canonical_form_is_a_name(name):
    with pytest.raises(InvalidRequest) as caught:
        item_id_of_name(name)
    assert caught.value.violations[0].field == "name"


def test_a_service_account_is_no_user():
    assert user_id_of_name(CASH) is None


def credit(owner: str, minor_units: int, currency_code: str = "EUR") -> PostedEntry:
    return PostedEntry(owner, True, currency_code, minor_units)


def debit(owner: str, minor_units: int, currency_code: str = "EUR") -> PostedEntry:
    return PostedEntry(owner, False, currency_code, minor_units)


def test_whoever_receives_money_from_somebody_else_is_told_how_much():
    assert credited_users((debit(ADA, 5), credit(BOB, 5))) == [
        Credited(user_id_of_name(BOB), {"EUR": 5})
    ]


def test_several_credits_to_one_user_are_one_sum_per_currency():
    entries = (
        debit(CASH, 3),
        credit(BOB, 1),
        credit(BOB, 2),
        debit(CASH, 7, "JPY"),
        credit(BOB, 7, "JPY"),
    )
    assert credited_users(entries) == [Credited(user_id_of_name(BOB), {"EUR": 3, "JPY": 7})]


def test_nobody_is_told_of_his_own_money_nor_a_service_account_of_any():
    assert credited_users((debit(ADA, 5), credit(ADA, 5))) == []
    assert credited_users((debit(ADA, 5), credit(CASH, 5))) == []
