import pytest

from edge.deadlines import asked_s, connect_timeout_of, timeout_of
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


@pytest.mark.parametrize(("header", "seconds"), [("2", 2), ("0.25", 0.25), ("0", 0)])
def test_plain_clients_ask_in_seconds(header, seconds):
    assert asked_s(header) == seconds


@pytest.mark.parametrize("header", ["", "-1", "1e3", "2s", "inf", " 2", ".5", "2.", "1, 2", "٢"])
def test_malformed_seconds_are_refused_by_the_header_s_name(header):
    with pytest.raises(HttpRefusal, match="X-Request-Timeout"):
        asked_s(header)
