"""Payment as a process opens it: real files, a real NATS server, the relay at work."""

import asyncio
import secrets
from pathlib import Path

import pytest
from tenfold.ledger.v1.ledger_events_pb2 import AccountOpened
from tenfold.ledger.v1.ledger_pb2 import Account as AccountMessage
from tenfold.ledger.v1.ledger_service_pb2 import CreateAccountRequest, NewAccount

from services.payment.wiring import open_service
from shared.bus.jetstream import open_bus
from shared.clock import SystemClock
from shared.config import ConfigError, ProcessConfig
from shared.db.errors import DatabaseDamaged
from shared.identity import RevocationList
from shared.rpc.client import Channels, Upstreams
from shared.rpc.context import Context
from shared.runtime import Runtime
from tests.integration.services.payment.conftest import key, new_user

METHOD = "/tenfold.ledger.v1.LedgerService/CreateAccount"


@pytest.fixture
async def runtime(tmp_path: Path, nats_url: str):
    async with open_bus(nats_url, name="payment-test") as bus:
        yield Runtime(
            config=ProcessConfig(data=tmp_path),
            environ={},
            clock=SystemClock(),
            bus=bus,
            channels=Channels(Upstreams.parse("*=127.0.0.1:1"), None),
            secret=secrets.token_bytes(32),
            spawner=None,  # payment runs no programs
            revocations=RevocationList(),
            set_serving=lambda *_: None,
        )


async def test_what_the_service_does_reaches_the_bus(runtime):
    received: asyncio.Queue = asyncio.Queue()
    async with open_service(runtime) as service, asyncio.TaskGroup() as tasks:
        loops = [tasks.create_task(loop()) for loop in service.loops]
        await runtime.bus.ensure_streams("payment")

        async def on_message(message) -> None:
            await received.put(message)

        subscription = await runtime.bus.jetstream.subscribe("evt.payment.>", cb=on_message)
        context = Context(method=METHOD, request_id="r", metadata={}, rpc=None)
        context.principal, context.idempotency_key = new_user(bucket=1234), key()
        request = CreateAccountRequest(account=NewAccount(currency_code="EUR"))
        [registration] = service.registrations
        account: AccountMessage = await registration.handler.CreateAccount(request, context)
        message = await asyncio.wait_for(received.get(), 10)
        assert message.subject == "evt.payment.AccountOpened.1234"
        assert AccountOpened.FromString(message.data).account == account
        assert message.headers["tenfold-aggregate"] == account.name
        assert message.headers["tenfold-aggregate-version"] == "1"
        assert message.headers["tenfold-type"] == "tenfold.ledger.v1.AccountOpened"
        await subscription.unsubscribe()
        for loop in loops:
            loop.cancel()


async def test_a_damaged_ledger_is_not_opened(runtime):
    async with open_service(runtime):
        pass
    path = runtime.folder_of("payment") / "shards" / "shard-0.sqlite"
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(DatabaseDamaged, match=r"shard-0\.sqlite is damaged"):
        async with open_service(runtime):
            pass


async def test_a_wrong_setting_is_named(runtime):
    runtime = Runtime(**{**runtime.__dict__, "environ": {"TENFOLD_PAYMENT_SHARD_COUNT": "0"}})
    with pytest.raises(ConfigError, match="TENFOLD_PAYMENT_SHARD_COUNT"):
        async with open_service(runtime):
            pass
