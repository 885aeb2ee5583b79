"""Raw bindings: bytes both ways, with back-pressure, over real sockets."""

import asyncio
import time

import pytest

MEBIBYTE = 1024 * 1024


async def test_an_upload_streams_through_and_the_answer_has_its_own_status_and_headers(edge):
    async def chunks():
        for _ in range(8):
            yield b"x" * MEBIBYTE

    headers = {**edge.bearer(), "upload-offset": "0", "tus-resumable": "1.0.0"}
    answer = await edge.client.patch("/v1/files/u1", content=chunks(), headers=headers)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["upload-offset"] == str(8 * MEBIBYTE)
    assert "content-length" not in answer.headers


async def test_only_listed_headers_enter_and_leave(edge):
    headers = {
        **edge.bearer(),
        "upload-length": "5",
        "upload-metadata": "filename YQ==",
        "x-user-id": "forged",
        "tenfold-identity": "forged",
        "http-header-upload-length": "999",
        "cookie": "a=b",
    }
    answer = await edge.client.post("/v1/files", headers=headers)
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/files/1"
    assert "set-cookie" not in answer.headers
    metadata = edge.behind.uploads.metadata
    assert metadata["http-header-upload-length"] == "5"
    assert metadata["http-header-upload-metadata"] == "filename YQ=="
    assert metadata["http-method"] == "POST"
    assert metadata["http-url"] == f"http://127.0.0.1:{edge.port}/v1/files"
    assert "forged" not in metadata.values()
    assert not [name for name in metadata if name in {"x-user-id", "cookie", "authorization"}]


async def test_the_idempotency_key_crosses_as_metadata(edge):
    await edge.client.post("/v1/files", headers={**edge.bearer(), "idempotency-key": "once"})
    assert edge.behind.uploads.metadata["idempotency-key"] == "once"


async def test_head_has_headers_and_no_body(edge):
    answer = await edge.client.head("/v1/files/u1", headers=edge.bearer())
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["upload-offset"] == "7"


async def test_a_body_from_the_service_keeps_its_content_type(edge):
    answer = await edge.client.delete("/v1/files/u1", headers=edge.bearer())
    assert (answer.text, answer.headers["content-type"]) == ("gone", "text/plain")


async def test_a_refusal_of_the_service_is_a_problem_document(edge):
    answer = await edge.client.patch("/v1/files/absent", content=b"x", headers=edge.bearer())
    assert answer.status_code == 404
    assert answer.json()["code"] == "NOT_FOUND"


async def test_an_answer_before_the_end_of_the_body_arrives(edge):
    async def chunks():
        for _ in range(4):
            yield b"x" * MEBIBYTE

    answer = await edge.client.patch("/v1/files/early", content=chunks(), headers=edge.bearer())
    assert (answer.status_code, answer.text) == (409, "wrong offset")
    assert answer.headers["connection"] == "close"


async def test_what_a_service_sends_after_a_204_is_no_second_answer(edge):
    token = edge.bearer()["authorization"]
    head = f"PATCH /v1/files/bodiless HTTP/1.1\r\nHost: a\r\nAuthorization: {token}\r\n\r\n"
    answer = await edge.raw(head.encode())
    assert answer.startswith(b"HTTP/1.1 204 ")
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("length", "status", "is_whole"),
    [("5", 200, True), ("4", 200, False), ("6", 200, False), ("5, 5", 500, True)],
)
async def test_a_service_that_breaks_its_content_length_has_its_answer_broken_off(
    edge, length, status, is_whole
):
    token = edge.bearer()["authorization"]
    target = f"/v1/videos/v1/files/{length.replace(' ', '%20')}"
    head = f"GET {target} HTTP/1.1\r\nHost: a\r\nAuthorization: {token}\r\n\r\n".encode()
    # A second request would be answered on a connection that is still in order.
    answer = await edge.raw(head, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (b"ok\n" in answer) is is_whole
    assert answer.startswith(b"HTTP/1.1 %d " % status) or not is_whole


async def test_a_body_beyond_the_contracts_limit_is_413_before_any_call(edge):
    headers = {**edge.bearer(), "content-length": str(10737418241)}
    answer = await edge.raw(
        b"PATCH /v1/files/u1 HTTP/1.1\r\nHost: a\r\n"
        + b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
        + b"\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_without_a_credential_no_byte_reaches_the_service(edge):
    edge.behind.uploads.metadata = {}
    answer = await edge.client.patch("/v1/files/u1", content=b"x")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert edge.behind.uploads.metadata == {}


async def test_a_client_that_dies_in_the_middle_cancels_the_call(edge):
    uploads = edge.behind.uploads
    uploads.was_cut.clear()
    uploads.received = 0
    token = edge.bearer()["authorization"]
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(
        b"PATCH /v1/files/u2 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n"
        + f"Authorization: {token}\r\n\r\n".encode()
        + b"x" * 500_000
    )
    await writer.drain()
    until = time.monotonic() + 5
    while uploads.received < 500_000:
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    writer.transport.abort()
    await asyncio.wait_for(uploads.was_cut.wait(), 5)
    assert uploads.received == 500_000
    del reader


async def test_logging_out_cuts_an_upload_that_is_under_way(edge):
    uploads, session = edge.behind.uploads, "session-that-uploads"
    uploads.was_cut.clear()
    uploads.received = 0
    token = edge.bearer(session=session)["authorization"]
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(
        b"PATCH /v1/files/u3 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n"
        + f"Authorization: {token}\r\n\r\n".encode()
        + b"x" * 1000
    )
    await writer.drain()
    until = time.monotonic() + 5
    while uploads.received < 1000:
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    await edge.behind.sessions.revoke(session)
    await asyncio.wait_for(uploads.was_cut.wait(), 5)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"CREDENTIAL_REVOKED" in answer
    writer.close()


async def test_a_service_that_takes_nothing_stops_the_client(edge):
    uploads = edge.behind.uploads
    uploads.gate.clear()
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(64):
            yield b"x" * MEBIBYTE
            sent += 1

    task = asyncio.create_task(
        edge.client.patch("/v1/files/u3", content=chunks(), headers=edge.bearer())
    )
    try:
        await asyncio.sleep(1.0)
        held = sent
        await asyncio.sleep(0.5)
        assert sent == held < 32  # sockets, windows and one chunk; not the whole body
    finally:
        uploads.gate.set()
    assert (await asyncio.wait_for(task, 20)).status_code == 204
    assert uploads.received == 64 * MEBIBYTE


@pytest.mark.parametrize("name", ["a%00b", "%C3%A9", "a%0D%0Ab"])
async def test_a_path_variable_that_is_no_name_is_404_or_400(edge, name):
    answer = await edge.client.head(f"/v1/files/{name}", headers=edge.bearer())
    assert answer.status_code in {400, 404}
