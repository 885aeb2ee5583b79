import uuid
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.db.ids import (
    BUCKET_COUNT,
    IdMaker,
    bucket_of,
    hash_bucket,
    moment_ms_of,
    new_id,
    secret_bucket,
)

buckets = st.integers(0, BUCKET_COUNT - 1)
moments_ms = st.integers(0, 2**48 - 2**20)


@given(buckets)
def test_an_id_is_a_valid_uuid_of_version_7_and_carries_its_bucket(bucket):
    made = new_id(bucket)
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert bucket_of(made) == bucket
    assert uuid.UUID(str(made)) == made


@given(buckets, moments_ms)
def test_an_id_says_when_it_was_made(bucket, moment_ms):
    assert moment_ms_of(IdMaker(lambda: moment_ms).make(bucket)) == moment_ms


@given(buckets, st.lists(st.integers(-5, 5), min_size=2, max_size=60), moments_ms)
def test_ids_of_one_bucket_only_grow_even_if_the_clock_steps_back(bucket, steps_ms, start_ms):
    moments = iter([max(0, start_ms + sum(steps_ms[:at])) for at in range(len(steps_ms))])
    maker = IdMaker(lambda: next(moments))
    made = [maker.make(bucket) for _ in steps_ms]
    assert made == sorted(set(made))


def test_ids_stay_in_order_when_the_counter_of_a_millisecond_is_used_up():
    maker = IdMaker(lambda: 1_000, random_below=lambda limit: limit - 1)
    made = [maker.make(5) for _ in range((1 << 17) + 10)]
    assert all(before < after for before, after in pairwise(made))
    assert moment_ms_of(made[-1]) == 1_001
    assert {bucket_of(one) for one in made} == {5}


def test_a_hundred_thousand_ids_at_once_are_different():
    assert len({new_id(number % BUCKET_COUNT) for number in range(100_000)}) == 100_000


@pytest.mark.parametrize("bucket", [-1, BUCKET_COUNT])
def test_there_is_no_such_bucket(bucket):
    with pytest.raises(ValueError, match="not between"):
        new_id(bucket)


def test_natural_keys_keep_their_bucket_for_ever():
    # Rows on disk depend on these: a change here loses them.
    assert hash_bucket("default", "email", "ada@example.org") == 793
    assert secret_bucket(b"secret", "scope", "key") == 1336


@given(st.text(), st.text())
def test_parts_of_a_natural_key_are_kept_apart(left, right):
    assert 0 <= hash_bucket(left, right) < BUCKET_COUNT


def test_natural_keys_spread_over_the_buckets():
    counts = [0] * BUCKET_COUNT
    for number in range(BUCKET_COUNT * 20):
        counts[hash_bucket("default", "email", f"user{number}@example.org")] += 1
    assert min(counts) > 0
    assert max(counts) < 50
