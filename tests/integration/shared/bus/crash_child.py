"""A process that relays, applies and works, until it is killed: run by test_kills.py.

python -m tests.integration.shared.bus.crash_child NATS_URL FOLDER [STARTS_MAX]
"""

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from shared.bus import rules
from shared.bus.jetstream import open_bus
from shared.bus.outbox import run_relay
from shared.bus.worker import Job, JobQueue, run_jobs, run_subscription
from shared.clock import SystemClock
from tests.integration.shared.bus.ledger import open_shards, record, recording

CLOCK = SystemClock()


async def record_or_die(tx, event):
    if event.aggregate == "transactions/killer":
        os.kill(os.getpid(), signal.SIGKILL)
    await record(tx, event)


async def main(url: str, folder: Path) -> None:
    async def work(job: Job) -> None:
        place = folder / "done" / job.payload.decode()
        place.parent.mkdir(exist_ok=True)
        with place.open("a") as file:
            file.write("x")

    subscription = replace(recording(ack_wait_s=1.0), handle=record_or_die)
    async with (
        open_bus(url, name="child") as bus,
        open_shards(folder, "payment", CLOCK) as source,
        open_shards(folder, "reporting", CLOCK) as sink,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(run_relay(source, bus, service="payment", clock=CLOCK))
        tasks.create_task(run_subscription(bus, sink, subscription, clock=CLOCK))
        tasks.create_task(run_jobs(bus, JobQueue("payment", "print", work, ack_wait_s=1.0)))


if __name__ == "__main__":
    rules.SUSPECT_AT, rules.STARTS_MAX = 2, int(sys.argv[3])
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
