"""One HTTP/2 connection, driven with bytes: what it sends, takes, refuses and survives."""

import asyncio
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rpc import frames, http2
from shared.rpc.call import (
    MESSAGE_BYTES_MAX,
    BadAnswer,
    ConnectionLost,
    DeadlinePassed,
    NoRoom,
    NotProcessed,
    StreamReset,
)
from shared.rpc.header_block import field
from tests.unit.shared.rpc.wire import (
    BLOCK,
    END,
    INITIAL,
    OK,
    PATH,
    SETTINGS,
    Frame,
    Peer,
    Recorded,
    answer,
    connected,
    data,
    headers,
    message,
    split,
    trailers,
)


def window(stream_id: int, increment: int) -> bytes:
    return frames.window_update(stream_id, increment)


def ping(payload: bytes = b"12345678", flags: int = 0) -> bytes:
    return frames.frame(frames.PING, flags, 0, payload)


def limit(**values: int) -> bytes:
    """SETTINGS by name: calls, window, frame, push."""
    keys = {
        "calls": frames.SETTINGS_MAX_CONCURRENT_STREAMS,
        "window": frames.SETTINGS_INITIAL_WINDOW_SIZE,
        "frame": frames.SETTINGS_MAX_FRAME_SIZE,
        "push": frames.SETTINGS_ENABLE_PUSH,
    }
    return frames.settings(*((keys[name], value) for name, value in values.items()))


# Opening


async def test_it_greets_with_the_preface_its_settings_and_a_large_window() -> None:
    peer = Peer()
    await asyncio.sleep(0)
    assert peer.wire.written.startswith(frames.PREFACE)
    assert peer.wire.writes == 1
    told, grown = await peer.sent()
    assert dict(frames.SETTING.iter_unpack(told.payload)) == {
        frames.SETTINGS_HEADER_TABLE_SIZE: 0,
        frames.SETTINGS_ENABLE_PUSH: 0,
        frames.SETTINGS_INITIAL_WINDOW_SIZE: http2.CALL_WINDOW,
        frames.SETTINGS_MAX_HEADER_LIST_SIZE: 16 * 1024,
    }
    assert grown == Frame(*next(split(window(0, http2.CONNECTION_WINDOW - 65_535))))


async def test_it_is_usable_once_the_server_has_said_its_settings() -> None:
    peer = Peer()
    assert not peer.connection.has_capacity
    await peer.sent()
    peer.send(limit(calls=5))
    assert peer.connection.has_capacity
    assert peer.connection.calls_max == 5
    assert await peer.sent() == [Frame(frames.SETTINGS, frames.ACK, 0, b"")]
    await peer.connection.has_begun


@pytest.mark.parametrize(
    "first",
    [ping(), window(0, 1), frames.frame(frames.SETTINGS, frames.ACK, 0), answer(1),
     b"HTTP/1.1 400 Bad Request\r\n\r\n", frames.frame(0xFE, 0, 0)],
    ids=["ping", "window", "acknowledgement", "answer", "HTTP/1", "unknown"],
)  # fmt: skip
async def test_a_server_that_begins_with_anything_else_is_left(first: bytes) -> None:
    peer = Peer()
    peer.send(first)
    assert peer.wire.fate == "closed"
    with pytest.raises(ConnectionLost):
        await peer.connection.has_begun


# Requests


async def test_a_request_is_headers_and_one_message_in_one_write() -> None:
    peer = await connected()
    before = peer.wire.writes
    peer.start(b"request")
    head, body = await peer.sent()
    assert peer.wire.writes == before + 1
    assert (head.kind, head.flags, head.stream_id) == (frames.HEADERS, frames.END_HEADERS, 1)
    assert peer.read_headers(head.payload)[":path"] == PATH
    assert body == Frame(frames.DATA, frames.END_STREAM, 1, message(b"request"))


async def test_requests_of_one_turn_share_a_write_and_count_up() -> None:
    peer = await connected()
    before = peer.wire.writes
    for _ in range(3):
        peer.start()
    assert [frame.stream_id for frame in await peer.sent()] == [1, 1, 3, 3, 5, 5]
    assert peer.wire.writes == before + 1


async def test_the_first_headers_say_that_no_table_is_kept() -> None:
    peer = await connected(frames.settings((frames.SETTINGS_HEADER_TABLE_SIZE, 0)))
    peer._requests.header_table_size = 4096
    peer._requests.max_allowed_table_size = 0  # it refuses who does not say so
    for _ in range(2):
        peer.start()
    for head in (await peer.sent())[::2]:
        assert peer.read_headers(head.payload)[":path"] == PATH


async def test_headers_longer_than_a_frame_are_continued() -> None:
    peer = await connected()
    long = field(b"x-long", b"y" * 40_000)
    peer.start(block=BLOCK + long)
    *blocks, body = await peer.sent()
    assert [frame.kind for frame in blocks] == [frames.HEADERS, *[frames.CONTINUATION] * 2]
    assert [frame.flags for frame in blocks] == [0, 0, frames.END_HEADERS]
    read = peer.read_headers(b"".join(frame.payload for frame in blocks))
    assert read["x-long"] == "y" * 40_000
    assert body.flags == frames.END_STREAM


@pytest.mark.parametrize("size", [0, 1, 16_378, 16_379, 16_380, 65_529, 65_530, 65_531, 200_000])
async def test_messages_around_every_limit_arrive_whole(size: int) -> None:
    peer = await connected(limit(window=2**20) + window(0, 2**20))
    body = bytes(range(256)) * (size // 256 + 1)
    peer.start(body[:size])
    parts = [frame for frame in await peer.sent() if frame.kind == frames.DATA]
    assert b"".join(part.payload for part in parts) == message(body[:size])
    assert max(len(part.payload) for part in parts) <= 16_384
    assert [part.flags for part in parts] == [0] * (len(parts) - 1) + [frames.END_STREAM]


async def test_after_the_last_stream_id_the_connection_takes_no_more_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames, "STREAM_ID_MAX", 3)
    peer = await connected()
    first, second = peer.start(), peer.start()
    assert not peer.connection.is_usable
    peer.send(answer(1), answer(3))
    assert (first.heard, second.heard) == ([b"answer"], [b"answer"])
    assert peer.wire.fate == "closed"


# Sending within windows


async def test_a_large_request_waits_for_both_windows() -> None:
    peer = await connected(limit(window=10))
    call = peer.start(b"x" * 95)  # 100 bytes with its head
    assert (await peer.sent())[-1].payload == message(b"x" * 95)[:10]
    peer.send(window(1, 70))
    assert len((await peer.sent())[-1].payload) == 70
    peer.send(limit(window=1000))
    assert (await peer.sent())[0] == Frame(frames.DATA, frames.END_STREAM, 1, b"x" * 20)
    peer.send(answer(1))
    assert call.heard == [b"answer"]


async def test_a_window_may_shrink_below_nothing_and_grow_again() -> None:
    peer = await connected(limit(window=50))
    peer.start(b"x" * 95)
    assert len((await peer.sent())[-1].payload) == 50
    peer.send(limit(window=10), window(1, 40))  # -40, then 0
    assert [frame.kind for frame in await peer.sent()] == [frames.SETTINGS]
    peer.send(window(1, 50))
    assert len((await peer.sent())[-1].payload) == 50


async def test_the_window_of_the_connection_is_shared_in_the_order_of_the_calls() -> None:
    peer = await connected(limit(window=2**20))
    peer.start(b"a" * 65_000)
    peer.start(b"b" * 1_000)
    peer.start(b"c" * 1_000)
    assert sum(len(f.payload) for f in await peer.sent() if f.kind == frames.DATA) == 65_535
    peer.send(window(0, 480))
    assert [(f.stream_id, len(f.payload)) for f in await peer.sent()] == [(3, 475), (5, 5)]
    peer.send(window(0, 2000))
    assert [(f.stream_id, f.flags) for f in await peer.sent()] == [(5, 1)]


async def test_two_small_requests_share_what_is_left_of_the_connection_s_window() -> None:
    peer = await connected(limit(window=2**20))
    peer.start(b"x" * (65_535 - 5 - 20))  # 20 bytes are left
    first, second = peer.start(b"a" * 10), peer.start(b"b" * 10)
    parts = [(f.stream_id, len(f.payload), f.flags) for f in (await peer.sent())[-4:]]
    assert parts[1::2] == [(3, 15, frames.END_STREAM), (5, 5, 0)]
    peer.send(window(0, 4))
    peer.send(window(0, 6))
    assert [(f.payload, f.flags) for f in await peer.sent()] == [
        (b"bbbb", 0), (b"bbbbbb", frames.END_STREAM),
    ]  # fmt: skip
    peer.send(answer(3), answer(5))
    assert first.heard == second.heard == [b"answer"]


async def test_larger_frames_are_used_where_the_server_takes_them() -> None:
    peer = await connected(limit(window=2**20, frame=2**20) + window(0, 2**20))
    peer.start(b"x" * 200_000)
    sizes = [len(frame.payload) for frame in await peer.sent() if frame.kind == frames.DATA]
    assert max(sizes) == http2.SENT_FRAME_BYTES_MAX


async def test_a_full_transport_pauses_large_requests_and_not_the_small_ones_after() -> None:
    peer = await connected(limit(window=2**20) + window(0, 2**20))
    peer.connection.pause_writing()
    peer.start(b"x" * 100_000)
    peer.start(b"y")
    assert {frame.kind for frame in await peer.sent()} == {frames.HEADERS}
    peer.connection.resume_writing()
    sent = await peer.sent()
    assert [frame.stream_id for frame in sent if frame.flags & frames.END_STREAM] == [1, 3]
    assert sum(len(frame.payload) for frame in sent) == 100_005 + 6


steps = st.one_of(
    st.tuples(st.just("connection"), st.integers(1, 300)),
    st.tuples(st.just("call"), st.integers(1, 300)),
    st.tuples(st.just("initial"), st.integers(0, 300)),
)


@given(st.integers(0, 2000), st.integers(0, 300), st.lists(steps, max_size=30))
@settings(max_examples=60, deadline=None)
async def test_no_window_is_ever_exceeded_and_all_that_may_be_sent_is(
    size: int, initial: int, changes: list[tuple[str, int]]
) -> None:
    peer = await connected(limit(window=initial))
    peer.connection._send_window = connection_left = 200  # a tiny one; RFC 9113 begins at 65,535
    call_left, received = initial, b""
    peer.start(bytes(size))
    for what, value in [("none", 0), *changes]:
        if what == "connection":
            connection_left += value
            peer.send(window(0, value))
        elif what == "call":
            call_left += value
            peer.send(window(1, value))
        elif what == "initial":
            call_left, initial = call_left + value - initial, value
            peer.send(limit(window=value))
        for frame in await peer.sent():
            if frame.kind == frames.DATA:
                received += frame.payload
                connection_left -= len(frame.payload)
                call_left -= len(frame.payload)
                assert min(connection_left, call_left) >= 0
    assert message(bytes(size)).startswith(received)
    is_stuck = min(connection_left, call_left) <= 0
    assert is_stuck or received == message(bytes(size))


# Answers

PLAIN = answer(1)
PADDED = (
    frames.frame(
        frames.HEADERS,
        frames.END_HEADERS | frames.PADDED | frames.HAS_PRIORITY,
        1,
        b"\x03" + b"\0\0\0\0\x10" + INITIAL + b"pad",
    )
    + frames.frame(frames.DATA, frames.PADDED, 1, b"\x04" + message(b"answer") + b"\0\0\0\0")
    + frames.frame(frames.HEADERS, END | frames.PADDED, 1, b"\x00" + OK)
)
CONTINUED = (
    headers(1, INITIAL[:1], 0)
    + frames.frame(frames.CONTINUATION, 0, 1, INITIAL[1:5])
    + frames.frame(frames.CONTINUATION, 0, 1)
    + frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, INITIAL[5:])
    + data(1, message(b"answer"))
    + headers(1, OK[:3], frames.END_STREAM)
    + frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, OK[3:])
)
IN_PARTS = (
    headers(1)
    + b"".join(data(1, message(b"answer")[at : at + 1]) for at in range(11))
    + data(1, b"")
    + trailers(1)
)
AMONG_OTHERS = (
    headers(1, b"\x08\x03103")  # early hints
    + frames.frame(frames.PRIORITY, 0, 1, b"\0\0\0\0\x10")
    + headers(1)
    + ping()
    + frames.frame(0xFE, 0xFF, 1, b"unknown")
    + window(1, 5)
    + limit(window=100)
    + frames.frame(frames.SETTINGS, frames.ACK, 0)
    + data(1, message(b"answer"), flags=0x20)  # an undefined flag
    + trailers(1)
)
FORMS = {
    "plain": PLAIN,
    "padded": PADDED,
    "continued": CONTINUED,
    "in parts": IN_PARTS,
    "among others": AMONG_OTHERS,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
async def test_every_form_of_an_answer_is_the_same_answer_wherever_it_is_cut(form: bytes) -> None:
    for cut in range(len(form)):
        peer = await connected()
        call = peer.start()
        peer.send(form[:cut])
        peer.send(form[cut:])
        assert call.heard == [b"answer"]
        assert call.ending == (
            {b":status": b"200", b"content-type": b"application/grpc"},
            {b"grpc-status": b"0"},
        )
        assert (peer.connection.calls_in_flight, peer.wire.fate) == (0, "open")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
async def test_an_answer_may_come_byte_by_byte(form: bytes) -> None:
    peer = await connected()
    call = peer.start()
    for byte in form:
        peer.send(bytes((byte,)))
    assert call.heard == [b"answer"]
    assert isinstance(call.ending, tuple)


async def test_answers_may_come_in_any_order() -> None:
    peer = await connected()
    calls = [peer.start() for _ in range(3)]
    peer.send(headers(5), headers(1), answer(3, b"3"), data(5, message(b"5")), trailers(5))
    peer.send(data(1, message(b"1")), trailers(1))
    assert [call.heard for call in calls] == [[b"1"], [b"3"], [b"5"]]


async def test_trailers_alone_are_an_answer() -> None:
    peer = await connected()
    call = peer.start()
    peer.send(headers(1, INITIAL + field(b"grpc-status", b"5"), END))
    initial, trailing = call.ending
    assert initial is trailing
    assert trailing[b"grpc-status"] == b"5"


async def test_a_stream_may_bring_many_messages() -> None:
    peer = await connected()
    call = peer.start(messages_max=99)
    peer.send(headers(1), data(1, message(b"a") + message(b"") + message(b"b")[:3]))
    peer.send(data(1, message(b"b")[3:] + message(b"c")))
    assert (call.heard, call.endings) == ([b"a", b"", b"b", b"c"], [])


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 65_536, 10 * 1024 * 1024])
async def test_an_answer_of_any_size_comes_whole_and_gives_its_windows_back(size: int) -> None:
    peer = await connected()
    call = peer.start()
    body = bytes(range(256)) * (size // 256 + 1)
    peer.send(answer(1, body[:size]))
    assert call.heard == [body[:size]]
    grown = {f.stream_id: f.payload for f in await peer.sent() if f.kind == frames.WINDOW_UPDATE}
    assert set(grown) == ({1} if size > http2.CALL_WINDOW // 2 else set())


async def test_the_connection_s_window_is_given_back_for_calls_that_are_gone_too() -> None:
    peer = await connected()
    peer.connection.cancel(peer.start())
    body = data(1, bytes(1024 * 1024))
    for _ in range(33):
        peer.send(body)
    [grown] = [f for f in await peer.sent() if f.kind == frames.WINDOW_UPDATE]
    assert grown.stream_id == 0
    assert int.from_bytes(grown.payload, "big") > http2.CONNECTION_WINDOW // 2


async def test_an_answer_to_half_a_request_stops_the_rest() -> None:
    peer = await connected(limit(window=10))
    call = peer.start(bytes(100))
    await peer.sent()
    peer.send(headers(1, INITIAL + field(b"grpc-status", b"8"), END), window(1, 1000))
    assert isinstance(call.ending, tuple)
    assert [frame.kind for frame in await peer.sent()] == [frames.RST_STREAM]


@pytest.mark.parametrize(
    ("status", "content_type"),
    [(b"503", b"application/grpc"), (b"404", b"text/html"), (b"200", b"text/html")],
    ids=["503", "404", "200 of another type"],
)
async def test_what_is_no_answer_of_grpc_ends_with_its_headers(
    status: bytes, content_type: bytes
) -> None:
    peer = await connected()
    call = peer.start()
    block = b"\x08" + bytes((len(status),)) + status + field(b"content-type", content_type)
    peer.send(headers(1, block), data(1, b"<html>"), data(1, b"", frames.END_STREAM))
    assert call.heard == []
    assert call.ending[0][b":status"] == status
    assert await peer.codes() == [(frames.RST_STREAM, frames.CANCEL)]


BAD_ANSWERS = {
    "compressed": headers(1) + data(1, b"\1\0\0\0\1x"),
    "compressed and cut": headers(1) + data(1, b"\1\0\0\0\x09x"),
    "no message": headers(1) + data(1, b"<html>"),
    "too long": headers(1) + data(1, b"\0" + (MESSAGE_BYTES_MAX + 1).to_bytes(4, "big")),
    "two messages": headers(1) + data(1, message(b"a")) + data(1, message(b"b")),
    "two in one": headers(1) + data(1, message(b"a") + message(b"b")),
    "more than it says": headers(1) + data(1, b"\0\0\0\0\1ab") + trailers(1),
    "less than it says": headers(1) + data(1, b"\0\0\0\0\3ab") + trailers(1),
    "no trailers": headers(1) + data(1, message(b"a"), frames.END_STREAM),
    "no headers": data(1, message(b"a")),
    "headers twice": headers(1) + headers(1),
    "trailers that are headers": headers(1) + trailers(1, INITIAL),
    "trailers that do not end": headers(1) + headers(1, OK),
    "only trailers without status": trailers(1),
    "1xx at the end": headers(1, b"\x08\x03103", END),
    "headers too long": headers(1, INITIAL + field(b"x", b"y" * 4050) * 4),
    "trailers too long": headers(1) + trailers(1, field(b"x", b"") * 1000),
}


@pytest.mark.parametrize("bad", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
async def test_a_bad_answer_fails_its_call_and_no_other(bad: bytes) -> None:
    peer = await connected()
    call, other = peer.start(), peer.start()
    await peer.sent()
    peer.send(bad)
    assert isinstance(call.failure, BadAnswer)
    assert {kind for kind, _ in await peer.codes()} <= {frames.RST_STREAM}
    peer.send(answer(3))
    assert (other.heard, len(other.endings)) == ([b"answer"], 1)
    assert peer.wire.fate == "open"


async def test_a_bad_answer_is_reset_unless_it_was_the_last_frame() -> None:
    peer = await connected()
    peer.start(), peer.start()
    await peer.sent()
    peer.send(BAD_ANSWERS["headers twice"])
    assert await peer.codes() == [(frames.RST_STREAM, frames.PROTOCOL_ERROR)]
    peer.send(headers(3), data(3, message(b"a"), frames.END_STREAM))
    assert await peer.codes() == []


async def test_a_failure_within_a_message_is_the_server_s_own() -> None:
    peer = await connected()
    call = peer.start()
    peer.send(headers(1), data(1, b"\0\0\0\0\3a"), trailers(1, field(b"grpc-status", b"14")))
    assert call.ending[1] == {b"grpc-status": b"14"}


async def test_partial_answers_of_all_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "PARTIAL_BYTES_MAX", 100_000)
    peer = await connected()
    calls = [peer.start() for _ in range(8)]
    part = (1_000_000).to_bytes(5, "big") + bytes(16_000)
    for call in calls:
        peer.send(headers(call.stream_id), data(call.stream_id, part))
    assert [type(call.endings[0]) for call in calls if call.endings] == [NoRoom, NoRoom]
    for call in calls[:6]:
        peer.connection.cancel(call)
    assert peer.connection._partial_bytes == 0
    last = peer.start()
    peer.send(answer(last.stream_id, bytes(90_000)))
    assert last.heard == [bytes(90_000)]


# Endings


@pytest.mark.parametrize(
    ("code", "failure"),
    [(frames.REFUSED_STREAM, NotProcessed), (frames.CANCEL, StreamReset),
     (frames.NO_ERROR, StreamReset), (frames.ENHANCE_YOUR_CALM, StreamReset), (99, StreamReset)],
)  # fmt: skip
async def test_a_reset_ends_the_call_with_its_code(code: int, failure: type[Exception]) -> None:
    peer = await connected()
    call, other = peer.start(), peer.start()
    peer.send(frames.reset(1, code))
    assert type(call.failure) is failure
    if isinstance(call.failure, StreamReset):
        assert call.failure.code == code
    peer.send(frames.reset(1, code), answer(1), answer(3))  # late frames of an ended call
    assert (len(call.endings), other.heard) == (1, [b"answer"])


async def test_a_stream_refused_after_its_headers_was_processed() -> None:
    peer = await connected()
    call = peer.start()
    peer.send(headers(1), frames.reset(1, frames.REFUSED_STREAM))
    assert isinstance(call.failure, StreamReset)


async def test_a_cancel_at_the_deadline_is_the_deadline() -> None:
    peer = await connected()
    call = peer.start(deadline_s=time.monotonic() + 0.001)
    peer.send(frames.reset(1, frames.CANCEL))
    assert isinstance(call.failure, DeadlinePassed)


async def test_deadlines_are_met_each_in_its_time() -> None:
    peer = await connected()
    now_s = time.monotonic()
    late, soon, never = [
        peer.start(deadline_s=deadline_s) for deadline_s in (now_s + 0.06, now_s + 0.02, now_s + 99)
    ]
    async with asyncio.timeout(5):
        while not soon.endings:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert (late.endings, time.monotonic() >= now_s + 0.02) == ([], True)
        while not late.endings:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert time.monotonic() >= now_s + 0.06
    assert isinstance(soon.failure, DeadlinePassed)
    assert isinstance(late.failure, DeadlinePassed)
    assert never.endings == []
    assert await peer.codes() == [(frames.RST_STREAM, frames.CANCEL)] * 2


async def test_a_cancelled_call_hears_nothing_more_and_the_server_is_told() -> None:
    peer = await connected()
    call, other = peer.start(), peer.start()
    await peer.sent()
    peer.connection.cancel(call)
    peer.connection.cancel(call)
    assert await peer.codes() == [(frames.RST_STREAM, frames.CANCEL)]
    peer.send(answer(1), answer(3))
    assert (call.heard, call.endings, other.heard) == ([], [], [b"answer"])


async def test_goaway_ends_the_calls_above_its_id_and_those_below_go_on() -> None:
    peer = await connected()
    calls = [peer.start() for _ in range(4)]
    peer.send(frames.goaway(frames.NO_ERROR, last_id=2**31 - 1))
    assert [call.endings for call in calls] == [[]] * 4
    assert (peer.connection.has_capacity, peer.changes) == (False, 1)
    peer.send(frames.goaway(frames.NO_ERROR, last_id=3))
    assert [type(call.failure) for call in calls[2:]] == [NotProcessed] * 2
    peer.send(answer(1))
    assert peer.wire.fate == "open"
    peer.send(answer(3))
    assert [call.heard for call in calls[:2]] == [[b"answer"]] * 2
    assert (peer.wire.fate, peer.changes) == ("closed", 1)


async def test_goaway_without_calls_closes_at_once() -> None:
    peer = await connected()
    peer.send(frames.goaway(frames.ENHANCE_YOUR_CALM, debug=b"too_many_pings"))
    assert (peer.wire.fate, peer.connection.was_pinged_too_often) == ("closed", True)
    assert peer.connection.ending == "the server asked for it with code 11 too_many_pings"


async def test_drained_it_takes_no_calls_and_closes_after_the_last() -> None:
    peer = await connected()
    call, other = peer.start(), peer.start()
    peer.connection.drain()
    assert (peer.connection.has_capacity, peer.wire.fate) == (False, "open")
    peer.send(answer(1))
    peer.connection.cancel(other)
    assert (call.heard, peer.wire.fate) == ([b"answer"], "closed")


@pytest.mark.parametrize("how", ["lost", "ended", "closed"])
async def test_when_the_connection_ends_calls_fail_once(how: str) -> None:
    peer = await connected()
    calls = [peer.start(), peer.start(bytes(100_000))]
    await peer.sent()
    if how == "lost":
        peer.connection.connection_lost(OSError("broken"))
    elif how == "ended":
        peer.connection.eof_received()
    else:
        peer.connection.close()
    peer.connection.connection_lost(None)
    assert [type(call.failure) for call in calls] == [ConnectionLost] * 2
    assert (peer.connection.is_closed, peer.changes) == (True, 1)


@pytest.mark.parametrize("how", ["lost", "closed", "closing"])
async def test_calls_that_were_never_written_may_be_made_again(how: str) -> None:
    peer = await connected()
    written = peer.start()
    await peer.sent()
    unwritten = peer.start()
    if how == "closing":
        peer.wire.close()  # the socket is gone, and nobody has been told yet
    elif how == "closed":
        peer.connection.close()
    assert written.endings == ([] if how != "closed" else [written.failure])
    if how != "lost":
        assert frames.HEADERS not in {frame.kind for frame in await peer.sent()}
    peer.connection.connection_lost(None)
    assert isinstance(written.failure, ConnectionLost)
    assert isinstance(unwritten.failure, NotProcessed)


# Pings


async def test_a_ping_is_answered_and_an_answer_is_not() -> None:
    peer = await connected()
    peer.send(ping(b"abcdefgh"), ping(flags=frames.ACK))
    assert await peer.sent() == [Frame(frames.PING, frames.ACK, 0, b"abcdefgh")]


async def test_a_silent_server_is_pinged_and_left_if_it_stays_silent() -> None:
    peer = await connected(keepalive_s=0.02, ping_timeout_s=0.02)
    call = peer.start()
    async with asyncio.timeout(5):
        while not call.endings:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert isinstance(call.failure, ConnectionLost)
    assert frames.PING in {frame.kind for frame in await peer.sent()}
    assert "pings" in peer.connection.ending


async def test_a_server_that_answers_pings_is_kept() -> None:
    peer = await connected(keepalive_s=0.01, ping_timeout_s=0.2)
    pings = 0
    async with asyncio.timeout(5):
        while pings < 2:
            await asyncio.sleep(0.005)
            for frame in await peer.sent():
                if frame.kind == frames.PING:
                    peer.send(ping(frame.payload, frames.ACK))
                    pings += 1
    assert peer.wire.fate == "open"
    peer.connection.close()


# What a server may not do

BLOCK_OF_NOTHING = headers(1, b"", 0)
VIOLATIONS = {
    "frame too long": (b"\x00\x40\x01\0\0\0\0\0\1", frames.FRAME_SIZE_ERROR),
    "data on 0": (data(0, b"x"), frames.PROTOCOL_ERROR),
    "headers on 0": (headers(0), frames.PROTOCOL_ERROR),
    "reset on 0": (frames.reset(0, 8), frames.PROTOCOL_ERROR),
    "settings on 1": (frames.frame(frames.SETTINGS, 0, 1), frames.PROTOCOL_ERROR),
    "ping on 1": (frames.frame(frames.PING, 0, 1, bytes(8)), frames.PROTOCOL_ERROR),
    "goaway on 1": (frames.frame(frames.GOAWAY, 0, 1, bytes(8)), frames.PROTOCOL_ERROR),
    "data of no call": (data(3, b"x"), frames.PROTOCOL_ERROR),
    "headers of no call": (headers(3), frames.PROTOCOL_ERROR),
    "headers of a server's stream": (headers(2), frames.PROTOCOL_ERROR),
    "reset of no call": (frames.reset(3, 8), frames.PROTOCOL_ERROR),
    "window of no call": (window(3, 1), frames.PROTOCOL_ERROR),
    "push": (frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(5)), frames.PROTOCOL_ERROR),
    "continuation of nothing": (
        frames.frame(frames.CONTINUATION, 4, 1),
        frames.PROTOCOL_ERROR,
    ),
    "continuation of another": (
        BLOCK_OF_NOTHING + frames.frame(frames.CONTINUATION, 4, 3),
        frames.PROTOCOL_ERROR,
    ),
    "block interrupted": (BLOCK_OF_NOTHING + ping(), frames.PROTOCOL_ERROR),
    "block interrupted by the unknown": (
        BLOCK_OF_NOTHING + frames.frame(0xFE, 0, 0),
        frames.PROTOCOL_ERROR,
    ),
    "endless continuation": (
        BLOCK_OF_NOTHING + frames.frame(frames.CONTINUATION, 0, 1) * 16,
        frames.ENHANCE_YOUR_CALM,
    ),
    "long continuation": (
        BLOCK_OF_NOTHING + frames.frame(frames.CONTINUATION, 0, 1, bytes(16_384)) * 5,
        frames.ENHANCE_YOUR_CALM,
    ),
    "bad block": (headers(1, b"\x80"), frames.COMPRESSION_ERROR),
    "a table": (headers(1, b"\x3f\xe1\x1f"), frames.COMPRESSION_ERROR),
    "padding without length": (
        frames.frame(frames.DATA, frames.PADDED, 1),
        frames.FRAME_SIZE_ERROR,
    ),
    "padding longer than data": (
        frames.frame(frames.DATA, frames.PADDED, 1, b"\x02x"),
        frames.PROTOCOL_ERROR,
    ),
    "padding longer than headers": (
        frames.frame(frames.HEADERS, 0x2C, 1, b"\x01\0\0\0\0\0"),
        frames.PROTOCOL_ERROR,
    ),
    "short reset": (frames.frame(frames.RST_STREAM, 0, 1, b"\0"), frames.FRAME_SIZE_ERROR),
    "short window": (frames.frame(frames.WINDOW_UPDATE, 0, 0, b"\0"), frames.FRAME_SIZE_ERROR),
    "short ping": (ping(b"1234567"), frames.FRAME_SIZE_ERROR),
    "long ping": (ping(b"123456789"), frames.FRAME_SIZE_ERROR),
    "short goaway": (frames.frame(frames.GOAWAY, 0, 0, bytes(7)), frames.FRAME_SIZE_ERROR),
    "odd settings": (frames.frame(frames.SETTINGS, 0, 0, bytes(5)), frames.FRAME_SIZE_ERROR),
    "settings in an acknowledgement": (
        frames.frame(frames.SETTINGS, frames.ACK, 0, bytes(6)),
        frames.FRAME_SIZE_ERROR,
    ),
    "push switched on": (limit(push=1), frames.PROTOCOL_ERROR),
    "tiny frames": (limit(frame=16_383), frames.PROTOCOL_ERROR),
    "huge frames": (limit(frame=2**24), frames.PROTOCOL_ERROR),
    "huge window": (limit(window=2**31), frames.FLOW_CONTROL_ERROR),
    "window of nothing": (window(0, 0), frames.PROTOCOL_ERROR),
    "window overflows": (window(0, 2**31 - 1), frames.FLOW_CONTROL_ERROR),
}


@pytest.mark.parametrize(("violation", "code"), VIOLATIONS.values(), ids=VIOLATIONS)
async def test_a_violation_ends_the_connection_and_says_why(violation: bytes, code: int) -> None:
    peer = await connected()
    call = peer.start()
    await peer.sent()
    peer.send(violation)
    assert await peer.codes() == [(frames.GOAWAY, code)]
    assert (peer.wire.fate, type(call.failure)) == ("closed", ConnectionLost)
    assert not peer.connection.has_capacity
    peer.send(answer(1))  # nothing is taken any more
    assert len(call.endings) == 1


async def test_headers_begun_for_one_call_cannot_go_on_for_another() -> None:
    peer = await connected()
    first, second = peer.start(), peer.start()
    await peer.sent()
    peer.send(headers(1, b"", 0), frames.frame(frames.CONTINUATION, frames.END_HEADERS, 3, INITIAL))
    assert await peer.codes() == [(frames.GOAWAY, frames.PROTOCOL_ERROR)]
    assert type(first.failure) is type(second.failure) is ConnectionLost


@pytest.mark.parametrize(
    "change",
    [window(3, 2**31 - 1), window(3, 1) + limit(window=2**31 - 1)],
    ids=["by its update", "by the settings"],
)
async def test_the_window_of_a_call_cannot_overflow(change: bytes) -> None:
    peer = await connected()
    peer.start(bytes(70_000)), peer.start(bytes(70_000))  # the second finds no window left
    await peer.sent()
    peer.send(change)
    assert await peer.codes() == [(frames.GOAWAY, frames.FLOW_CONTROL_ERROR)]


async def test_more_places_are_told_and_fewer_hold_new_calls_back() -> None:
    peer = await connected(limit(calls=1))
    call = peer.start()
    assert not peer.connection.has_capacity
    peer.send(limit(calls=2))
    assert (peer.connection.has_capacity, peer.changes) == (True, 1)
    peer.send(limit(calls=0))
    assert not peer.connection.has_capacity
    peer.send(answer(1))
    assert (call.heard, peer.connection.has_capacity, peer.changes) == ([b"answer"], False, 1)


@pytest.mark.parametrize("asked", [ping(), SETTINGS], ids=["ping", "settings"])
async def test_a_server_that_asks_without_end_is_left(
    asked: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "REPLIES_MAX", 100)
    peer = await connected()
    peer.send(asked * 99)
    assert (len(await peer.sent()), peer.wire.fate) == (99, "open")
    peer.send(asked)
    assert await peer.codes() == [(frames.GOAWAY, frames.ENHANCE_YOUR_CALM)]


async def test_a_server_that_asks_now_and_then_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "REPLIES_MAX", 100)
    peer = await connected()
    for _ in range(3):
        peer.send(ping() * 90)
        peer.connection._ping_if_silent()  # as its timer does
    assert peer.wire.fate == "open"


async def test_calls_that_nobody_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "UNREAD_BYTES_MAX", 20_000)
    peer = await connected()
    peer.connection.pause_writing()
    peer.wire.unread_bytes = 100_000
    written = 0
    while peer.wire.fate == "open":
        peer.connection.cancel(peer.start())
        await asyncio.sleep(0)
        written = len(peer.wire.written)
        assert written <= http2.UNREAD_BYTES_MAX
    assert (peer.wire.fate, written > 10_000) == ("aborted", True)


async def test_closing_waits_for_the_socket_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http2, "FAREWELL_S", 0.01)
    peer = await connected()
    peer.connection.close()
    waiting = asyncio.create_task(peer.connection.wait_closed())
    async with asyncio.timeout(5):
        while peer.wire.fate != "aborted":  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        peer.connection.connection_lost(None)
        await waiting


# Anything at all

kinds = st.integers(0, 12)
some_frame = st.builds(
    frames.frame,
    kinds,
    st.one_of(st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D]), st.integers(0, 255)),
    st.sampled_from([0, 1, 3, 5, 7, 2, 2**31 - 1]),
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([INITIAL, OK, message(b"a"), bytes(4), bytes(8), b"\0\0\0\x08"]),
    ),
)
good = st.sampled_from(
    [answer(1), answer(3), headers(1), data(1, message(b"x")), trailers(1), ping(), limit(calls=2),
     window(0, 10), window(5, 10), limit(window=3), frames.reset(5, 7), frames.goaway(0, 3)]
)  # fmt: skip
streams = st.lists(st.one_of(good, some_frame, st.binary(max_size=30)), max_size=12).map(b"".join)


def started(peer: Peer) -> list[Recorded]:
    return [peer.start(), peer.start(), peer.start(bytes(70_000))]


async def assert_ends_once(peer: Peer, calls: list[Recorded]) -> None:
    await peer.sent()
    assert peer.connection.calls_in_flight == sum(not call.endings for call in calls)
    peer.connection.connection_lost(None)
    assert [len(call.endings) for call in calls] == [1] * len(calls)


@given(streams, st.lists(st.integers(0, 400), max_size=5))
@settings(max_examples=400, deadline=None)
async def test_whatever_comes_and_however_it_is_cut_every_call_ends_once(
    stream: bytes, cuts: list[int]
) -> None:
    peer = await connected()
    calls = started(peer)
    await peer.sent()
    at = 0
    for cut in [*sorted(cuts), len(stream)]:
        peer.send(stream[at:cut])
        at = max(at, cut)
    await assert_ends_once(peer, calls)


@given(streams)
@settings(max_examples=100, deadline=None)
async def test_whatever_comes_first_nothing_is_raised(stream: bytes) -> None:
    peer = Peer()
    peer.send(stream)
    await asyncio.sleep(0)
    if peer.connection.has_capacity:
        peer.start()
    peer.connection.connection_lost(None)
    assert peer.connection.calls_in_flight == 0


def changed(position: int, byte: int) -> Callable[[bytes], bytes]:
    return lambda stream: stream[:position] + bytes((byte,)) + stream[position + 1 :]


@given(st.sampled_from(list(FORMS.values())), st.integers(0, 250), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
async def test_one_wrong_byte_ends_at_most_the_connection(
    form: bytes, position: int, byte: int
) -> None:
    peer = await connected()
    calls = started(peer)
    await peer.sent()
    peer.send(changed(position % len(form), byte)(form))
    await assert_ends_once(peer, calls)


def test_the_settings_of_these_tests_are_those_of_a_server() -> None:
    assert list(split(SETTINGS)) == [Frame(frames.SETTINGS, 0, 0, b"")]
