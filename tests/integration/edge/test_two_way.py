"""Two-way streams: NDJSON up, NDJSON or SSE down, at once over one HTTP/1.1 request."""

import asyncio
import json

import pytest

from tests.integration.edge.test_streams import events, eventually

CHAT = "/v1/rooms/den:chat"
NDJSON = "Content-Type: application/x-ndjson"
SSE = "Accept: text/event-stream"


def replies(text: str) -> list[str]:
    return [json.loads(line)["text"] for line in text.splitlines()]


async def test_each_message_is_answered_while_the_request_goes_on(foreign_edge, talk):
    duplex = await talk(foreign_edge, CHAT)
    await duplex.send_json({"text": "a"})
    assert await duplex.read_head() == 200
    assert duplex.headers["content-type"] == "application/x-ndjson; charset=utf-8"
    assert (await duplex.read_json())["text"] == "A"
    for word in ("b", "c"):
        await duplex.send_json({"text": word})
        assert (await duplex.read_json())["text"] == word.upper()
    await duplex.end()
    assert await duplex.read_body() == b""


async def test_events_come_down_too(foreign_edge, talk):
    duplex = await talk(foreign_edge, CHAT, NDJSON, SSE)
    await duplex.send_json({"text": "a"}, {"text": "b"})
    await duplex.end()
    assert await duplex.read_head() == 200
    _retry, *messages, end = events((await duplex.read_body()).decode())
    assert [json.loads(message["data"])["text"] for message in messages] == ["A", "B"]
    assert end == {"event": "end", "data": "{}"}


async def test_a_client_that_sends_everything_first_gets_everything_after(foreign_edge):
    body = b"".join(b'{"text":"a%d"}\n' % number for number in range(100))
    headers = {"content-type": "application/x-ndjson"}
    answer = await foreign_edge.client.post(CHAT, content=body, headers=headers)
    assert replies(answer.text) == [f"A{number}" for number in range(100)]


async def test_a_broken_line_after_the_first_answer_is_the_last_thing_in_the_stream(
    foreign_edge, talk
):
    duplex = await talk(foreign_edge, CHAT)
    await duplex.send_json({"text": "a"})
    assert await duplex.read_head() == 200
    await duplex.read_json()
    await duplex.send(b'{"number":"many"}\n')
    problem = (await duplex.read_json())["error"]
    assert (problem["status"], problem["details"]["line"]) == (400, "2")
    assert problem["violations"][0]["field"] == "number"
    assert await duplex.read_chunk() == b""


async def test_a_broken_first_line_has_its_own_status(foreign_edge, talk):
    duplex = await talk(foreign_edge, CHAT, NDJSON, SSE)
    await duplex.send(b"nonsense\n")
    assert await duplex.read_head() == 400
    assert duplex.headers["content-type"] == "application/problem+json"


async def test_a_failure_half_way_ends_the_stream_with_the_same_problem(foreign_edge, talk):
    duplex = await talk(foreign_edge, CHAT, NDJSON, SSE)
    await duplex.send_json({"text": "a"}, {"text": "fail"})
    assert await duplex.read_head() == 200
    last = events((await duplex.read_body()).decode())[-1]
    assert last["event"] == "error"
    assert json.loads(last["data"])["detail"] == "The room is closed."
    assert duplex.headers["connection"] == "close"


async def test_the_service_may_end_first(foreign_edge, talk):
    duplex = await talk(foreign_edge, CHAT)
    await duplex.send_json({"text": "a"}, {"text": "stop"})
    assert await duplex.read_head() == 200
    assert replies((await duplex.read_body()).decode()) == ["A"]


async def test_a_client_that_leaves_cancels_the_call(foreign_edge, talk):
    duplex = await talk(foreign_edge, CHAT)
    await duplex.send_json({"text": "a"})
    await duplex.read_head()
    foreign_edge.stranger.gate.clear()
    await duplex.send_json({"text": "b"})
    await eventually(lambda: len(foreign_edge.stranger.received) == 2)
    await duplex.leave()
    await asyncio.wait_for(foreign_edge.stranger.was_cancelled.wait(), 5)
    await eventually(lambda: foreign_edge.stranger.open_calls == 0)


async def test_heartbeats_go_on_while_nobody_speaks(start_foreign_edge, talk):
    async with start_foreign_edge(heartbeat_s=0.1) as edge:
        edge.stranger.reset()
        duplex = await talk(edge, CHAT)
        await duplex.send_json({"text": "a"})
        await duplex.read_head()
        await duplex.read_json()
        assert [await duplex.read_chunk() for _ in range(2)] == [b"\n", b"\n"]
        await duplex.send(b"\n")  # the client's own
        await duplex.send_json({"text": "b"})
        while (chunk := await duplex.read_chunk()) == b"\n":
            pass
        assert json.loads(chunk)["text"] == "B"
        await duplex.leave()


async def test_a_stopping_edge_ends_both_ways(start_foreign_edge, talk):
    async with start_foreign_edge() as edge:
        edge.stranger.reset()
        duplex = await talk(edge, CHAT)
        await duplex.send_json({"text": "a"})
        await duplex.read_head()
        await duplex.read_json()
    assert (await duplex.read_json())["error"]["code"] == "UNAVAILABLE"


async def test_bytes_go_both_ways_as_they_are(foreign_edge, talk):
    duplex = await talk(foreign_edge, "/v1/files:pipe", "Content-Type: application/x-test")
    await duplex.send(b"\x00\n1")
    assert await duplex.read_head() == 200
    assert duplex.headers["content-type"] == "application/x-test"
    assert await duplex.read_chunk() == b"1\n\x00"
    await duplex.send(b"\xff2")
    assert await duplex.read_chunk() == b"2\xff"
    await duplex.end()
    assert await duplex.read_chunk() == b""


@pytest.mark.parametrize(
    ("header", "status"),
    [("Accept: image/png", 406), ("Content-Encoding: gzip", 415), ("Content-Type: a/b", 415)],
)
async def test_what_cannot_be_read_or_written_is_refused_before_the_call(
    foreign_edge, talk, header, status
):
    lines = [header] if header.startswith("Content-Type") else [NDJSON, header]
    duplex = await talk(foreign_edge, CHAT, *lines)
    await duplex.send_json({"text": "a"})
    assert await duplex.read_head() == status
    assert foreign_edge.stranger.received == []
