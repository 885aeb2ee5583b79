"""What must hold under too much load on any machine: the stories of `make chaos`, in seconds."""

import pytest

from tests.overload import Change, changes_under_load, greedy_caller, overload, slow_method


async def test_at_five_times_capacity_what_can_be_done_is_done_and_the_rest_is_refused():
    seen = await overload(measure_s=1, seconds=4, pause_s=1)
    assert seen.during.statuses.keys() == {200, 503}
    assert seen.goodput > 0.5
    refused = seen.during.with_status(503)
    assert all(b"\r\nretry-after: " in shot.head for shot in refused.shots)
    assert seen.after.statuses.keys() == {200}


async def test_a_method_that_hangs_is_refused_and_others_are_not():
    seen = await slow_method(seconds=3, takes_s=2, per_s=20)
    assert seen.beside.statuses.keys() == {200}
    assert seen.disturbing.statuses.keys() == {200, 503}


async def test_a_greedy_credential_is_refused_and_another_is_not():
    seen = await greedy_caller(seconds=2, slice_s=1)
    assert seen.beside.statuses.keys() == {200}
    assert seen.disturbing.statuses.keys() == {200, 429}


# `make chaos` makes all of them.
@pytest.mark.parametrize("change", [Change.HANGUP, Change.WORKERS, Change.KILL], ids=str)
async def test_no_request_that_can_be_repeated_fails_while(change: Change) -> None:
    seen = await changes_under_load(change, seconds=2, per_s=50)
    assert seen.shots.statuses.keys() == {200}
    assert seen.changes
