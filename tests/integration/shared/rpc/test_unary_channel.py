"""Unary calls over our own HTTP/2, to our server on every engine and to a plain grpc.aio one."""

import asyncio
import contextlib
import datetime
import gc
import ipaddress
import os
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf.wrappers_pb2 import BytesValue

from shared.errors import DeadlineExceeded, NotFound, Overloaded, Unavailable, Unimplemented
from shared.rpc.header_block import binary_value
from shared.rpc.tls import ClientTls
from shared.rpc.unary import Answer, UnaryChannel
from tests.integration.shared.rpc.echo import (
    CALL,
    KINDS,
    POLICIES,
    SAFE,
    STRANGER,
    Served,
    served,
)
from tests.unit.shared.rpc.wire import SETTINGS

KIBI, MEBI = 1024, 1024 * 1024


@pytest.fixture(params=KINDS)
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    async with served(request.param) as running:
        yield running


@pytest.fixture
async def stranger() -> AsyncIterator[Served]:
    async with served(STRANGER) as running:
        yield running


@pytest.fixture
async def channel(server: Served) -> AsyncIterator[UnaryChannel]:
    channel = UnaryChannel(server.address, POLICIES)
    yield channel
    await channel.close()


@pytest.fixture
async def to_stranger(stranger: Served) -> AsyncIterator[UnaryChannel]:
    channel = UnaryChannel(stranger.address, POLICIES)
    yield channel
    await channel.close()


async def call(channel: UnaryChannel, body: bytes = b"hi", path: str = CALL, **asked: str) -> bytes:
    """What came back; `asked` is metadata, with "_" for "-"."""
    timeout_s = float(asked.pop("timeout_s", "30"))
    metadata = [(key.replace("_", "-"), value) for key, value in asked.items()]
    request = BytesValue(value=body).SerializeToString()
    answer = await channel.call(path, request, metadata=metadata, timeout_s=timeout_s)
    return BytesValue.FromString(answer.message).value


async def until(is_so) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_call_is_answered(channel: UnaryChannel) -> None:
    assert await call(channel, b"hello") == b"hello"


@pytest.mark.parametrize(
    "size",
    [0, 1, 16 * KIBI - 1, 16 * KIBI, 16 * KIBI + 1, 64 * KIBI - 2, 64 * KIBI - 1, 64 * KIBI,
     64 * KIBI + 1, MEBI, 10 * MEBI],
)  # fmt: skip
async def test_messages_of_every_size_pass_both_ways(channel: UnaryChannel, size: int) -> None:
    # The sizes are those of whole messages, around the limits of frames and windows.
    body = os.urandom(max(0, size - BytesValue(value=bytes(size)).ByteSize() + size))
    assert await call(channel, body) == body


async def test_many_large_messages_at_once_share_the_windows(channel: UnaryChannel) -> None:
    bodies = [os.urandom(3 * MEBI + number) for number in range(8)]
    assert await asyncio.gather(*(call(channel, body) for body in bodies)) == bodies


async def test_an_error_comes_with_its_details(channel: UnaryChannel) -> None:
    with pytest.raises(NotFound) as refusal:
        await call(channel, fail="yes")
    error = refusal.value
    assert error.message == "no such echo: 100 % of “it”"
    assert (error.error_reason, error.metadata) == ("NO_ECHO", {"echo": "e"})


async def test_what_the_server_does_not_know_is_unimplemented(channel: UnaryChannel) -> None:
    with pytest.raises(Unimplemented):
        await call(channel, path="/tests.Echo/Nothing")


async def test_a_server_says_when_to_come_back(channel: UnaryChannel) -> None:
    with pytest.raises(Unavailable) as refusal:
        await call(channel, down="9", key="a")
    assert refusal.value.retry_after_s == 1.5


async def test_metadata_arrives_as_it_was(server: Served, channel: UnaryChannel) -> None:
    await call(channel, x_text=" !~ %41 ,;= ".strip(), x_long="y" * 5000, x_empty="")
    seen = server.echo.seen[0]
    assert (seen["x-text"], seen["x-long"], seen["x-empty"]) == ("!~ %41 ,;=", "y" * 5000, "")


@pytest.mark.parametrize("value", [b"", b"\0", b"\xff\xfe", bytes(range(256))])
async def test_binary_metadata_passes_both_ways(
    stranger: Served, to_stranger: UnaryChannel, value: bytes
) -> None:
    answer: Answer = await to_stranger.call(
        CALL, b"", metadata=[("x-bin", value), ("x-text", "a")], timeout_s=10
    )
    assert stranger.echo.seen[0]["x-bin"] == value
    for metadata in (answer.initial, answer.trailing):
        assert binary_value(metadata[b"x-bin"]) == value
    assert (answer.initial[b"began"], answer.trailing[b"ended"]) == (b"yes", b"yes")


@pytest.mark.parametrize("entry", [("X", "a"), ("x", "a\nb"), ("x", "ü"), ("grpc-timeout", "1S")])
async def test_metadata_that_cannot_be_sent_is_refused_and_nothing_is_sent(
    stranger: Served, to_stranger: UnaryChannel, entry: tuple[str, str]
) -> None:
    with pytest.raises(ValueError, match="metadata"):
        await to_stranger.call(CALL, b"", metadata=[entry], timeout_s=10)
    assert await call(to_stranger) == b"hi"
    assert len(stranger.echo.seen) == 1


async def test_metadata_longer_than_a_frame_arrives(
    stranger: Served, to_stranger: UnaryChannel
) -> None:
    values = {f"x-{number}": "y" * 1000 for number in range(40)}
    await call(to_stranger, **values)
    assert values.items() <= stranger.echo.seen[0].items()


async def test_metadata_longer_than_the_server_takes_fails_its_call_alone() -> None:
    async with served("grpcio") as server:
        channel = UnaryChannel(server.address, POLICIES)
        await call(channel)
        held = asyncio.create_task(call(channel, sleep_s="0.1"))
        with pytest.raises(Overloaded):  # RESOURCE_EXHAUSTED
            await call(channel, x_long="y" * 40_000)
        assert await held == b"hi"
        await channel.close()


async def test_the_deadline_is_passed_on(server: Served, channel: UnaryChannel) -> None:
    await call(channel, timeout_s="7")
    assert 5 < server.echo.left_s[0] <= 7


async def test_the_deadline_is_enforced_here_and_the_server_hears_of_it(
    server: Served, channel: UnaryChannel
) -> None:
    await call(channel)
    began_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await call(channel, wait="yes", timeout_s="0.2")
    assert time.monotonic() - began_s >= 0.19  # the server is told whole milliseconds
    await until(lambda: server.echo.running == 0)
    assert server.echo.cancelled == 1
    assert await call(channel) == b"hi"


async def test_a_cancelled_task_cancels_its_call_on_the_server(
    server: Served, channel: UnaryChannel
) -> None:
    task = asyncio.create_task(call(channel, wait="yes"))
    await until(lambda: server.echo.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: server.echo.running == 0)
    assert server.echo.cancelled == 1
    assert await call(channel) == b"hi"


async def test_a_thousand_cancelled_calls_leave_room_for_others(
    server: Served, channel: UnaryChannel
) -> None:
    await call(channel)
    tasks = [asyncio.create_task(call(channel, wait="yes")) for _ in range(1500)]
    await until(lambda: server.echo.running >= 900)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert await call(channel) == b"hi"
    await until(lambda: server.echo.running == 0)


async def test_five_thousand_calls_at_once_are_all_answered_and_bounded(
    server: Served, channel: UnaryChannel
) -> None:
    bodies = [b"%d" % number for number in range(5000)]
    answers = await asyncio.gather(*(call(channel, body, timeout_s="60") for body in bodies))
    assert answers == bodies
    assert server.echo.most <= 1000


async def test_calls_that_wait_for_a_place_give_up_in_their_time(
    server: Served, channel: UnaryChannel
) -> None:
    await call(channel)
    held = [
        asyncio.create_task(call(channel, wait="yes")) for _ in range(channel._endpoints.places)
    ]
    await until(lambda: server.echo.running == len(held))
    with pytest.raises(DeadlineExceeded):
        await call(channel, timeout_s="0.1")
    waiting = asyncio.create_task(call(channel, b"next"))
    await asyncio.sleep(0)
    held.pop().cancel()
    assert await waiting == b"next"
    for task in held:
        task.cancel()
    await asyncio.wait(held)


async def test_an_address_that_says_it_does_not_serve_gets_no_calls() -> None:
    async with served("grpcio") as server:
        channel = UnaryChannel(server.address, POLICIES)
        await call(channel)
        server.set_serving(False)
        await until(lambda: channel._endpoints.is_down)
        for path in (CALL, SAFE):
            with pytest.raises(Unavailable):
                await call(channel, path=path, timeout_s="20")
        assert len(server.echo.seen) == 1
        server.set_serving(True)
        await until(lambda: not channel._endpoints.is_down)
        assert await call(channel) == b"hi"
        await channel.close()


async def test_without_health_checks_an_address_serves_that_says_it_does_not() -> None:
    async with served("grpcio") as server:
        server.set_serving(False)
        channel = UnaryChannel(server.address, POLICIES, checks_health=False)
        assert await call(channel) == b"hi"
        await channel.close()


# Retries


async def test_only_what_the_contract_calls_safe_is_retried(
    server: Served, channel: UnaryChannel
) -> None:
    with pytest.raises(Unavailable):
        await call(channel, path=CALL, down="1", key="once")
    assert await call(channel, path=SAFE, down="2", key="safe") == b"hi"
    with pytest.raises(Unavailable):
        await call(channel, path=SAFE, down="99", key="down")
    with pytest.raises(NotFound):
        await call(channel, path=SAFE, fail="yes", key="fail")
    assert server.echo.tries == {"once": 1, "safe": 3, "down": 3, "fail": 1}


async def test_the_server_learns_how_often_it_was_tried(
    stranger: Served, to_stranger: UnaryChannel
) -> None:
    await call(to_stranger, path=SAFE, down="2")
    said = [seen.get("grpc-previous-rpc-attempts") for seen in stranger.echo.seen]
    assert said == [None, "1", "2"]


async def test_retries_end_where_the_deadline_would_come_first(
    stranger: Served, to_stranger: UnaryChannel
) -> None:
    await call(to_stranger)
    with pytest.raises(Unavailable):
        await call(to_stranger, path=SAFE, down="9", key="a", timeout_s="0.03")
    assert stranger.echo.tries["a"] == 1


@pytest.mark.parametrize(("pushback", "tries"), [("-1", 1), ("nonsense", 1), ("10", 3)])
async def test_a_server_may_forbid_a_retry_or_say_when(
    stranger: Served, to_stranger: UnaryChannel, pushback: str, tries: int
) -> None:
    stranger.echo.trailing = (("grpc-retry-pushback-ms", pushback),)
    with pytest.raises(Unavailable):
        await call(to_stranger, path=SAFE, down="9")
    assert stranger.echo.tries[""] == tries


async def test_when_most_calls_fail_the_budget_ends_retries(
    stranger: Served, to_stranger: UnaryChannel
) -> None:
    stranger.echo.trailing = (("grpc-retry-pushback-ms", "0"),)
    for number in range(60):
        with pytest.raises(Unavailable):
            await call(to_stranger, path=SAFE, down="9", key=f"{number}")
    assert sum(stranger.echo.tries.values()) <= 60 + 50
    assert stranger.echo.tries["59"] == 1


# Encryption


def certificate(*, name: str) -> tuple[bytes, bytes]:
    """A key, and a certificate that vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name))]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, form, serialization.NoEncryption()), signed.public_bytes(pem)


@pytest.mark.parametrize("name", ["127.0.0.1", "127.0.0.9"])
async def test_over_tls_calls_pass_if_the_server_is_who_it_should_be(name: str) -> None:
    key, signed = certificate(name=name)

    async def echo(request: bytes, _context: object) -> bytes:
        return request

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_registered_method_handlers("tests.Echo", {"Call": handler})
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, signed)]))
    await server.start()
    channel = UnaryChannel(f"127.0.0.1:{port}", {}, tls=ClientTls(signed))
    if name == "127.0.0.1":
        body = os.urandom(MEBI)
        assert (await channel.call(CALL, body, timeout_s=20)).message == body
    else:
        with pytest.raises(Unavailable):
            await channel.call(CALL, b"", timeout_s=20)
    await channel.close()
    await server.stop(0)


async def test_a_tls_server_that_does_not_choose_http_2_gets_no_calls(tmp_path: Path) -> None:
    key, signed = certificate(name="127.0.0.1")
    pem = tmp_path / "server.pem"
    pem.write_bytes(key + signed)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    came = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SETTINGS)  # it speaks HTTP/2 all the same
        came.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    channel = UnaryChannel(f"127.0.0.1:{port}", {}, tls=ClientTls(signed), checks_health=False)
    with pytest.raises(Unavailable):
        await channel.call(CALL, b"secret", timeout_s=20)
    await until(lambda: bool(came))
    assert b"secret" not in came[0]
    await channel.close()
    server.close()
    await server.wait_closed()


# The end


def open_sockets() -> int:
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return count


async def test_closing_fails_what_runs_and_leaves_no_task_and_no_socket(server: Served) -> None:
    gc.collect()
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    channel = UnaryChannel(server.address, POLICIES)
    running = [asyncio.create_task(call(channel, wait="yes")) for _ in range(1100)]
    await until(lambda: server.echo.running >= 900)
    assert open_sockets() > sockets
    await channel.close()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(result, Unavailable) for result in results)
    with pytest.raises(Unavailable):
        await call(channel)
    await channel.close()
    await until(lambda: server.echo.running == 0)
    await until(lambda: open_sockets() <= sockets)
    # The server's own tasks are in this loop, too.
    assert not [task for task in asyncio.all_tasks() - tasks if "cygrpc" not in repr(task)]


async def test_a_channel_may_close_before_it_was_used_and_while_it_connects() -> None:
    unused = UnaryChannel("127.0.0.1:1", {})
    await unused.close()
    async with served(STRANGER) as server:
        channel = UnaryChannel(server.address, {})
        connecting = asyncio.create_task(call(channel))
        await asyncio.sleep(0)
        await channel.close()
        with pytest.raises(Unavailable):
            await connecting


@pytest.mark.parametrize("target", ["", "host", ":1", "host:", "host:x", "unix:/a", "dns:///h"])
async def test_a_target_that_is_no_host_and_port_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        UnaryChannel(target, {})
