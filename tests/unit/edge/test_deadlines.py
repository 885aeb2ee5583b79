import pytest

from edge.deadlines import connect_timeout_of, timeout_of
from edge.refusals import HttpRefusal


@pytest.mark.parametrize(
    ("read", "header", "seconds"),
    [
        (timeout_of, "", 10),
        (timeout_of, "500m", 0.5),
        (timeout_of, "2S", 2),
        (timeout_of, "99999999H", 60),
        (connect_timeout_of, "", 10),
        (connect_timeout_of, "500", 0.5),
        (connect_timeout_of, "0", 0),
        (connect_timeout_of, "0000000500", 0.5),
        (connect_timeout_of, "9999999999", 60),
    ],
)
def test_a_client_may_ask_for_less_time_and_never_for_more_than_the_cap(read, header, seconds):
    assert read(header, default_s=10, max_s=60) == pytest.approx(seconds)


@pytest.mark.parametrize("read", [timeout_of, connect_timeout_of])
@pytest.mark.parametrize("header", ["soon", "-5", "1.5", " 5", "5h", "12345678901"])
def test_a_malformed_timeout_is_refused(read, header):
    with pytest.raises(HttpRefusal):
        read(header, default_s=10, max_s=60)


def test_a_default_beyond_the_cap_is_cut():
    assert timeout_of("", default_s=90, max_s=60) == 60
