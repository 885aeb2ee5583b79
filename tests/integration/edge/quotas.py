"""Stores of several edges on one Valkey, as tests of quotas need them."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from deploy.local import servers
from deploy.local.address import free_addresses
from deploy.local.supervisor import WRAPPER
from edge.accounts import Account, Bucket
from edge.quota_store import Verdict
from edge.quota_valkey import ValkeyQuotas, open_valkey
from shared.clock import Clock, SystemClock
from shared.quota.gcra import Quota
from shared.quota.keys import Level
from tests.mesh import poll_until

PATIENT_S = 5.0  # other tests' load must not look like an outage
AWAY = "redis://127.0.0.1:1"


def new_key() -> str:
    return f"test-quota:{uuid4()}"


@dataclass
class Caller:
    """A caller as several edges see it: one key per level, one account per edge."""

    quotas: tuple[Quota, ...]
    keys: list[str] = field(default_factory=list)
    accounts: dict[int, Account] = field(default_factory=dict)

    @classmethod
    def of(cls, *quotas: Quota, keys: list[str] | None = None) -> "Caller":
        return cls(quotas, keys or [new_key() for _ in quotas])

    def at(self, store: ValkeyQuotas) -> Account:
        if id(store) not in self.accounts:
            levels = (Level.CREDENTIAL, Level.TENANT, Level.GLOBAL)
            rows = zip(self.keys, self.quotas, levels, strict=False)
            self.accounts[id(store)] = Account(tuple(Bucket(*row) for row in rows))
        return self.accounts[id(store)]

    async def spend(self, store: ValkeyQuotas, cost: int = 1, *, strict: bool = False) -> Verdict:
        account = self.at(store)
        verdict = store.decide_now(account, cost, is_strict=strict)
        return verdict or await store.decide(account, cost, is_strict=strict)


@asynccontextmanager
async def stores_on(
    url: str,
    count: int = 1,
    *,
    timeout_s: float = PATIENT_S,
    clock: Clock | None = None,
    server_clock: Clock | None = None,
) -> AsyncIterator[list[ValkeyQuotas]]:
    """As many edges' stores, each with a connection of its own, that know of each other."""
    async with AsyncExitStack() as stack:
        stores = []
        for _ in range(count):
            client = await stack.enter_async_context(open_valkey(url, timeout_s=timeout_s))
            store = ValkeyQuotas(
                client, clock or SystemClock(), edge=uuid4().hex, server_clock=server_clock
            )
            store.edge_count = count
            stores.append(store)
        yield stores


async def until_back(store: ValkeyQuotas) -> None:
    """Ask for Valkey until it answers."""
    for _ in range(200):
        if await store.beat() is not None:
            return
        await asyncio.sleep(0.05)
    raise TimeoutError


async def passed(caller: Caller, store: ValkeyQuotas, calls: int, cost: int = 1, **how) -> int:
    """How many of so many calls, one after the other, are let in."""
    return sum([(await caller.spend(store, cost, **how)).is_allowed for _ in range(calls)])


class Valkey:
    """A real Valkey of a test's own, to be killed, frozen, flushed or starved."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        [self._address] = free_addresses(1)
        self._folder, self._token, self._extra = folder, servers.new_token(), extra
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return servers.valkey_url(self._address, self._token)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        program = servers.valkey_program(
            self._folder, self._address, token=self._token, environ=os.environ
        )
        config = Path(program.argv[-1])
        config.write_text(config.read_text() + self._extra)
        command = [sys.executable, "-I", "-S", str(WRAPPER), str(os.getpid()), "-", *program.argv]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        poll_until(self._answers, timeout_s=30, what="valkey")

    def _answers(self) -> bool:
        with (
            suppress(OSError),
            socket.create_connection((self._address.host, self._address.port), timeout=1) as talk,
        ):
            talk.sendall(f"AUTH {self._token}\r\nPING\r\n".encode())
            return talk.recv(100).startswith(b"+OK")
        return False

    def flush(self) -> None:
        with socket.create_connection((self._address.host, self._address.port), timeout=5) as talk:
            talk.sendall(f"AUTH {self._token}\r\nFLUSHALL\r\nQUIT\r\n".encode())
            while talk.recv(100):
                pass

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def valkey_of_its_own(folder: Path, extra: str = "") -> Iterator[Valkey]:
    server = Valkey(folder, extra)
    server.start()
    try:
        yield server
    finally:
        server.signal(signal.SIGCONT)
        server.kill()
