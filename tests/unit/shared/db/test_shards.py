import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.db.ids import BUCKET_COUNT
from shared.db.shards import BucketMap, CoverageBroken

counts = st.integers(1, 64)


@given(counts)
def test_an_even_map_gives_every_shard_its_share(count):
    bucket_map = BucketMap.even(count)
    shares = [len(bucket_map.buckets_of(index)) for index in range(count)]
    assert sum(shares) == BUCKET_COUNT
    assert max(shares) - min(shares) <= 1


@given(counts, st.integers(0, BUCKET_COUNT - 1), st.data())
def test_a_move_changes_one_bucket_and_the_version(count, bucket, data):
    before = BucketMap.even(count)
    target = data.draw(st.integers(0, count - 1))
    after = before.moved(bucket, target)
    assert (after.shard_index(bucket), after.version) == (target, before.version + 1)
    others = [n for n in range(BUCKET_COUNT) if n != bucket]
    assert [after.shard_index(n) for n in others] == [before.shard_index(n) for n in others]


@given(counts)
def test_what_the_shards_report_gives_the_map_back(count):
    bucket_map = BucketMap.even(count)
    owned = {index: bucket_map.buckets_of(index) for index in range(count)}
    assert BucketMap.of_owners(owned, version=1) == bucket_map


def test_a_bucket_owned_twice_or_never_is_named():
    everything = range(BUCKET_COUNT)
    with pytest.raises(CoverageBroken, match="bucket 7 is owned by shards 0 and 1"):
        BucketMap.of_owners({0: everything, 1: [7]}, version=1)
    with pytest.raises(CoverageBroken, match="bucket 9 is owned by no shard"):
        BucketMap.of_owners({0: [n for n in everything if n != 9]}, version=1)


def test_the_first_shard_may_own_all():
    assert set(BucketMap.first_owns_all().shard_indexes) == {0}
