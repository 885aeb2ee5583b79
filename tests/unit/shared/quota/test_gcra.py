"""GCRA arithmetic: shared/quota/gcra.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.quota.gcra import Quota, give_back, spend

NOW = 10**15
LONG_AGO = 0
API = Quota("api", burst_points=10, refill_s=0.5)


def test_a_full_bucket_lets_exactly_its_burst_pass_at_once():
    full_at, passed = LONG_AGO, 0
    for _ in range(15):
        decision = spend(API, full_at, now_us=NOW)
        full_at, passed = decision.full_at_us, passed + decision.is_allowed
    assert passed == 10


def test_a_refused_call_passes_after_the_wait_it_was_told():
    empty = spend(API, LONG_AGO, now_us=NOW, cost_points=10).full_at_us
    refused = spend(API, empty, now_us=NOW, cost_points=3)
    assert (refused.is_allowed, refused.full_at_us, refused.retry_after_s) == (False, empty, 1.5)
    assert spend(API, empty, now_us=NOW + 1_500_000, cost_points=3).is_allowed
    just_before = NOW + 1_499_999
    assert not spend(API, empty, now_us=just_before, cost_points=3).is_allowed


def test_looking_costs_nothing_and_says_what_is_left():
    spent = spend(API, LONG_AGO, now_us=NOW, cost_points=4)
    look = spend(API, spent.full_at_us, now_us=NOW, cost_points=0)
    assert (look.is_allowed, look.remaining_points, look.full_at_us) == (True, 6, spent.full_at_us)


@pytest.mark.parametrize("cost_points", [-1, 11])
def test_a_cost_out_of_range_is_a_bug_of_the_caller(cost_points):
    with pytest.raises(ValueError, match="cost_points"):
        spend(API, LONG_AGO, now_us=NOW, cost_points=cost_points)


def test_points_given_back_can_be_spent_again_but_never_exceed_the_burst():
    spent = spend(API, LONG_AGO, now_us=NOW, cost_points=10).full_at_us
    returned = give_back(API, spent, points=4)
    assert spend(API, returned, now_us=NOW, cost_points=0).remaining_points == 4
    overfull = give_back(API, spent, points=1000)
    assert spend(API, overfull, now_us=NOW, cost_points=0).remaining_points == 10


def test_a_share_divides_both_rate_and_burst_and_keeps_at_least_a_point():
    assert API.share(0.5) == Quota("api", 5, 1.0)
    assert API.share(0.01).burst_points == 1


@given(
    steps=st.lists(st.tuples(st.integers(0, 2_000_000), st.integers(0, 10)), max_size=60),
)
def test_no_rolling_window_ever_passes_more_than_burst_plus_refill(steps):
    now, full_at, passed = NOW, LONG_AGO, []
    for wait_us, cost_points in steps:
        now += wait_us
        decision = spend(API, full_at, now_us=now, cost_points=cost_points)
        full_at = decision.full_at_us
        if decision.is_allowed:
            passed.append((now, cost_points))
    for index, (start, _) in enumerate(passed):
        total = 0
        for moment, cost_points in passed[index:]:
            total += cost_points
            assert total <= 10 + (moment - start) / 500_000


@given(debt_us=st.integers(-(10**9), 10**7), cost_points=st.integers(0, 10))
def test_a_refusal_changes_nothing_and_an_allowed_call_moves_full_at_by_its_cost(
    debt_us, cost_points
):
    full_at = NOW + debt_us
    decision = spend(API, full_at, now_us=NOW, cost_points=cost_points)
    if decision.is_allowed:
        assert decision.full_at_us == max(full_at, NOW) + 500_000 * cost_points
    else:
        assert decision.full_at_us == full_at
        assert decision.retry_after_s > 0
