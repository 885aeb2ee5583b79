"""What is read off a request before anything is done: edge/exchange.py, streams, deadlines."""

from types import SimpleNamespace

import pytest

from edge.deadlines import timeout_of
from edge.exchange import Exchange, address_block
from edge.http1_request import Http1Request
from edge.refusals import ClientLeft, HttpRefusal, NotAcceptable
from edge.streams import Ndjson, Sse, choose_framing, choose_media_type


def exchange_of(*headers: tuple[bytes, bytes], trusted_hops: int = 0) -> Exchange:
    return Exchange.of(request_with(*headers), trusted_hops=trusted_hops)


def request_with(*headers: tuple[bytes, bytes]) -> Http1Request:
    return Http1Request(SimpleNamespace(address="192.0.2.7"), "GET", b"/", list(headers))


@pytest.mark.parametrize(
    ("hops", "forwarded", "address"),
    [
        (0, b"203.0.113.9", "192.0.2.7"),
        (1, b"203.0.113.9", "203.0.113.9"),
        (1, b"6.6.6.6, 203.0.113.9", "203.0.113.9"),
        (2, b"6.6.6.6, 203.0.113.9, 10.0.0.1", "203.0.113.9"),
        (2, b"203.0.113.9", "192.0.2.7"),
        (1, b"", "192.0.2.7"),
    ],
)
def test_only_what_trusted_proxies_saw_counts_as_the_address(hops, forwarded, address):
    assert exchange_of((b"x-forwarded-for", forwarded), trusted_hops=hops).address == address


@pytest.mark.parametrize(
    ("address", "block"),
    [
        ("192.0.2.7", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.0/24"),
        ("nonsense", "unknown"),
        ("", "unknown"),
    ],
)
def test_an_address_belongs_to_the_block_of_one_subscriber(address, block):
    assert address_block(address) == block


def test_a_trace_context_is_kept_only_if_it_is_one():
    good = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert exchange_of((b"traceparent", good)).traceparent == good.decode()
    assert exchange_of((b"traceparent", good + b"; admin=1")).traceparent == ""


async def test_a_call_that_nobody_waits_for_any_more_is_not_begun():
    exchange = exchange_of()
    exchange.request.leave()
    with pytest.raises(ClientLeft):
        exchange.cancel_when_client_leaves()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("", 10.0), ("500m", 0.5), ("5S", 5.0), ("1H", 60.0), ("1u", 1e-6)],
)
def test_a_deadline_is_what_the_client_asks_for_up_to_the_contracts_cap(header, seconds):
    assert timeout_of(header, default_s=10, max_s=60) == pytest.approx(seconds)


@pytest.mark.parametrize("header", ["5", "S", "-1S", "123456789S", "5 S", "1.5S"])
def test_a_malformed_deadline_is_refused(header):
    with pytest.raises(HttpRefusal):
        timeout_of(header, default_s=10, max_s=60)


@pytest.mark.parametrize(
    ("accept", "framing"),
    [
        ("", Ndjson),
        ("*/*", Ndjson),
        ("text/event-stream", Sse),
        ("text/*", Sse),
        ("text/event-stream;q=0.5, application/x-ndjson;q=0.4", Sse),
        ("text/event-stream;q=0.5, */*;q=0.8", Ndjson),
        ("application/json", Ndjson),
    ],
)
def test_the_framing_is_what_accept_likes_best(accept, framing):
    assert isinstance(choose_framing(accept), framing)


@pytest.mark.parametrize("accept", ["image/png", "application/json;q=0", "*/*;q=x"])
def test_what_cannot_be_produced_is_not_acceptable(accept):
    with pytest.raises(NotAcceptable):
        choose_media_type(accept, ["application/json"])


def test_a_cursor_that_could_break_out_of_its_line_is_left_out():
    assert Sse().message("1\ndata: forged", b"{}") == b"data: {}\n\n"
    assert Sse().message("1", b"{}") == b"id: 1\ndata: {}\n\n"
