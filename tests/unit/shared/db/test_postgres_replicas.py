import asyncio
import math

import pytest

from shared.db.postgres_replicas import LATENCY_HALF_LIFE_S, Latency, LogEnd, PrimaryLog


def test_a_replica_is_as_new_as_the_last_moment_at_which_the_log_was_no_further():
    log = PrimaryLog()
    for at_s, lsn in ((1.0, 10), (2.0, 20), (3.0, 20), (4.0, 30)):
        log.note(1, lsn, at_s)
    assert log.last_within_s(9) == -math.inf
    assert log.last_within_s(10) == 1.0
    assert log.last_within_s(29) == 3.0
    assert log.last_within_s(31) == 4.0


def test_an_idle_primary_makes_no_replica_look_old():
    log = PrimaryLog()
    for at_s in range(1000):
        log.note(1, 10, float(at_s))
    assert log.last_within_s(10) == 999.0


def test_a_promotion_begins_a_new_log_and_the_past_has_nothing_to_say():
    log = PrimaryLog()
    log.note(1, 100, 1.0)
    log.note(2, 50, 2.0)
    assert log.last_within_s(49) == -math.inf
    log.note(1, 40, 3.0)
    assert (log.timeline, log.last_within_s(60)) == (2, 2.0)


def test_a_hosts_time_to_answer_follows_its_last_answers():
    latency = Latency()
    assert latency.now(0.0) == 0.0
    for number in range(60):
        latency.note(0.1, number / 1000)
    assert latency.now(0.06) == pytest.approx(0.1, rel=0.05)
    latency.note(0.2, 0.06)
    assert 0.11 < latency.now(0.06) < 0.13


def test_a_host_that_nobody_asks_any_more_is_soon_as_good_as_new():
    latency = Latency()
    latency.note(10.0, 0.0)
    before = latency.now(0.0)
    assert latency.now(LATENCY_HALF_LIFE_S) == pytest.approx(before / 2)
    assert latency.now(20 * LATENCY_HALF_LIFE_S) < 0.001


class Asked:
    """A connection whose log grows with each question."""

    def __init__(self) -> None:
        self.count = 0

    async def fetch(self, sql, arguments, *, timeout_s):
        self.count += 1
        lsn = self.count
        await asyncio.sleep(0)
        return [{"timeline": 1, "lsn": lsn}]


async def test_one_question_serves_all_who_have_committed_before_it_was_asked():
    asked, log_end = Asked(), LogEnd()
    first, *others = await asyncio.gather(*(log_end.after_commit(asked) for _ in range(20)))
    # Whoever commits while a question is under way needs the next one's answer.
    assert first.lsn == 1
    assert {position.lsn for position in others} == {2}
    assert asked.count == 2
