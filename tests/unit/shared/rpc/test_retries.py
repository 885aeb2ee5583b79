"""How often, how soon and under which budget a call is made again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.rpc import retries
from shared.rpc.retries import RetryBudget, backoff_s, pushback_s


def test_half_a_budget_of_failures_ends_retries_and_successes_bring_them_back() -> None:
    budget = RetryBudget()
    for _ in range(49):
        budget.note_failure()
    assert budget.allows_retries
    budget.note_failure()
    assert not budget.allows_retries
    for _ in range(10):
        budget.note_success()
    assert budget.allows_retries


@given(st.lists(st.booleans(), max_size=2000))
def test_in_the_long_run_a_retry_costs_ten_successes(outcomes: list[bool]) -> None:
    budget, retried = RetryBudget(), 0
    for is_good in outcomes:
        if is_good:
            budget.note_success()
        else:
            budget.note_failure()
            retried += budget.allows_retries
    assert retried <= retries.BUDGET_MAX / 2 + sum(outcomes) * retries.BUDGET_PER_SUCCESS


def test_pauses_double_up_to_a_second_and_are_spread() -> None:
    for attempt, base_s in enumerate([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0], start=1):
        pauses_s = [backoff_s(attempt) for _ in range(50)]
        assert min(pauses_s) >= 0.8 * base_s
        assert max(pauses_s) <= 1.2 * base_s
        assert len(set(pauses_s)) > 1


@pytest.mark.parametrize(
    ("text", "pause_s"),
    [(b"0", 0), (b"1500", 1.5), (b"-1", -1), (b"", -1), (b"soon", -1), (b"1.5", -1),
     (b"9" * 99, -1), ("²".encode("latin-1"), -1)],
)  # fmt: skip
def test_a_server_may_say_when_or_forbid(text: bytes, pause_s: float) -> None:
    assert pushback_s({b"grpc-retry-pushback-ms": text}) == pause_s
    assert pushback_s({}) is None
