"""Processes killed on purpose, at each step and by an event that kills whoever runs it."""

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.bus.jetstream import open_bus
from shared.clock import SystemClock
from shared.db.port import OutboxRow
from shared.signals import send_signal
from tests.integration.shared.bus.ledger import (
    applied,
    dead_letters,
    emit,
    open_shards,
    order_of,
    posted,
    unsent,
)

CLOCK = SystemClock()
ROOT = Path(__file__).parents[4]
CHILD_S = 30.0


@asynccontextmanager
async def child(url, folder, *, crash_point="", starts_max=3):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.shared.bus.crash_child"),
        *(url, str(folder), str(starts_max)),
        cwd=ROOT,
        env={**os.environ, "TENFOLD_CRASH_POINT": crash_point},
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        send_signal(process, signal.SIGKILL)
        await process.wait()


async def dies(url, folder, crash_point):
    async with child(url, folder, crash_point=crash_point) as process:
        code = await asyncio.wait_for(process.wait(), CHILD_S)
        assert code == -signal.SIGKILL, f"{crash_point} was never passed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "crash_point",
    [
        "relay.published_not_marked:1",
        "worker.before_commit:3",
        "worker.committed_not_acked:3",
        "db.before_commit:4",
        "db.after_commit:4",
        "jobs.done_not_acked:1",
    ],
)
async def test_killed_at_any_step_nothing_is_lost_and_nothing_happens_twice(
    tmp_path, nats, eventually, crash_point
):
    expected = []
    async with open_shards(tmp_path, "payment", CLOCK) as source:
        for number in range(6):
            reference = f"r{number}"
            expected.append(reference)
            await emit(source, number * 700, posted(f"transactions/{number % 2}", reference))
        job = OutboxRow("print", "prints/1", b"one", "default", queue="print")
        await emit(source, 5, job)
    async with open_shards(tmp_path, "reporting", CLOCK):
        pass
    await dies(nats.url, tmp_path, crash_point)
    async with (
        child(nats.url, tmp_path) as process,
        open_bus(nats.url, name="test") as bus,
        open_shards(tmp_path, "reporting", CLOCK) as sink,
        open_shards(tmp_path, "payment", CLOCK) as source,
    ):

        async def all_done():
            assert process.returncode is None
            work = await bus.stream_info("WRK_payment")
            is_worked = work is not None and work.state.messages == 0
            return len(await applied(sink)) >= 6 and await unsent(source) == 0 and is_worked

        await eventually(all_done, timeout_s=30)
        assert await applied(sink) == expected
        assert await dead_letters(sink) == []
        assert (tmp_path / "done" / "one").exists()


@pytest.mark.slow
async def test_an_event_that_kills_its_worker_ends_in_the_dead_letters(tmp_path, nats, eventually):
    async with open_shards(tmp_path, "payment", CLOCK) as source:
        await emit(source, 1, posted("transactions/killer", "k"), posted("transactions/1", "r1"))
    async with open_shards(tmp_path, "reporting", CLOCK):
        pass
    deaths = 0
    for _ in range(6):
        async with (
            child(nats.url, tmp_path, starts_max=1) as process,
            open_shards(tmp_path, "reporting", CLOCK) as sink,
        ):

            async def is_over(process=process, sink=sink):
                if process.returncode is not None:
                    return True
                return await dead_letters(sink) and await applied(sink)

            await eventually(is_over, timeout_s=CHILD_S)
            if letters := await dead_letters(sink):
                break
            deaths += 1
    assert deaths == 2
    assert letters == [("it ended every worker that ran it", 3)]
    async with open_shards(tmp_path, "reporting", CLOCK) as sink:
        assert await applied(sink) == ["r1"]
        assert await order_of(sink, 1, "transactions/killer") == []
