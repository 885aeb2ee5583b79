import math

from shared.db.postgres_replicas import PrimaryLog


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
