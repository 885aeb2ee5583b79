import time

import pytest

from shared import causal
from shared.causal import CLOCKS_APART_S, ENTRIES_MAX, LIFE_S, Position, Seen
from shared.errors import InvalidRequest


def position(lsn: int = 7, *, timeline: int = 1, at_s: float = 0.0) -> Position:
    """Of a moment that many seconds from now."""
    return Position(timeline, lsn, round(time.time() + at_s, 3))


def seen(**positions: Position) -> Seen:
    """After writes to these shards of "media" and "other": media_3=…"""
    result = Seen()
    for place, written in positions.items():
        result.note(place.replace("_", "."), written)
    return result


def test_a_token_brings_every_position_to_the_next_call():
    written = seen(media_3=position(0x16B3748), other_0=position(9))
    again = Seen.of_token(written.token())
    assert again.needed("media.3")[:2] == (1, 0x16B3748)
    assert again.needed("other.0")[:2] == (1, 9)
    assert not again.is_changed


@pytest.mark.parametrize("order", [1, -1], ids=["older first", "newer first"])
def test_of_two_positions_in_one_shard_the_newer_counts(order):
    tokens = [seen(media_3=position(5)).token(), seen(media_3=position(6)).token()]
    joined = ",".join(tokens[::order])
    assert Seen.of_token(joined).needed("media.3").lsn == 6


def test_a_position_on_a_newer_timeline_counts_more_than_any_on_an_older_one():
    joined = (
        seen(media_3=position(900)).token() + ", " + seen(media_3=position(5, timeline=2)).token()
    )
    assert Seen.of_token(joined).needed("media.3")[:2] == (2, 5)


def test_a_write_to_another_shard_of_the_service_is_judged_by_its_time():
    written = position(at_s=-1)
    token = seen(media_0=written).token()
    needed = Seen.of_token(token).needed("media.3")
    assert needed[:2] == (0, 0)
    assert needed.as_of_s == pytest.approx(written.at_s + CLOCKS_APART_S, abs=0.002)
    assert Seen.of_token(token).needed("other.3").as_of_s == 0


def test_what_every_replica_that_may_answer_has_is_forgotten():
    assert Seen.of_token(seen(media_3=position(at_s=-LIFE_S - 1)).token()).token() == ""


def test_a_position_from_the_future_lives_no_longer_than_one_of_now():
    learned = Seen.of_token(seen(media_3=position(at_s=10**6)).token())
    assert learned.positions["media.3"].at_s < time.time() + 2 * CLOCKS_APART_S


def test_a_token_stays_small_and_what_no_longer_fits_is_known_by_its_time():
    began_s = time.time()
    many = seen(**{f"media_{index}": position(9, at_s=-index) for index in range(30)})
    assert len(many.positions) == ENTRIES_MAX
    assert len(many.token()) < causal.CHARACTERS_MAX
    again = Seen.of_token(many.token())
    kept, folded = again.needed("media.0"), again.needed("media.29")
    assert kept.lsn == 9
    assert folded.lsn == 0
    assert folded.as_of_s > began_s - 1  # any shard: as new as the newest write


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "1.media.3.1.7",
        "1.media.3.1.7.19abc0.9",
        "1.MEDIA.3.1.7.19abc0",
        "1.media.300.1.7.19abc0",
        "1.media.3.1.7.19abc0,",
        "1.media.3.-1.7.19abc0",
        "1.media.3.1.fffffffffffffffff.19abc0",
        "0.media.3.1.7.19abc0",
        "1.media.٣.1.7.19abc0",
        "," * causal.CHARACTERS_MAX,
        "9." + "a" * causal.CHARACTERS_MAX,
    ],
)
def test_what_is_no_token_is_refused_by_name(token):
    with pytest.raises(InvalidRequest) as refused:
        Seen.of_token(token)
    assert [violation.field for violation in refused.value.violations] == [causal.KEY]


def test_a_token_of_another_release_is_left_aside_and_the_rest_is_read():
    joined = "2.something~else," + seen(media_3=position(6)).token()
    assert Seen.of_token(joined).needed("media.3").lsn == 6


def test_the_positions_of_a_call_that_was_made_go_on_to_the_caller():
    caller = Seen.of_token(seen(media_3=position(5)).token())
    caller.learn(seen(other_0=position(8)).token())
    assert caller.is_changed
    assert caller.positions.keys() == {"media.3", "other.0"}
