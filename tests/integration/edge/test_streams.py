"""Server streams as SSE and NDJSON, over real sockets."""

import asyncio
import json
import time

import httpx
import pytest

from edge.config import EdgeConfig


def events(text: str) -> list[dict[str, str]]:
    """Server-sent events, parsed as a browser would."""
    found = []
    for block in text.split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(":")]
        if lines:
            found.append({name: value for name, _, value in lines})
    return found


async def eventually(holds, timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


async def test_a_browser_gets_events_with_ids_and_a_defined_end(edge):
    headers = {**edge.bearer(), "accept": "text/event-stream"}
    answer = await edge.client.get("/v1/videos/v1:watch", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    retry, *messages, end = events(answer.text)
    assert retry == {"retry": "1000"}
    assert [message["id"] for message in messages] == ["c0", "c1", "c2"]
    assert json.loads(messages[2]["data"])["video"]["progressPercent"] == 2
    assert end == {"event": "end", "data": "{}"}


@pytest.mark.parametrize("accept", [None, "*/*", "application/x-ndjson", "application/json"])
async def test_a_script_gets_one_json_value_a_line(edge, accept):
    headers = {**edge.bearer(), "accept": accept} if accept else edge.bearer()
    answer = await edge.client.get("/v1/videos/v1:watch", headers=headers)
    assert answer.headers["content-type"] == "application/x-ndjson; charset=utf-8"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["cursor"] for line in lines] == ["c0", "c1", "c2"]


async def test_a_client_that_takes_neither_framing_gets_406(edge):
    headers = {**edge.bearer(), "accept": "image/png, text/event-stream;q=0"}
    assert (await edge.client.get("/v1/videos/v1:watch", headers=headers)).status_code == 406


async def test_a_refusal_before_the_first_message_has_its_own_status(edge):
    headers = {**edge.bearer(), "accept": "text/event-stream"}
    answer = await edge.client.get("/v1/videos/absent:watch", headers=headers)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


async def test_an_error_half_way_is_the_last_thing_in_the_stream(edge):
    sse = await edge.client.get(
        "/v1/videos/breaks:watch", headers={**edge.bearer(), "accept": "text/event-stream"}
    )
    last = events(sse.text)[-1]
    assert last["event"] == "error"
    assert json.loads(last["data"])["reason"] == "INSUFFICIENT_FUNDS"
    ndjson = await edge.client.get("/v1/videos/breaks:watch", headers=edge.bearer())
    assert json.loads(ndjson.text.splitlines()[-1])["error"]["reason"] == "INSUFFICIENT_FUNDS"


async def test_a_client_that_leaves_cancels_the_call(edge):
    headers = {**edge.bearer(), "accept": "text/event-stream"}
    async with edge.client.stream("GET", "/v1/videos/endless:watch", headers=headers) as answer:
        await anext(answer.aiter_bytes())
        assert edge.behind.videos.open_streams == 1
    await eventually(lambda: edge.behind.videos.open_streams == 0)


async def test_a_slow_reader_slows_the_service_and_memory_stays_bounded(edge):
    before = edge.behind.videos.sent
    # As it is: these messages are all alike, and gzip would make nothing of them.
    headers = {**edge.bearer(), "accept-encoding": "identity"}
    async with edge.client.stream("GET", "/v1/videos/flood:watch", headers=headers) as answer:
        await anext(answer.aiter_bytes())
        await asyncio.sleep(0.5)
        first = edge.behind.videos.sent
        await asyncio.sleep(0.5)
        # 50 KB a message: sockets and windows hold some megabytes, then everything waits.
        assert edge.behind.videos.sent == first
        assert first - before < 400
    await eventually(lambda: edge.behind.videos.open_streams == 0)


async def test_silence_is_filled_with_heartbeats(start_edge):
    async with start_edge(EdgeConfig(heartbeat_s=0.1, drain_s=1.0)) as edge:
        headers = {**edge.bearer(), "accept": "text/event-stream"}
        async with edge.client.stream("GET", "/v1/videos/endless:watch", headers=headers) as answer:
            seen = b""
            async for chunk in answer.aiter_bytes():
                seen += chunk
                if seen.count(b": alive\n\n") >= 2:
                    break


async def test_logging_out_ends_what_the_session_has_open_and_refuses_its_token(edge):
    session = "session-to-end"
    headers = {**edge.bearer(session=session), "accept": "text/event-stream"}
    async with edge.client.stream("GET", "/v1/videos/endless:watch", headers=headers) as answer:
        received = answer.aiter_bytes()
        await anext(received)
        await edge.behind.sessions.revoke(session)
        rest = b"".join([chunk async for chunk in received]).decode()
    last = events(rest)[-1]
    assert (last["event"], json.loads(last["data"])["reason"]) == ("error", "CREDENTIAL_REVOKED")
    refused = await edge.client.get("/v1/videos/v1:watch", headers=headers)
    assert (refused.status_code, refused.json()["reason"]) == (401, "CREDENTIAL_REVOKED")


async def test_a_stopping_edge_ends_open_streams_and_lets_requests_finish(start_edge):
    async with start_edge() as edge:
        headers = {**edge.bearer(), "accept": "text/event-stream"}
        stream = edge.client.stream("GET", "/v1/videos/endless:watch", headers=headers)
        answer = await stream.__aenter__()
        received = answer.aiter_bytes()
        await anext(received)
        edge.app.drain()
        rest = b"".join([chunk async for chunk in received]).decode()
        await stream.__aexit__(None, None, None)
        assert json.loads(events(rest)[-1]["data"])["code"] == "UNAVAILABLE"
        assert (await edge.client.get("/readyz")).status_code == 503
        assert (await edge.client.get("/healthz")).status_code == 200


async def test_one_caller_may_hold_only_so_many_streams(start_edge):
    async with start_edge(EdgeConfig(streams_per_caller_max=1, drain_s=1.0)) as edge:
        headers = edge.bearer()
        async with edge.client.stream("GET", "/v1/videos/endless:watch", headers=headers) as first:
            received = first.aiter_bytes()  # kept: a dropped generator closes its connection
            await anext(received)
            second = await edge.client.get("/v1/videos/v1:watch", headers=headers)
            other = await edge.client.get("/v1/videos/v1:watch", headers=edge.bearer())
        assert (second.status_code, second.json()["reason"]) == (429, "STREAMS_EXCEEDED")
        assert other.status_code == 200


async def test_a_deadline_ends_a_stream_with_an_error_event(edge):
    headers = {**edge.bearer(), "grpc-timeout": "300m"}
    answer = await edge.client.get("/v1/videos/endless:watch", headers=headers)
    assert json.loads(answer.text.splitlines()[-1])["error"]["code"] == "DEADLINE_EXCEEDED"


async def watched(foreign_edge, target, **headers):
    answer = await foreign_edge.client.get(target, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


async def test_last_event_id_goes_on_from_there_whatever_the_url_says(foreign_edge):
    accept = {"accept": "text/event-stream"}
    target = "/v1/rooms/den:watch?count=2"
    first = await watched(foreign_edge, target, **accept)
    assert [event.get("id") for event in events(first.text)] == [None, "1", "2", None]
    for again in (target, target + "&cursor=1"):
        then = await watched(foreign_edge, again, **accept, **{"last-event-id": "2"})
        assert [event.get("id") for event in events(then.text)] == [None, "3", "4", None]


@pytest.mark.parametrize("cursor", ["nonsense", "1e99", "9" * 30, "1, 2"])
async def test_a_last_event_id_that_is_none_of_ours_is_refused_by_its_name(foreign_edge, cursor):
    answer = await foreign_edge.client.get("/v1/rooms/den:watch", headers={"last-event-id": cursor})
    assert answer.status_code == 400
    assert "last-event-id" in answer.json()["detail"].lower()


async def test_response_body_names_what_each_message_shows_and_the_id_stays(foreign_edge):
    target = "/v1/rooms/den/notes:watch?count=2"
    lines = [json.loads(line) for line in (await watched(foreign_edge, target)).text.splitlines()]
    assert [(line["room"], line["number"]) for line in lines] == [("den", 1), ("den", 2)]
    sse = await watched(foreign_edge, target, accept="text/event-stream")
    _, first, second, _ = events(sse.text)
    assert (first["id"], json.loads(second["data"])["number"]) == ("1", 2)


@pytest.mark.parametrize(
    ("accept", "is_sse"),
    [
        ("text/event-stream, application/x-ndjson;q=0.9", True),
        ("text/event-stream;q=0.4, */*;q=0.5", False),
        ("text/*", True),
        ("application/*;q=0.1, text/event-stream;q=0.2", True),
        ("text/html, */*;q=0.8", False),
    ],
)
async def test_the_better_liked_framing_is_sent(foreign_edge, accept, is_sse):
    answer = await watched(foreign_edge, "/v1/rooms/den:watch?count=1", accept=accept)
    assert answer.headers["content-type"].startswith("text/event-stream") is is_sse


async def test_an_error_half_way_is_the_problem_that_a_refusal_would_be(foreign_edge):
    target, members = "/v1/rooms/breaks:watch?count=1", {"type", "title", "status", "detail"}
    refused = (await foreign_edge.client.get("/v1/files/absent:download")).json()
    ndjson = await watched(foreign_edge, target)
    sse = await watched(foreign_edge, target, accept="text/event-stream")
    error = json.loads(ndjson.text.splitlines()[-1])["error"]
    assert members <= error.keys() == refused.keys()
    assert error["status"] == 400
    ours = {"request_id": ""}
    assert json.loads(events(sse.text)[-1]["data"]) | ours == error | ours


async def test_a_stream_that_begins_with_silence_is_opened_all_the_same(start_foreign_edge):
    async with start_foreign_edge(heartbeat_s=0.1) as edge:
        edge.stranger.reset()
        for accept, alive in (("text/event-stream", b": alive\n\n"), ("application/json", b"\n")):
            headers = {"accept": accept, "accept-encoding": "identity"}
            stream = edge.client.stream("GET", "/v1/rooms/silent:watch", headers=headers)
            seen = b""
            async with stream as answer:
                assert answer.status_code == 200
                async for chunk in answer.aiter_raw():
                    seen += chunk
                    if seen.endswith(alive * 2):
                        break
            await eventually(lambda: edge.stranger.open_calls == 0)


async def test_head_of_a_stream_is_405(edge):
    answer = await edge.client.head("/v1/videos/v1:watch", headers=edge.bearer())
    assert answer.status_code == 405
    assert isinstance(answer, httpx.Response)
