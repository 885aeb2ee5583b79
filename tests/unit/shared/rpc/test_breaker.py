"""When calls stop, and how they begin again."""

from hypothesis import given
from hypothesis import strategies as st

from shared.rpc.breaker import DEFAULT_LIMITS, FORGIVEN_AFTER, Breaker

LIMITS = DEFAULT_LIMITS


def fail(breaker: Breaker, *, since_s: float = 0.0, calls: int = LIMITS.in_a_row) -> float:
    """Calls that fail, one each 100 ms; when the last one did."""
    now_s = since_s
    for number in range(calls):
        now_s = since_s + number / 10
        breaker.note_failure(breaker.round, now_s)
    return now_s


def probe(breaker: Breaker, now_s: float) -> int:
    """Let the probe in; its round."""
    assert breaker.admits(now_s)
    return breaker.round


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker()
    fail(breaker, calls=LIMITS.in_a_row - 1)
    assert breaker.is_closed
    breaker.note_failure(breaker.round, 1.0)
    assert not breaker.is_closed
    assert not breaker.admits(1.0)
    assert 0 < breaker.wait_s(1.0) <= LIMITS.open_s


def test_a_success_between_them_keeps_it_closed() -> None:
    breaker = Breaker()
    for number in range(100):
        fail(breaker, since_s=float(10 * number), calls=LIMITS.in_a_row - 1)
        for _ in range(LIMITS.in_a_row):
            breaker.note_success(breaker.round)
    assert breaker.is_closed


def test_many_failures_at_one_moment_are_one_failure() -> None:
    breaker = Breaker()
    for _ in range(1000):
        breaker.note_failure(breaker.round, 5.0)
    assert breaker.is_closed


def test_a_large_share_of_failures_opens_it_although_some_calls_pass() -> None:
    breaker = Breaker()
    for number in range(LIMITS.calls_min + 1):
        assert breaker.is_closed
        if number % 5 == 4:
            breaker.note_success(0)
        else:
            breaker.note_failure(0, number / 50)
    assert not breaker.is_closed


def test_half_of_the_calls_failing_for_long_keeps_it_closed() -> None:
    breaker = Breaker()
    for number in range(10_000):
        breaker.note_success(breaker.round)
        breaker.note_failure(breaker.round, number / 1000)
    assert breaker.is_closed


def test_one_probe_at_a_time_and_its_success_closes_it() -> None:
    breaker = Breaker()
    now_s = fail(breaker) + LIMITS.open_s
    round_ = probe(breaker, now_s)
    assert not breaker.admits(now_s)
    breaker.note_success(round_)
    assert breaker.is_closed


def test_failed_probes_double_the_time_up_to_its_maximum() -> None:
    breaker = Breaker()
    now_s, waits_s = fail(breaker), []
    for _ in range(12):
        waits_s.append(breaker.wait_s(now_s))
        now_s += LIMITS.open_max_s
        breaker.note_failure(probe(breaker, now_s), now_s)
    assert waits_s[0] <= LIMITS.open_s
    assert waits_s[3] > 5 * waits_s[0]
    assert max(waits_s) <= LIMITS.open_max_s


def test_a_hurried_one_lets_its_probe_go_at_once_and_only_that() -> None:
    breaker = Breaker()
    now_s = fail(breaker)
    breaker.hurry()
    assert breaker.admits(now_s)
    assert not breaker.admits(now_s)


def test_a_probe_that_says_nothing_lets_another_go() -> None:
    breaker = Breaker()
    now_s = fail(breaker) + LIMITS.open_s
    breaker.note_nothing(probe(breaker, now_s))
    assert breaker.admits(now_s)


def test_what_began_before_it_opened_neither_closes_nor_opens_it() -> None:
    breaker = Breaker()
    before = breaker.round
    now_s = fail(breaker)
    breaker.note_success(before)
    assert not breaker.is_closed
    round_ = probe(breaker, now_s + LIMITS.open_s)
    breaker.note_failure(before, now_s + LIMITS.open_s)  # a late deadline
    breaker.note_success(round_)
    assert breaker.is_closed


def test_a_good_while_is_forgiving() -> None:
    breaker = Breaker()
    now_s = fail(breaker)
    for _ in range(5):
        now_s += LIMITS.open_max_s
        breaker.note_failure(probe(breaker, now_s), now_s)
    now_s += LIMITS.open_max_s
    breaker.note_success(probe(breaker, now_s))
    now_s = fail(breaker, since_s=now_s + 1 + FORGIVEN_AFTER * LIMITS.open_max_s)
    assert breaker.wait_s(now_s) <= LIMITS.open_s


def test_a_veto_keeps_it_closed_and_counting() -> None:
    is_allowed = False
    breaker = Breaker(may_open=lambda: is_allowed)
    now_s = fail(breaker, calls=50)
    assert breaker.is_closed
    is_allowed = True
    breaker.note_failure(breaker.round, now_s)
    assert not breaker.is_closed


@given(st.lists(st.tuples(st.floats(0, 2), st.sampled_from("asfnl")), max_size=300))
def test_whatever_happens_it_lets_calls_pass_again_in_time(steps: list[tuple[float, str]]) -> None:
    breaker, now_s, rounds = Breaker(), 0.0, [0]
    for pause_s, what in steps:
        now_s += pause_s
        if what == "a" and breaker.admits(now_s):
            rounds.append(breaker.round)
        elif what == "s":
            breaker.note_success(rounds[-1])
        elif what == "f":
            breaker.note_failure(rounds[-1], now_s)
        elif what == "l":  # a late one
            breaker.note_failure(rounds[0], now_s)
        elif what == "n":
            breaker.note_nothing(rounds[-1])
        assert 0 <= breaker.wait_s(now_s) <= LIMITS.open_max_s
        assert breaker.is_closed or breaker.round > 0
    if rounds[-1] == breaker.round:  # whoever was let in always tells
        breaker.note_nothing(rounds[-1])
    assert breaker.admits(now_s + LIMITS.open_max_s)
