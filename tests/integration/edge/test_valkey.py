"""The connection to Valkey, against a real server."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.local.binaries import valkey_server
from edge.valkey import ValkeyConnection, ValkeyError
from tests.mesh import poll_until

PATIENT_S = 10.0


@contextmanager
def listening_on(path: Path) -> Iterator[None]:
    """A server that can be reached over this socket alone."""
    command = [str(valkey_server(os.environ)), "--port", "0", "--unixsocket", str(path)]
    process = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        poll_until(path.exists, timeout_s=PATIENT_S, what="valkey-server")
        yield
    finally:
        process.kill()
        process.wait()


async def test_a_unix_socket_is_reached_by_its_path(tmp_path):
    path = tmp_path / "valkey.sock"
    with listening_on(path):
        connection = ValkeyConnection(f"unix://{path}?db=3", timeout_s=PATIENT_S)
        await connection.execute("SET", "a", "1")
        assert await connection.execute("GET", "a") == b"1"
        assert b"db=3" in await connection.execute("CLIENT", "INFO")
        connection.close()


async def test_a_socket_that_is_not_there_is_no_other_server(tmp_path):
    connection = ValkeyConnection(f"unix://{tmp_path}/nobody.sock", timeout_s=PATIENT_S)
    with pytest.raises(FileNotFoundError):
        await connection.execute("PING")


async def test_closed_is_closed_for_good(valkey_url):
    connection = ValkeyConnection(valkey_url, timeout_s=PATIENT_S)
    assert await connection.execute("PING") == b"PONG"
    connection.close()
    for _ in range(2):
        with pytest.raises(ValkeyError, match="closed here"):
            await connection.execute("PING")


async def test_a_connection_that_is_closed_while_it_is_made_stays_closed():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://:secret@127.0.0.1:{silent.getsockname()[1]}"
        connection = ValkeyConnection(url, timeout_s=PATIENT_S)
        asking = asyncio.create_task(connection.execute("PING"))
        peer, _ = await asyncio.to_thread(silent.accept)
        with peer:
            await asyncio.sleep(0.05)  # it introduces itself now, and is not answered
            connection.close()
            await asyncio.to_thread(peer.sendall, b"+OK\r\n")
            with pytest.raises(ValkeyError, match="closed here"):
                await asking
