"""The service as its process opens it: events come in over a real bus."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.reporting.domain import DayInterval, Scope
from services.reporting.store import SqlReportStore
from services.reporting.wiring import open_service
from shared.bus.jetstream import Bus, open_bus
from shared.bus.outbox import run_relay
from shared.clock import Clock, SystemClock
from shared.db.port import OutboxRow
from tests.integration.services.reporting.conftest import SECRET, person, transfer
from tests.integration.shared.bus.ledger import emit, open_shards
from tests.integration.shared.bus.nats_server import NatsServer


@dataclass
class Host:
    """What the service takes from its process."""

    bus: Bus
    folder: Path
    secret: bytes = SECRET
    clock: Clock = field(default_factory=SystemClock)
    environ: dict[str, str] = field(default_factory=dict)

    def folder_of(self, service: str) -> Path:
        return self.folder / service


@pytest.fixture
async def bus(tmp_path):
    server = NatsServer(tmp_path / "jetstream")
    await server.start()
    async with open_bus(server.url, name="test") as opened:
        yield opened
    server.kill()


async def test_events_that_were_there_before_the_service_are_counted(tmp_path, bus):
    ann, bob = person(), person()
    clock = SystemClock()
    async with open_shards(tmp_path, "payment", clock) as source:
        for _ in range(3):
            message = transfer(ann, bob, 7)
            name = f"transactions/{id(message)}"
            row = OutboxRow(
                message.DESCRIPTOR.full_name, name, message.SerializeToString(), "default"
            )
            await emit(source, 77, row)
        async with open_service(Host(bus, tmp_path)) as service:
            assert service.name == "reporting"
            loops = [loop() for loop in service.loops]
            loops.append(run_relay(source, bus, service="payment", clock=clock))
            tasks = [asyncio.create_task(loop) for loop in loops]
            try:
                handler = service.registrations[0].handler
                added = await reached(handler._store, Scope("default", ann.owner), count=3)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=10)
    values = {(one.metric, one.currency_code): one.value for one in added.sums}
    assert values == {("ledger.debits", "EUR"): 21, ("ledger.transactions", ""): 3}


async def reached(store: SqlReportStore, scope: Scope, *, count: int):
    """The sums of today once so many events are counted."""
    today = datetime.now(UTC).date()
    async with asyncio.timeout(20):
        while (await store.watermark(scope)).event_count < count:  # noqa: ASYNC110 -- in a database
            await asyncio.sleep(0.05)
    return await store.sums(scope, DayInterval(today, today))
