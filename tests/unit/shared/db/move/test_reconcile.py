"""Whose a bucket is after a failover: what anybody tells with the newest epoch."""

import pytest

from shared.db.move.protocol import State
from shared.db.move.reconcile import Correction, Owner, Said, Verdict, verdict

BUCKET, OURS, OTHER = 7, 1, 0
ACTIVE, MOVING, FENCED = State.ACTIVE, State.MOVING, State.FENCED
MOVED, IMPORTING, ABORTED = State.MOVED, State.IMPORTING, State.ABORTED


def judged(ours: Said | None, other: Said | None, control: Owner, *, giver: int | None = None):
    said = {OURS: ours, OTHER: other}
    told = {shard: one for shard, one in said.items() if one is not None}
    return verdict(BUCKET, OURS, told, control, giver=giver)


@pytest.mark.parametrize(
    ("ours", "other", "control", "owner"),
    [
        (Said(ACTIVE, 1), None, Owner(1, OURS), Owner(1, OURS)),
        (None, Said(ACTIVE, 1), Owner(1, OTHER), Owner(1, OTHER)),
        (Said(MOVED, 2), Said(ACTIVE, 3), Owner(3, OTHER), Owner(3, OTHER)),
        (Said(ABORTED, 1), Said(ACTIVE, 3), Owner(1, OTHER), Owner(3, OTHER)),
        (Said(ACTIVE, 3), Said(MOVED, 2), Owner(1, OTHER), Owner(3, OURS)),
    ],
    ids=[
        "ours for ever",
        "never ours",
        "given away, and we know it",
        "another took it back",
        "ours, and Control has forgotten it",
    ],
)
def test_what_all_agree_on_is_left_alone(ours, other, control, owner):
    assert judged(ours, other, control) == Verdict(owner)


@pytest.mark.parametrize("state", [ACTIVE, MOVING, FENCED])
@pytest.mark.parametrize("other", [None, Said(ACTIVE, 3)], ids=["Control alone", "its owner"])
def test_a_bucket_that_was_given_away_is_not_claimed_again(state, other):
    away = Correction(OURS, BUCKET, MOVED, 2, peer=OTHER)
    assert judged(Said(state, 1), other, Owner(3, OTHER)) == Verdict(Owner(3, OTHER), (away,))


def test_an_owner_outweighs_a_control_that_has_forgotten_the_move():
    away = Correction(OURS, BUCKET, MOVED, 2, peer=OTHER)
    found = judged(Said(ACTIVE, 1), Said(ACTIVE, 3), Owner(1, OURS))
    assert found == Verdict(Owner(3, OTHER), (away,))


@pytest.mark.parametrize("ours", [Said(MOVING, 1), Said(FENCED, 1), Said(MOVED, 2)])
def test_the_lost_end_of_an_aborted_move_is_made_good(ours):
    again = Owner(ours.epoch + 2, OURS)
    taken = Correction(OURS, BUCKET, ACTIVE, again.epoch)
    assert judged(ours, Said(ABORTED, 0), Owner(1, OURS)) == Verdict(again, (taken,))


@pytest.mark.parametrize("ours", [None, Said(IMPORTING, 0)])
def test_who_has_lost_that_a_bucket_came_gives_it_back_to_who_keeps_its_rows(ours):
    back = Owner(4, OTHER)
    found = judged(ours, Said(MOVED, 2), Owner(3, OURS), giver=OTHER)
    dropped = Correction(OURS, BUCKET, ABORTED, 0)
    assert found == Verdict(
        back,
        (
            Correction(OTHER, BUCKET, ACTIVE, 4),
            dropped,
        ),
    )


@pytest.mark.parametrize(
    ("other", "giver"), [(Said(MOVED, 2), None), (None, OTHER)], ids=["collected", "not asked"]
)
def test_a_bucket_whose_rows_nobody_has_is_a_sentence_for_the_operator(other, giver):
    found = judged(Said(IMPORTING, 0), other, Owner(3, OURS), giver=giver)
    assert found.corrections == ()
    assert "restore it" in found.problem
