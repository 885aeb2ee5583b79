"""Reads what only the broker knows into a file: of the mesh that runs, or of one that stands."""

import secrets
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from deploy.local import servers
from deploy.local.address import free_addresses
from deploy.local.data_folder import DataFolder
from deploy.local.errors import LaunchError
from deploy.local.supervisor import open_supervisor
from shared.bus.jetstream import Bus, BusUnavailable, open_bus
from shared.bus.owed import Unread, read_owed, unfinished_events, unfinished_jobs
from shared.bus.rules import MESSAGE_ID

CLIENT = "tenfold backup"


class Broker:
    """Where the messages of a data folder are read, in two parts: before and after the cut.

    Args:
        folder: the mesh's.
        is_running: else a server is started on its streams, and nothing is left for later.
        into: the file, which is there.
        environ: names another server program, perhaps.
    """

    def __init__(
        self, folder: DataFolder, *, is_running: bool, into: Path, environ: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._is_running = is_running
        self._into = into
        self._environ = environ
        self._later: list[Unread] = []
        self._known: set[tuple[str, str]] = set()
        self.count = 0

    async def read_before_cut(self) -> None:
        """Note where consumers are, and read the jobs that wait.

        Raises:
            LaunchError: the broker cannot be asked.
        """
        async with self._bus() as bus:
            if bus is None:
                return
            self._later = await unfinished_events(bus)
            await self._read(bus, await unfinished_jobs(bus))
            if not self._is_running:
                await self._read(bus, self._later)
                self._later = []

    async def read_after_cut(self) -> None:
        """Read the events that consumers have not finished.

        Raises:
            LaunchError: the broker cannot be asked any more.
        """
        if not self._later:
            return
        async with self._bus() as bus:
            assert bus is not None, "it was there before"
            await self._read(bus, self._later)

    async def _read(self, bus: Bus, parts: Iterable[Unread]) -> None:
        with self._into.open("ab") as file:
            for part in parts:
                async for message in read_owed(bus, part):
                    key = (message.subject, message.headers.get(MESSAGE_ID, secrets.token_hex()))
                    if key in self._known:
                        continue  # several consumers have not finished it
                    self._known.add(key)
                    self.count += 1
                    file.write(message.to_line())

    @asynccontextmanager
    async def _bus(self) -> AsyncIterator[Bus | None]:
        async with AsyncExitStack() as stack:
            if self._is_running:
                url = servers.nats_url_of(self._folder.nats)
            elif (self._folder.nats / "jetstream").is_dir():
                url = await stack.enter_async_context(self._served())
            else:
                yield None
                return
            try:
                bus = await stack.enter_async_context(open_bus(url, name=CLIENT))
                if not bus.is_connected:
                    raise LaunchError("The mesh's NATS does not answer: try again when it does.")
                yield bus
            except BusUnavailable as error:
                raise LaunchError(
                    f"The mesh's NATS cannot be read ({error}): try again."
                ) from error

    @asynccontextmanager
    async def _served(self) -> AsyncIterator[str]:
        """A server on the streams of a mesh that does not run."""
        [address], token = free_addresses(1), servers.new_token()
        program = servers.nats_program(
            self._folder.nats, address, token=token, environ=self._environ
        )
        async with open_supervisor(logs=self._folder.logs, say=lambda _: None) as supervisor:
            await supervisor.start(program)
            yield servers.nats_url(address, token)
