"""How often, how soon and under which budget a call is made again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.rpc import retries
from shared.rpc.retries import RetryBudget, backoff_s, pushback_s

RESERVE = round(retries.BUDGET_PER_S * retries.BUDGET_SLICES * retries.BUDGET_SLICE_S)


def spent(budget: RetryBudget, now_s: float, tries: int = 1000) -> int:
    """How many retries of so many are allowed."""
    return sum(budget.spend(now_s) for _ in range(tries))


def test_without_calls_a_few_retries_are_allowed_and_come_back_with_time() -> None:
    budget = RetryBudget()
    assert spent(budget, 100.0) == RESERVE
    assert spent(budget, 105.0) == 0
    assert spent(budget, 111.0) == RESERVE


def test_a_fifth_of_the_calls_may_be_retries_for_as_long_as_they_are_recent() -> None:
    budget = RetryBudget()
    for _ in range(500):
        budget.note_call(100.0)
    assert spent(budget, 109.0) == RESERVE + 100
    for _ in range(500):
        budget.note_call(110.0)
    assert spent(budget, 130.0) == RESERVE


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 30), st.integers(0, 30))))
def test_in_no_ten_seconds_are_there_more_retries_than_a_fifth_and_the_reserve(
    steps: list[tuple[float, int, int]],
) -> None:
    budget, now_s = RetryBudget(), 0.0
    calls: list[int] = []  # the second of each
    retried: list[int] = []
    for pause_s, call_count, try_count in steps:
        now_s += pause_s
        for _ in range(call_count):
            budget.note_call(now_s)
            calls.append(int(now_s))
        new = spent(budget, now_s, try_count)
        retried += [int(now_s)] * new
        first = int(now_s) - retries.BUDGET_SLICES + 1
        recent = sum(second >= first for second in calls)
        share = retries.BUDGET_SHARE * recent
        assert not new or sum(second >= first for second in retried) <= RESERVE + share + 1e-6


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
