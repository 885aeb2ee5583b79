"""After every step of a move its mover is killed, or sleeps until it was replaced; see arena.py."""

from collections.abc import AsyncIterator, Iterator

import pytest

from shared.db.move.failpoints import FAILPOINTS
from tests.integration.shared.db.move.arena import ON_POSTGRES, Arena, fought_over, made_databases
from tests.integration.shared.db.move.grounds import Databases, Place

# The first that keeps writers out, the decision, and the one that leaves the bucket to nobody;
# `make chaos` tells of every step on Postgres.
STEPS = ("fence", "commit", "src_moved")


@pytest.fixture(scope="module")
def sqlite_arena(tmp_path_factory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("arena")
    with fought_over(Place(folder / "data"), folder) as arena:
        yield arena
    assert arena.left == []


@pytest.fixture(scope="module")
async def arena_databases(postgres_server) -> AsyncIterator[Databases]:
    async with made_databases(postgres_server) as databases:
        yield databases


@pytest.fixture(scope="module")
def postgres_arena(arena_databases, tmp_path_factory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("arena")
    with fought_over(arena_databases, folder, pace=ON_POSTGRES) as arena:
        yield arena
    assert arena.left == []


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_mover_that_ends_or_sleeps_after_any_step_leaves_nothing_that_stays(
    sqlite_arena, failpoint, how
):
    assert sqlite_arena.tell(failpoint, how) == []


# They have rows in their hands that will be old.
@pytest.mark.parametrize("failpoint", ["copy.read", "catch.read", "drain.read"])
def test_a_mover_that_wakes_up_in_the_midst_of_the_next_move_changes_nothing(
    sqlite_arena, failpoint
):
    assert sqlite_arena.tell(failpoint, "sleep") == []


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("failpoint", STEPS)
def test_and_so_on_postgres_at_the_steps_that_writers_wait_for(postgres_arena, failpoint, how):
    assert postgres_arena.tell(failpoint, how) == []
