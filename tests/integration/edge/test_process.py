"""python -m edge: a process that starts from its environment alone."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.signals import send_signal
from tests.integration.edge.behind import KNOWN, Behind

START_TIMEOUT_S = 20.0


def environment(behind: Behind, folder: Path, **more: str) -> dict[str, str]:
    (folder / "edge.pem").write_bytes(behind.identity_pem)
    return {
        "PATH": os.environ["PATH"],
        "TENFOLD_EDGE_LISTEN": "127.0.0.1:0",
        "TENFOLD_UPSTREAMS": f"*={behind.address}",
        "TENFOLD_IDENTITY_FOLDER": str(folder),
        "TENFOLD_VALKEY_URL": "redis://127.0.0.1:1",
        **more,
    }


async def start(environ: dict[str, str]) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge", stdout=PIPE, stderr=PIPE, env=environ
    )


@asynccontextmanager
async def running(environ: dict[str, str]) -> AsyncIterator[tuple[Process, dict[str, Any]]]:
    """A process, and the line in which it says where it serves."""
    process = await start(environ)
    try:
        yield process, await told_by(process)
    finally:
        send_signal(process, signal.SIGKILL)
        await process.communicate()


async def told_by(process: Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        async for line in process.stdout:
            if json.loads(line).get("event") == "serving":
                return json.loads(line)
    raise AssertionError("it ended without serving")


async def test_it_serves_says_where_and_drains_on_sigterm(behind, tmp_path):
    async with running(environment(behind, tmp_path)) as (process, told):
        async with httpx.AsyncClient(base_url=told["url"], timeout=10) as client:
            until = time.monotonic() + START_TIMEOUT_S
            while (await client.get("/readyz")).status_code != 200:
                assert time.monotonic() < until
                await asyncio.sleep(0.05)
            headers = {"authorization": f"Bearer {behind.tokens.token()}"}
            assert (await client.get(f"/v1/{KNOWN}", headers=headers)).status_code == 200
            slow = asyncio.create_task(
                client.get("/v1/accounts/slow", headers={**headers, "grpc-timeout": "1500m"})
            )
            await asyncio.sleep(0.3)
            send_signal(process, signal.SIGTERM)
            assert (await slow).status_code == 504  # it was let finish
        assert await asyncio.wait_for(process.wait(), 10) == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("TENFOLD_EDGE_LISTEN", "nowhere"),
        ("TENFOLD_EDGE_BODY_BYTES_MAX", "many"),
        ("TENFOLD_EDGE_TRUSTED_HOPS", "-1"),
        ("TENFOLD_UPSTREAMS", "nonsense"),
        ("TENFOLD_IDENTITY_FOLDER", "/nonexistent"),
        ("TENFOLD_EDGE_DESCRIPTORS", "/nonexistent"),
        ("TENFOLD_EDGE_API_BURST_POINTS", "3"),
        ("TENFOLD_EDGE_ALLOW_ANONYMOUS", "true"),  # a mesh knows who calls
        ("TENFOLD_EDGE_UPSTREAM_CA", "/nonexistent"),
    ],
)
async def test_a_wrong_setting_is_one_sentence_that_names_it_and_exit_1(
    behind, tmp_path, setting, value
):
    process = await start({**environment(behind, tmp_path), setting: value})
    _, errors = await asyncio.wait_for(process.communicate(), START_TIMEOUT_S)
    assert process.returncode == 1
    assert len(errors.decode().strip().splitlines()) == 1, errors.decode()
    assert setting in errors.decode() or value in errors.decode()


async def test_a_taken_port_is_one_sentence_and_exit_1(behind, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await start(environment(behind, tmp_path, TENFOLD_EDGE_LISTEN=address))
        _, errors = await asyncio.wait_for(process.communicate(), START_TIMEOUT_S)
    assert process.returncode == 1
    assert address in errors.decode()
    assert len(errors.decode().strip().splitlines()) == 1


async def test_it_starts_before_its_services_and_becomes_ready_with_them(tmp_path):
    late = Behind()
    await late.start()
    environ = environment(late, tmp_path)
    await late.stop()
    async with (
        running(environ) as (_, told),
        httpx.AsyncClient(base_url=told["url"], timeout=10) as client,
    ):
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert "tenfold.ledger.v1.LedgerService" in answer.json()["details"]["missing"]
        assert (await client.get("/healthz")).status_code == 200
        await late.restart()
        until = time.monotonic() + START_TIMEOUT_S
        while (await client.get("/readyz")).status_code != 200:
            assert time.monotonic() < until
            await asyncio.sleep(0.05)
        late.server.set_serving("tenfold.media.v1.VideoService", False)
        await asyncio.sleep(0.5)
        answer = await client.get("/readyz")
        assert answer.json()["details"]["missing"] == "tenfold.media.v1.VideoService"
    await late.stop()
