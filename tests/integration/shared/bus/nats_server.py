"""A nats-server of a test's own, that may be killed, wiped and started again."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

READY_S = 10.0


class NatsServer:
    """One server on one port and one folder, through its deaths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        binary = Path(sys.executable).parent / "nats-server"
        config = self.folder.parent / f"{self.folder.name}.conf"
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\n'
            f'jetstream {{ store_dir: "{self.folder}", sync_interval: always }}\n'
        )
        self._process = subprocess.Popen(  # noqa: ASYNC220 -- returns at once
            [str(binary), "--config", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder.parent)},
        )
        async with asyncio.timeout(READY_S):
            while not await self._answers():  # noqa: ASYNC110 -- another process
                await asyncio.sleep(0.02)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        line = await reader.readline()
        writer.close()
        return line.startswith(b"INFO")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """As a disk that was replaced."""
        shutil.rmtree(self.folder)
