"""No order of events makes two owners, loses a write, or leaves a bucket that nobody settles."""

import pytest

from shared.db.move.protocol import CLOSED, State
from tests.unit.shared.db.move.model import Broken, Bugs, new_world, search, settle


@pytest.fixture(scope="module", params=[False, True], ids=["sound Control", "forgetful Control"])
def reachable(request):
    return search(new_world(2, may_forget=request.param))


def test_in_every_order_of_events_there_is_one_owner_with_every_acknowledged_write(reachable):
    assert len(reachable) > 9_000
    assert any(world.dst.state is State.ACTIVE for world in reachable)


@pytest.mark.parametrize("preference", ["abort", "go on"])
def test_from_every_reachable_state_a_lone_mover_settles_the_bucket(reachable, preference):
    alone = {world._replace(movers=()) for world in reachable}
    for world in alone:
        settled = settle(world, preference)
        owners = [side for side in (settled.src, settled.dst) if side.state is State.ACTIVE]
        assert len(owners) == 1, settled
        assert settled.control.phase in CLOSED, settled


@pytest.mark.parametrize(
    "bugs",
    [
        Bugs(has_no_token_check_at_dst=True),
        Bugs(has_no_drain=True),
        Bugs(has_no_copied_phase=True),
    ],
    ids=["no token check at dst", "no drain under the fence", "no durable COPIED"],
)
def test_the_search_finds_a_seeded_bug(bugs):
    with pytest.raises(Broken, match="B2"):
        search(new_world(2), bugs)


def test_a_bucket_that_left_the_source_by_an_earlier_move_is_not_revived():
    left = new_world(2, may_forget=True, src=State.MOVED, move=7)
    for world in search(left):
        assert State.ACTIVE not in {world.src.state, world.dst.state}
    with pytest.raises((Broken, AssertionError)):
        for world in search(left, Bugs(trusts_what_another_move_left=True)):
            assert State.ACTIVE not in {world.src.state, world.dst.state}
