"""Statement time by bucket, as a process counts it."""

import pytest

from shared.db.load import HALF_LIFE_S, LoadMeter, faded, tell
from tests.fakes import ManualClock


def test_time_is_counted_by_bucket_and_told_once():
    meter = LoadMeter()
    meter.add((3,), 0.5)
    meter.add((3, 4095), 1.0)
    assert meter.take() == {3: 1_000_000, 4095: 500_000}
    assert meter.take() == {}


@pytest.mark.parametrize(
    ("age_s", "left"), [(0, 8.0), (HALF_LIFE_S, 4.0), (3 * HALF_LIFE_S, 1.0), (-60, 8.0)]
)
def test_what_was_counted_an_hour_ago_counts_half(age_s, left):
    assert faded(8.0, int(age_s * 1e6)) == pytest.approx(left)


async def test_a_process_that_did_nothing_tells_nothing():
    class Book:
        async def add_busy(self, busy_us, now_us):
            raise AssertionError

    await tell(LoadMeter(), Book(), ManualClock())
