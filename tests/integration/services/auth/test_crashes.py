"""Sign-ups whose process dies half way: real processes, killed at each named point."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.errors import TenfoldError, Unauthenticated, Unavailable
from shared.identity import IdentitySigner, RevocationList
from shared.rpc.client import Channels, Upstreams
from shared.signals import send_signal
from tests.fakes import ManualClock
from tests.integration.services.auth.harness import Auth, new_email, write_keys

READY_S = 20.0


@asynccontextmanager
async def process(data: Path, nats_url: str, port: int, crash: str = "") -> AsyncIterator[Auth]:
    """`python -m services auth`, perhaps with an armed crash point."""
    environ = {
        **os.environ,
        "TENFOLD_DATA": str(data),
        "TENFOLD_NATS_URL": nats_url,
        "TENFOLD_LISTEN": f"127.0.0.1:{port}",
        "TENFOLD_CRASH_POINT": crash,
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services", "auth", env=environ, stdout=subprocess.DEVNULL
    )
    edge = IdentitySigner("edge", (data / "identity" / "edge.pem").read_bytes())
    channels = Channels(Upstreams({"*": f"127.0.0.1:{port}"}), edge)
    try:
        running = Auth(port, data, ManualClock(), channels, edge, RevocationList())
        await serving(running)
        yield running
    finally:
        await channels.close()
        send_signal(child, signal.SIGTERM)
        try:
            await asyncio.wait_for(child.wait(), 15)
        except TimeoutError:
            send_signal(child, signal.SIGKILL)
            await child.wait()
    assert child.returncode in {0, -signal.SIGKILL}


async def serving(running: Auth) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            await running.verifier()
        except Unavailable:
            await asyncio.sleep(0.05)
        else:
            return
    raise AssertionError("auth did not come up")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("point", ["auth.email_claimed", "auth.user_created"])
async def test_a_sign_up_that_was_cut_short_can_be_finished_under_its_key(
    tmp_path: Path, nats_url: str, point: str
) -> None:
    write_keys(tmp_path)
    email = new_email()
    async with process(tmp_path, nats_url, free_port(), point) as running:
        with pytest.raises(TenfoldError):
            await running.sign_up(email)
    async with process(tmp_path, nats_url, free_port()) as running:
        await running.sign_up(email)
        session = await running.log_in(email)
        assert session.tokens.access_token


async def test_a_created_user_whose_sign_up_never_returns_is_confirmed_by_the_worker(
    tmp_path: Path, nats_url: str
) -> None:
    write_keys(tmp_path)
    email = new_email()
    async with process(tmp_path, nats_url, free_port(), "auth.user_created") as running:
        with pytest.raises(Unavailable):
            await running.sign_up(email)
    async with process(tmp_path, nats_url, free_port()) as running:
        async with asyncio.timeout(20):
            while True:
                try:
                    await running.log_in(email)
                except Unauthenticated:
                    await asyncio.sleep(0.5)
                else:
                    break
