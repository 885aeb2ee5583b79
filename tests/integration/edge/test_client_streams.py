"""Client streams from NDJSON and from bytes, over real sockets."""

import asyncio
import json
import time

import pytest

from tests.integration.edge.test_streams import eventually

ADD = "/v1/rooms/den/notes:add"
NDJSON = {"content-type": "application/x-ndjson"}
MEBIBYTE = 1024 * 1024


async def add(edge, body, target=ADD, **headers):
    return await edge.client.post(target, content=body, headers={**NDJSON, **headers})


async def repeated(chunk: bytes):
    """Some of it comes after the refusal: the client must not be reset while it sends."""
    for _ in range(30):
        yield chunk


def texts(edge) -> list[str]:
    return [note.text for note in edge.stranger.received]


@pytest.mark.parametrize(
    "body",
    [
        b'{"text":"a"}\n{"text":"b"}\n',
        b'{"text":"a"}\n{"text":"b"}',
        b'\n{"text":"a"}\r\n\n \t\r\n{"text":"b"}\n\n',
        b'  {"text" : "a"}  \n{"\\u0074ext":"b"}',
    ],
    ids=["line ends", "no end at the end", "blank lines are heartbeats", "spaces and escapes"],
)
async def test_each_line_is_a_message(foreign_edge, body):
    answer = await add(foreign_edge, body)
    assert answer.status_code == 200, answer.text
    assert [note["text"] for note in answer.json()["notes"]] == ["a", "b"]
    assert texts(foreign_edge) == ["a", "b"]


async def test_json_with_one_value_a_line_is_taken_and_an_empty_body_is_an_empty_stream(
    foreign_edge,
):
    answer = await add(foreign_edge, b'{"text":"a"}', **{"content-type": "application/json"})
    assert (answer.status_code, texts(foreign_edge)) == (200, ["a"])
    answer = await add(foreign_edge, b"")
    assert (answer.json(), texts(foreign_edge)) == ({"notes": []}, [])


async def test_the_path_fills_every_message_which_may_repeat_it(foreign_edge):
    await add(foreign_edge, b'{"text":"a"}\n{"text":"b","room":"den"}\n')
    assert [note.room for note in foreign_edge.stranger.received] == ["den", "den"]


async def test_the_query_fills_every_message_beside_the_field_that_is_the_body(foreign_edge):
    target = "/v1/rooms/den/authors:add?text=t&number=3"
    await add(foreign_edge, b'{"displayName":"x"}\n{"displayName":"y"}\n', target)
    told = [
        (n.room, n.text, n.number, n.author.display_name) for n in foreign_edge.stranger.received
    ]
    assert told == [("den", "t", 3, "x"), ("den", "t", 3, "y")]


async def test_a_path_variable_inside_a_oneof_fills_only_the_first_message(foreign_edge):
    body = b'{"head":{"columns":2}}\n{"row":"1,2"}\n{"row":"3,4"}\n'
    answer = await add(foreign_edge, body, "/v1/tables/t:add")
    assert answer.status_code == 200, answer.text
    head, *rows = foreign_edge.stranger.received
    assert (head.head.name, head.head.columns) == ("t", 2)
    assert [row.row for row in rows] == ["1,2", "3,4"]


async def test_a_rule_without_a_body_is_a_stream_of_one_message(foreign_edge):
    answer = await foreign_edge.client.post("/v1/rooms/den/notes:touch?text=a")
    assert (answer.status_code, texts(foreign_edge)) == (200, ["a"])
    refused = await add(foreign_edge, b"{}", "/v1/rooms/den/notes:touch")
    assert (refused.status_code, "no body" in refused.json()["detail"]) == (400, True)


@pytest.mark.parametrize(
    ("broken", "field", "what"),
    [
        (b'{"number":"many"}', "number", "integer"),
        (b'{"author":{"displayNam":"x"}}', "author.displayNam", "no field"),
        (b'{"text":"a","text":"b"}', "text", "twice"),
        (b'{"room":"attic"}', "room", "differs from the path"),
        (b'{"text":"a"', "", "not valid JSON"),
        (b'{"text":"\xff"}', "", "not valid JSON"),
        (b"[]", "", "must be an object"),
    ],
    ids=["type", "unknown", "doubled", "other path", "no JSON", "no UTF-8", "no object"],
)
async def test_a_broken_line_is_a_400_that_names_line_and_field(
    foreign_edge, talk, broken, field, what
):
    # Closed: grpc.aio tells a server that reads of a cancelled stream as of one that has ended.
    foreign_edge.stranger.gate.clear()
    duplex = await talk(foreign_edge, ADD)
    await duplex.send(b'{"text":"a"}\n\n')
    await eventually(lambda: texts(foreign_edge) == ["a"])
    await duplex.send(broken + b'\n{"text":"never"}\n')
    status, problem = await duplex.read_head(), json.loads(await duplex.read_body())
    assert (status, problem["details"]["line"]) == (400, "3")
    assert problem["detail"].startswith("line 3: ")
    assert what in problem["detail"]
    assert [violation["field"] for violation in problem.get("violations", [])] == [field] * bool(
        field
    )
    await asyncio.wait_for(foreign_edge.stranger.was_cancelled.wait(), 5)
    assert texts(foreign_edge) == ["a"]


async def test_a_fault_of_the_url_is_not_told_as_one_of_a_line(foreign_edge):
    answer = await add(foreign_edge, b'{"text":"a"}', ADD + "?nothing=1")
    assert (answer.status_code, "line" in answer.text) == (400, False)
    assert foreign_edge.stranger.received == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/x-ndjson; charset=latin-1"}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "gzip, gzip"}, 415),
        ({"accept": "text/event-stream"}, 406),
        ({"idempotency-key": "k" * 256}, 400),
    ],
    ids=["other type", "no type", "other charset", "gzip", "twice", "other answer", "long key"],
)
async def test_what_cannot_be_read_is_refused_before_the_call(foreign_edge, headers, status):
    answer = await add(foreign_edge, b'{"text":"a"}', **headers)
    assert answer.status_code == status, answer.text
    assert foreign_edge.stranger.received == []


async def test_an_early_answer_ends_the_reading_and_arrives(foreign_edge, talk):
    duplex = await talk(foreign_edge, ADD)
    await duplex.send_json({"text": "a"}, {"text": "stop"})
    assert await duplex.read_head() == 200
    assert json.loads(await duplex.read_body()) == {
        "notes": [{"room": "den", "text": "a", "number": 0, "etag": ""}]
    }
    assert duplex.headers["connection"] == "close"


async def test_an_early_refusal_ends_the_reading_and_arrives(foreign_edge, talk):
    duplex = await talk(foreign_edge, ADD)
    await duplex.send_json({"text": "a"}, {"text": "refuse"})
    assert await duplex.read_head() == 404
    assert json.loads(await duplex.read_body())["detail"] == "There is no such room."


async def test_a_refusal_is_not_lost_under_what_is_still_sent(foreign_edge):
    async def lines():
        yield b'{"text":"refuse"}\n'
        for _ in range(200):
            yield b'{"text":"' + b"x" * 10_000 + b'"}\n'

    for _ in range(10):
        answer = await add(foreign_edge, lines())
        assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")


async def test_a_client_that_leaves_cancels_the_call(foreign_edge, talk):
    foreign_edge.stranger.gate.clear()
    duplex = await talk(foreign_edge, ADD)
    await duplex.send_json({"text": "a"})
    await eventually(lambda: texts(foreign_edge) == ["a"])
    await duplex.leave()
    await asyncio.wait_for(foreign_edge.stranger.was_cancelled.wait(), 5)


async def test_a_client_that_leaves_when_all_is_sent_cancels_the_call_too(foreign_edge, talk):
    foreign_edge.stranger.gate.clear()
    duplex = await talk(foreign_edge, ADD)
    await duplex.send_json({"text": "a"})
    await duplex.end()
    await eventually(lambda: texts(foreign_edge) == ["a"])
    await duplex.leave()
    await asyncio.wait_for(foreign_edge.stranger.was_cancelled.wait(), 5)


async def test_a_slow_service_slows_the_client_and_loses_nothing(foreign_edge, talk):
    foreign_edge.stranger.gate.clear()
    line, sent = b'{"text":"' + b"x" * 50_000 + b'"}\n', 0

    async def send_all(duplex):
        nonlocal sent
        for _ in range(400):  # 20 MB
            await duplex.send(line)
            sent += 1
        await duplex.end()

    duplex = await talk(foreign_edge, ADD)
    sending = asyncio.create_task(send_all(duplex))
    before = -1
    while not sent or before != sent:  # until no more goes in
        before = sent
        await asyncio.sleep(0.3)
    assert 0 < sent < 300  # sockets and windows hold the rest
    foreign_edge.stranger.gate.set()
    await sending
    assert await duplex.read_head() == 200
    assert len(foreign_edge.stranger.received) == 400


async def test_a_line_and_a_body_have_a_bound_of_their_own(start_foreign_edge):
    async with start_foreign_edge(line_bytes_max=100, stream_bytes_max=1000) as edge:
        edge.stranger.reset()
        whole = json.dumps({"text": "x" * 50}).encode()
        answer = await add(edge, whole + b"\n" + whole.replace(b"x" * 50, b"x" * 100) + b"\n")
        assert (answer.status_code, answer.json()["details"]) == (413, {"line": "2"})

        answer = await add(edge, repeated(b"x" * 10))
        assert (answer.status_code, answer.json()["details"]) == (413, {"line": "1"})
        answer = await add(edge, repeated(whole + b"\n"))
        assert (answer.status_code, answer.json()["reason"]) == (413, "BODY_TOO_LARGE")
        assert len(texts(edge)) < 1000 / len(whole)
        announced = await add(edge, b"{}\n" * 400)
        assert announced.status_code == 413


async def test_blank_lines_cost_a_client_its_bytes_and_the_edge_little(foreign_edge):
    started_s = time.process_time()
    answer = await add(foreign_edge, b"\n" * (8 * MEBIBYTE) + b'{"text":1}')
    problem = answer.json()
    assert (answer.status_code, problem["details"]["line"]) == (400, str(8 * MEBIBYTE + 1))
    short_s = time.process_time() - started_s
    started_s = time.process_time()
    await add(foreign_edge, b"\n" * (32 * MEBIBYTE) + b'{"text":1}')
    assert time.process_time() - started_s < 12 * short_s  # four times as many, not squared


async def test_silence_of_the_client_ends_the_call_and_a_blank_line_is_no_silence(
    start_foreign_edge,
    talk,
):
    async with start_foreign_edge(body_timeout_s=0.8) as edge:
        edge.stranger.reset()
        duplex = await talk(edge, ADD)
        for _ in range(10):
            await duplex.send(b"\n")
            await asyncio.sleep(0.1)
        await duplex.send_json({"text": "a"})
        assert await duplex.read_head() == 408
        assert texts(edge) == ["a"]
        await duplex.leave()


async def test_the_deadline_ends_a_stream_that_goes_on(foreign_edge, talk):
    duplex = await talk(
        foreign_edge, ADD, "Content-Type: application/x-ndjson", "Grpc-Timeout: 300m"
    )
    await duplex.send_json({"text": "a"})
    assert await duplex.read_head() == 504


async def test_streams_that_a_caller_holds_open_are_counted(start_foreign_edge, talk):
    async with start_foreign_edge(streams_per_caller_max=1) as edge:
        edge.stranger.reset()
        duplex = await talk(edge, ADD)
        await duplex.send_json({"text": "a"})
        await eventually(lambda: texts(edge) == ["a"])
        second = await add(edge, b'{"text":"b"}')
        assert (second.status_code, second.json()["reason"]) == (429, "STREAMS_EXCEEDED")
        await duplex.end()
        assert await duplex.read_head() == 200


async def test_the_idempotency_key_names_the_call_and_not_its_messages(foreign_edge):
    await add(foreign_edge, b'{"text":"a"}', **{"idempotency-key": "once"})
    assert foreign_edge.stranger.metadata["idempotency-key"] == "once"


# Bytes
async def test_a_body_of_any_type_goes_up_in_frames_and_says_its_type_once(foreign_edge):
    data = bytes(range(256)) * 4096
    headers = {"content-type": "video/mp4"}
    answer = await foreign_edge.client.post("/v1/files:upload", content=data, headers=headers)
    assert answer.status_code == 200, answer.text
    first, *others = foreign_edge.stranger.received
    assert b"".join(part.data for part in (first, *others)) == data
    assert first.content_type == "video/mp4"
    assert len(others) > 0
    assert {part.content_type for part in others} == {""}


async def test_a_body_inside_a_message_has_path_and_query_in_each_frame(foreign_edge):
    data = b"x" * MEBIBYTE
    answer = await foreign_edge.client.put("/v1/files/f?label=l", content=data)
    assert answer.status_code == 200, answer.text
    received = foreign_edge.stranger.received
    assert {(part.name, part.label) for part in received} == {("f", "l")}
    assert b"".join(part.content.data for part in received) == data


async def test_an_empty_body_is_one_message_that_has_the_path_and_the_type(foreign_edge):
    headers = {"content-type": "image/png"}
    answer = await foreign_edge.client.put("/v1/files/f", content=b"", headers=headers)
    assert answer.status_code == 200, answer.text
    [part] = foreign_edge.stranger.received
    assert (part.name, part.content.content_type, part.content.data) == ("f", "image/png", b"")


async def test_bytes_have_a_bound_and_an_early_refusal_arrives(start_foreign_edge):
    async with start_foreign_edge(stream_bytes_max=MEBIBYTE) as edge:
        edge.stranger.reset()

        chunk = b"x" * 100_000
        answer = await edge.client.post("/v1/files:upload", content=repeated(chunk))
        assert (answer.status_code, answer.json()["reason"]) == (413, "BODY_TOO_LARGE")
        answer = await edge.client.post("/v1/files:upload", content=repeated(b"refuse" + chunk))
        assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")
