"""Servers that die, freeze, age, restart and move: what a channel loses, and what it does not."""

import asyncio
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from structlog.testing import capture_logs

from shared.config import RPC_ENGINES
from shared.errors import DeadlineExceeded, TenfoldError, Unavailable, Unreachable
from shared.rpc.endpoints import Endpoint
from shared.rpc.policy import MethodPolicy
from shared.rpc.unary import UnaryChannel
from shared.signals import send_signal
from tests.integration.shared.rpc.echo import CALL, KINDS, POLICIES, SAFE, child, serve, served

CALLERS = 32
BODY = BytesValue(value=b"hi").SerializeToString()


@asynccontextmanager
async def channel_to(
    target: str, policies: Mapping[str, MethodPolicy] = POLICIES, **options: Any
) -> AsyncIterator[UnaryChannel]:
    channel = UnaryChannel(target, policies, **options)
    try:
        yield channel
    finally:
        await channel.close()


@dataclass
class Load:
    """Callers that go on until they are stopped, and what they met."""

    channel: UnaryChannel
    paths: tuple[str, ...] = (CALL, SAFE)
    answered: int = 0
    failed: list[tuple[str, str, TenfoldError]] = field(default_factory=list)  # path, key, error
    is_over: bool = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(self._call(number))
            yield self
            self.is_over = True

    async def _call(self, number: int) -> None:
        path, count = self.paths[number % len(self.paths)], 0
        while not self.is_over:
            key, count = f"{number}-{count}", count + 1
            try:
                await self.channel.call(path, BODY, metadata=[("key", key)], timeout_s=10)
                self.answered += 1
            except TenfoldError as error:
                self.failed.append((path, key, error))

    async def go_on(self, count: int) -> None:
        """Until so many more calls are answered."""
        enough = self.answered + count
        await until(lambda: self.answered >= enough)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def call(channel: UnaryChannel, path: str = CALL, timeout_s: float = 10) -> bytes:
    answer = await channel.call(path, BODY, timeout_s=timeout_s)
    return BytesValue.FromString(answer.message).value


async def until_answered(channel: UnaryChannel) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await call(channel)
            except Unavailable:
                await asyncio.sleep(0.02)
            else:
                return


async def until_both(channel: UnaryChannel) -> None:
    """Until both of two servers take calls: each has about a thousand places."""
    await until_answered(channel)
    await until(lambda: channel._endpoints.places > 1100)


# One server


@pytest.mark.parametrize("kind", KINDS)
async def test_a_killed_server_fails_calls_fast_and_is_found_again(
    kind: str, free_port: int
) -> None:
    address = f"127.0.0.1:{free_port}"
    async with channel_to(address) as channel:
        async with child(kind, address) as process:
            await call(channel)
            running = asyncio.create_task(
                channel.call(CALL, BODY, metadata=[("wait", "yes")], timeout_s=60)
            )
            await asyncio.sleep(0.1)
            process.kill()
            with pytest.raises(Unavailable):
                await running
        began_s = time.monotonic()
        for _ in range(20):
            with pytest.raises(Unavailable):
                await call(channel, timeout_s=60)
        assert time.monotonic() - began_s < 30  # far from 20 deadlines
        async with child(kind, address):
            await until_answered(channel)


async def test_calls_before_the_server_is_there_fail_fast_and_then_pass(free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    async with channel_to(address) as channel:
        with pytest.raises(Unavailable):
            await call(channel, timeout_s=60)
        async with served("grpcio", address):
            await until_answered(channel)


async def test_a_frozen_server_is_noticed_by_a_ping_and_found_again(free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    async with (
        child("grpcio", address) as process,
        channel_to(address, keepalive_s=0.5, ping_timeout_s=0.5) as channel,
    ):
        await call(channel)
        send_signal(process, signal.SIGSTOP)
        with pytest.raises(Unavailable):
            await call(channel, timeout_s=60)
        send_signal(process, signal.SIGCONT)
        await until_answered(channel)


async def test_an_idle_connection_to_a_frozen_server_is_given_up_too(free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    async with (
        child("grpcio", address) as process,
        channel_to(address, keepalive_s=0.3, ping_timeout_s=0.3) as channel,
    ):
        await call(channel)
        send_signal(process, signal.SIGSTOP)
        await until(lambda: channel._endpoints.pick() is None)
        send_signal(process, signal.SIGCONT)
        await until_answered(channel)


async def test_a_large_request_to_a_frozen_server_ends_by_its_deadline(free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    large = BytesValue(value=bytes(10 * 1024 * 1024)).SerializeToString()
    async with child("grpcio", address) as process, channel_to(address) as channel:
        await call(channel)
        send_signal(process, signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded):
            await channel.call(CALL, large, timeout_s=0.5)
        send_signal(process, signal.SIGCONT)
        await until_answered(channel)


async def test_connections_that_age_under_load_lose_no_call() -> None:
    async with (
        served("grpcio", connection_age_s=0.2, connection_grace_s=5) as server,
        channel_to(server.address) as channel,
        Load(channel).running() as load,
    ):
        await asyncio.sleep(2.5)
        await load.go_on(200)
    assert load.failed == []
    assert load.answered > 500


@pytest.mark.parametrize("kind", KINDS)
async def test_a_graceful_restart_lets_running_calls_finish(kind: str) -> None:
    server = await serve(kind)
    async with channel_to(server.address) as channel:
        slow = asyncio.create_task(
            channel.call(CALL, BODY, metadata=[("sleep-s", "0.5")], timeout_s=20)
        )
        await until(lambda: server.echo.running == 1)
        await server.stop(10)
        assert (await slow).message == BODY
        async with served(kind, server.address):
            await until_answered(channel)


async def test_a_bug_in_keeping_an_address_is_logged_at_once_and_ends_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(_endpoint: Endpoint) -> bool:
        raise RuntimeError("a bug")

    async with served("grpcio") as server, channel_to(server.address) as channel:
        with monkeypatch.context() as patch, capture_logs() as lines:
            patch.setattr(Endpoint, "_hold_one", broken)
            with pytest.raises(DeadlineExceeded):
                await call(channel, timeout_s=0.2)
        assert [line["event"] for line in lines] == ["addresses are not kept any more"]
        assert await call(channel) == b"hi"


# Two addresses behind one name


@dataclass
class Names:
    """The name service of a test: what "pair.test" resolves to."""

    addresses: list[str]
    is_broken: bool = False


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    loop = asyncio.get_running_loop()
    names, real = Names(["127.0.0.1", "127.0.0.2"]), loop.getaddrinfo

    async def getaddrinfo(host: str, port: int, **options: Any) -> Any:
        if host != "pair.test":
            return await real(host, port, **options)
        if names.is_broken:
            raise socket.gaierror("no name service")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in names.addresses
        ]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    return names


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_go_around_over_both_addresses(names: Names, free_port: int, kind: str) -> None:
    async with (
        served(kind, f"127.0.0.1:{free_port}") as first,
        served(kind, f"127.0.0.2:{free_port}") as second,
        channel_to(f"dns:///pair.test:{free_port}") as channel,
    ):
        await until_both(channel)
        first.echo.seen.clear(), second.echo.seen.clear()
        for _ in range(20):
            await call(channel)
        assert (len(first.echo.seen), len(second.echo.seen)) == (10, 10)


async def test_an_address_that_does_not_serve_is_left_out(names: Names, free_port: int) -> None:
    async with (
        served("grpcio", f"127.0.0.1:{free_port}") as first,
        served("grpcio", f"127.0.0.2:{free_port}") as second,
        channel_to(f"pair.test:{free_port}") as channel,
    ):
        await until_both(channel)
        first.set_serving(False)
        await until(lambda: channel._endpoints.places < 1100)
        first.echo.seen.clear(), second.echo.seen.clear()
        for _ in range(20):
            await call(channel)
        assert (len(first.echo.seen), len(second.echo.seen)) == (0, 20)


@pytest.mark.parametrize("engine", RPC_ENGINES)
async def test_a_rolling_restart_under_load_fails_no_call(
    names: Names, free_port: int, engine: str
) -> None:
    addresses = [f"127.0.0.{number}:{free_port}" for number in (1, 2)]
    servers = [await serve(engine, address) for address in addresses]
    echoes = [server.echo for server in servers]
    async with channel_to(f"pair.test:{free_port}") as channel, Load(channel).running() as load:
        await load.go_on(100)
        for _ in range(2):
            for number, address in enumerate(addresses):
                await servers[number].stop(5)
                servers[number] = await serve(engine, address)
                echoes.append(servers[number].echo)
                await until_both(channel)
                await load.go_on(100)
    for server in servers:
        await server.stop(0)
    assert load.failed == []
    # Nothing was done twice, either: each call was seen by one server.
    tries = sum((echo.tries for echo in echoes), Counter())
    del tries[""]  # not of the load
    assert len(tries) == load.answered
    assert set(tries.values()) == {1}


async def test_servers_that_are_killed_under_load_fail_no_call_that_may_be_retried(
    names: Names, free_port: int
) -> None:
    addresses = [f"127.0.0.{number}:{free_port}" for number in (1, 2)]
    async with (
        child("grpcio", addresses[0]) as first,
        child("grpcio", addresses[1]),
        channel_to(f"pair.test:{free_port}") as channel,
    ):
        await until_answered(channel)
        async with Load(channel).running() as load:
            await load.go_on(300)
            first.kill()
            await first.wait()
            await load.go_on(300)
            async with child("grpcio", addresses[0]):
                await load.go_on(300)
    assert [failure for failure in load.failed if failure[0] == SAFE] == []
    assert len(load.failed) <= 2 * CALLERS  # what was under way, twice
    assert {type(error) for _, _, error in load.failed} <= {Unreachable}


async def test_a_frozen_address_is_left_out_while_it_is_frozen(
    names: Names, free_port: int
) -> None:
    hasty = {path: replace(policy, deadline_default_s=0.25) for path, policy in POLICIES.items()}
    addresses = [f"127.0.0.{number}:{free_port}" for number in (1, 2)]
    async with (
        child("grpcio", addresses[0]) as first,
        child("grpcio", addresses[1]),
        channel_to(f"pair.test:{free_port}", policies=hasty) as channel,
    ):
        await until_both(channel)
        first.send_signal(signal.SIGSTOP)
        failures, breakers = 0, [endpoint.breaker for endpoint in channel._endpoints._endpoints]
        for _ in range(200):
            try:
                await call(channel, timeout_s=0.25)
            except DeadlineExceeded:
                failures += 1
        # Five until it is left out, then the probes.
        assert 5 <= failures < 15
        assert sorted(breaker.is_closed for breaker in breakers) == [False, True]
        first.send_signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            while not all(breaker.is_closed for breaker in breakers):
                await call(channel)


async def test_of_an_address_that_is_alone_nothing_is_left_out(free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    hasty = {path: replace(policy, deadline_default_s=0.1) for path, policy in POLICIES.items()}
    async with child("grpcio", address) as process, channel_to(address, policies=hasty) as channel:
        await call(channel)
        process.send_signal(signal.SIGSTOP)
        for _ in range(8):
            with pytest.raises(DeadlineExceeded):
                await call(channel, timeout_s=0.1)
        process.send_signal(signal.SIGCONT)
        assert await call(channel) == b"hi"


async def test_an_outage_makes_few_retries(free_port: int) -> None:
    async with (
        served("stranger", f"127.0.0.1:{free_port}") as server,
        channel_to(server.address) as channel,
    ):
        for number in range(200):
            metadata = [("down", "9"), ("key", f"{number}")]
            with pytest.raises(Unavailable):
                await channel.call(SAFE, BODY, metadata=metadata, timeout_s=10)
        attempts = len(server.echo.seen)
    # A fifth, and what any channel has for each ten seconds.
    assert 200 < attempts <= 200 * 1.2 + 2 * 20


async def test_an_address_that_leaves_the_name_finishes_its_calls(
    names: Names, free_port: int
) -> None:
    async with (
        served("grpcio", f"127.0.0.1:{free_port}") as first,
        channel_to(f"pair.test:{free_port}") as channel,
    ):
        names.addresses = ["127.0.0.1"]
        slow = asyncio.create_task(
            channel.call(CALL, BODY, metadata=[("sleep-s", "0.3")], timeout_s=20)
        )
        await until(lambda: first.echo.running == 1)
        async with served("grpcio", f"127.0.0.2:{free_port}") as second:
            names.addresses = ["127.0.0.2"]
            channel._endpoints._resolve_now.set()
            while not second.echo.seen:
                await until_answered(channel)
            seen = len(first.echo.seen)
            for _ in range(10):
                await call(channel)
            assert len(first.echo.seen) == seen
            assert (await slow).message == BODY


async def test_a_name_service_that_is_down_costs_nothing_once_addresses_are_known(
    names: Names, free_port: int
) -> None:
    names.addresses = ["127.0.0.1"]
    async with channel_to(f"pair.test:{free_port}") as channel:
        names.is_broken = True
        with pytest.raises(Unavailable):
            await call(channel, timeout_s=60)
        names.is_broken = False
        async with served("grpcio", f"127.0.0.1:{free_port}"):
            await until_answered(channel)
            names.is_broken = True
            channel._endpoints._resolve_now.set()
            for _ in range(10):
                await call(channel)
