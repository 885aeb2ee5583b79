"""A frozen server is noticed by pings: TCP alone would not tell for a long time."""

import asyncio
import signal
import sys
import time

import pytest
from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.auth.v1 import auth_service_pb2_grpc as auth_grpc

from shared.errors import TenfoldError
from shared.rpc.client import Channels, Upstreams
from shared.signals import send_signal


@pytest.mark.usefixtures("engine")
async def test_a_frozen_server_is_noticed_within_seconds_and_found_again() -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.integration.shared.rpc.frozen_server",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    try:
        port = int(await asyncio.wait_for(server.stdout.readline(), 20))
        channels = Channels(Upstreams({"*": f"127.0.0.1:{port}"}), keepalive_s=1, ping_timeout_s=1)
        stub = auth_grpc.TokenServiceStub(channels.channel("tenfold.auth.v1.TokenService"))
        await stub.GetJwks(auth.GetJwksRequest())
        send_signal(server, signal.SIGSTOP)
        start_s = time.monotonic()
        with pytest.raises(TenfoldError) as refusal:
            await stub.GetJwks(auth.GetJwksRequest(), timeout=30)
        assert refusal.value.error_reason == "UNAVAILABLE"
        assert time.monotonic() - start_s < 5
        send_signal(server, signal.SIGCONT)
        async with asyncio.timeout(10):
            while True:
                try:
                    await stub.GetJwks(auth.GetJwksRequest(), timeout=5)
                except TenfoldError:
                    await asyncio.sleep(0.05)
                else:
                    break
        await channels.close()
    finally:
        send_signal(server, signal.SIGKILL)
        await server.wait()
