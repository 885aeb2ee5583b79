"""Plans of the balancer, whatever was measured."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.db.ids import BUCKET_COUNT
from shared.db.move.balance import TOLERANCE, Step, loads_of, plan, shares_of

FEW = settings(max_examples=25)
ALL = range(BUCKET_COUNT)
BUCKETS = st.integers(0, BUCKET_COUNT - 1)
MEASURES = st.dictionaries(BUCKETS, st.integers(0, 10**9), max_size=30)


@st.composite
def shards(draw):
    """Owners and weights: runs of buckets on 1 to 5 shards, some of which are empty."""
    count = draw(st.integers(1, 5))
    weights = {shard: draw(st.integers(1, 4)) for shard in range(count)}
    used = draw(st.integers(1, count))
    owners = {bucket: bucket * used // BUCKET_COUNT for bucket in ALL}
    return owners, weights


def moved(owners: dict[int, int], steps: list[Step]) -> dict[int, int]:
    return owners | {step.bucket: step.dst for step in steps}


@FEW
@given(shards(), MEASURES, MEASURES, st.integers(0, 5000))
def test_the_fullest_shard_is_never_fuller_afterwards_and_no_bucket_moves_twice(
    ground, sizes, busy, moves_max
):
    owners, weights = ground
    shares = shares_of(sizes, busy)
    steps = plan(shares, owners, weights, moves_max=moves_max)
    before, after = (loads_of(shares, one, weights) for one in (owners, moved(owners, steps)))
    assert max(after.values()) <= max(before.values()) + 1e-9
    assert len(steps) <= moves_max
    assert max(Counter(step.bucket for step in steps).values(), default=1) == 1
    assert all(owners[step.bucket] == step.src != step.dst for step in steps)


@FEW
@given(shards(), MEASURES)
def test_nothing_moves_when_no_shard_is_too_full(ground, sizes):
    owners, weights = ground
    shares = shares_of(sizes, {})
    owners = moved(owners, plan(shares, owners, weights))
    is_even = max(loads_of(shares, owners, weights).values()) <= 1 + TOLERANCE
    assert not is_even or plan(shares, owners, weights) == []


@FEW
@given(shards(), MEASURES)
def test_a_shard_of_weight_0_is_emptied(ground, sizes):
    owners, weights = ground
    weights = {**weights, 0: 0, 9: 1}
    owners = moved(owners, plan(shares_of(sizes, {}), owners, weights))
    assert 0 not in owners.values()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [({0: 1, 1: 1, 2: 1}, 1.0), ({0: 1, 1: 1, 2: 2}, 1.0)],
    ids=["alike", "one of twice the weight"],
)
def test_many_alike_buckets_are_spread_as_the_weights_say(weights, expected):
    sizes = dict.fromkeys(range(0, BUCKET_COUNT, 16), 1000)
    owners = {bucket: bucket % 2 for bucket in ALL}
    shares = shares_of(sizes, {})
    after = loads_of(shares, moved(owners, plan(shares, owners, weights)), weights)
    assert after == {shard: pytest.approx(expected, rel=TOLERANCE) for shard in weights}


def test_a_new_shard_of_an_empty_service_gets_its_part_of_the_buckets():
    owners = {bucket: bucket % 4 for bucket in ALL}
    steps = plan(shares_of({}, {}), owners, dict.fromkeys(range(5), 1))
    assert len(steps) == pytest.approx(BUCKET_COUNT / 5, rel=0.25)
    assert {step.dst for step in steps} == {4}


def test_the_largest_that_fits_moves_first():
    sizes = {0: 50, 1: 30, 2: 20}
    owners = dict.fromkeys(ALL, 0)
    steps = plan(shares_of(sizes, {}), owners, {0: 1, 1: 1})
    assert steps[0] == Step(0, 0, 1)


def test_bytes_and_statement_time_count_alike():
    shares = shares_of({0: 7}, {1: 70_000})
    assert shares[0] == shares[1] == pytest.approx(0.5)
    assert sum(shares) == pytest.approx(1)


def test_empty_buckets_stay_where_they_are_beside_full_ones():
    sizes = {0: 4, 1: 1}
    steps = plan(shares_of(sizes, {}), dict.fromkeys(ALL, 0), {0: 1, 1: 1})
    assert len(steps) == 1
    assert steps[0].bucket in sizes


def test_one_bucket_that_is_larger_than_a_shards_part_is_not_sent_to_and_fro():
    owners = {bucket: bucket % 2 for bucket in ALL}
    steps = plan(shares_of({0: 10**9}, {}), owners, {0: 1, 1: 1})
    assert 0 not in {step.bucket for step in steps}


def test_no_shard_at_all_may_have_no_weight():
    with pytest.raises(ValueError, match="every shard has weight 0"):
        plan(shares_of({}, {}), dict.fromkeys(ALL, 0), {0: 0})
