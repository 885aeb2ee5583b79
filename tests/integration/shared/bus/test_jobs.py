import asyncio
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from shared.bus import rules
from shared.bus.jetstream import Bus
from shared.bus.worker import Job, JobQueue, run_jobs


async def publish_job(bus: Bus, payload: bytes = b"x", **headers: str) -> None:
    await bus.ensure_streams("media")
    basics = {
        rules.MESSAGE_ID: str(uuid4()),
        rules.TYPE: "transcode",
        rules.AGGREGATE: "videos/1",
        rules.TENANT: "default",
    }
    await bus.publish(rules.work_subject("media", "transcode", 7), payload, basics | headers)


@asynccontextmanager
async def working(bus: Bus, queue: JobQueue):
    task = asyncio.create_task(run_jobs(bus, queue))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=10)
        assert task.done(), "the loop does not end when it is cancelled"


def queue_of(handle, **changes) -> JobQueue:
    settings = {"concurrency": 2, "ack_wait_s": 1.0} | changes
    return JobQueue("media", "transcode", handle, **settings)


async def stored(bus: Bus, stream: str) -> int:
    info = await bus.stream_info(stream)
    return info.state.messages if info else -1


async def test_a_job_is_done_once_and_leaves_the_queue(bus, eventually):
    done: list[Job] = []

    async def handle(job: Job) -> None:
        done.append(job)

    await publish_job(bus, b"payload")
    async with working(bus, queue_of(handle)):
        await eventually(lambda: done)

        async def is_empty() -> bool:
            return await stored(bus, "WRK_media") == 0

        await eventually(is_empty)
    [job] = done
    assert (job.payload, job.bucket, job.name, job.delivery_count) == (
        b"payload",
        7,
        "transcode",
        1,
    )


async def test_a_job_longer_than_ack_wait_is_not_given_to_a_second_worker(bus, eventually):
    starts = []

    async def handle(job: Job) -> None:
        starts.append(job.delivery_count)
        await asyncio.sleep(3)  # three times ack_wait: only heartbeats keep it

    await publish_job(bus)
    async with working(bus, queue_of(handle)):

        async def is_empty() -> bool:
            return await stored(bus, "WRK_media") == 0

        await eventually(is_empty)
    assert starts == [1]


async def test_a_job_cut_short_goes_to_another_worker_at_once(bus, eventually):
    starts = []

    async def handle(job: Job) -> None:
        starts.append(job.delivery_count)
        if job.delivery_count == 1:
            await asyncio.Event().wait()

    await publish_job(bus)
    async with working(bus, queue_of(handle, ack_wait_s=60.0)):
        await eventually(lambda: starts == [1])
    async with working(bus, queue_of(handle, ack_wait_s=60.0)):
        await eventually(lambda: starts == [1, 2])


async def test_a_job_that_always_fails_is_reported_once_and_the_others_go_on(bus, eventually):
    done, given_up = [], []

    async def handle(job: Job) -> None:
        if job.payload == b"bad":
            raise ValueError("no such codec")
        done.append(job.payload)

    async def on_poison(job: Job, error: str) -> None:
        given_up.append((job.payload, job.delivery_count, error))

    await publish_job(bus, b"bad")
    await publish_job(bus, b"good")
    async with working(bus, queue_of(handle, on_poison=on_poison, max_tries=2)):
        await eventually(lambda: given_up and done)

        async def is_empty() -> bool:
            return await stored(bus, "WRK_media") == 0

        await eventually(is_empty)
    assert given_up == [(b"bad", 2, "ValueError: no such codec")]
    assert done == [b"good"]


async def test_a_job_nobody_asks_about_ends_in_the_dead_stream(bus, eventually):
    async def handle(_: Job) -> None:
        raise ValueError("never")

    await publish_job(bus, b"bad")
    async with working(bus, queue_of(handle, max_tries=1)):

        async def is_dead() -> bool:
            return await stored(bus, "DLQ_media") == 1 and await stored(bus, "WRK_media") == 0

        await eventually(is_dead)


async def test_no_more_jobs_run_at_once_than_asked(bus, eventually):
    running, most, done = 0, 0, []

    async def handle(job: Job) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.1)
        running -= 1
        done.append(job)

    for _ in range(6):
        await publish_job(bus)
    async with working(bus, queue_of(handle)):
        await eventually(lambda: len(done) == 6)
    assert most == 2


@pytest.mark.slow
async def test_jobs_go_on_after_the_server_was_killed_and_started(nats, bus, eventually):
    done: set[bytes] = set()

    async def handle(job: Job) -> None:
        done.add(job.payload)
        await asyncio.sleep(0.05)

    for number in range(10):
        await publish_job(bus, str(number).encode())
    async with working(bus, queue_of(handle)):
        await eventually(lambda: len(done) >= 2)
        nats.kill()
        await nats.start()
        await eventually(lambda: len(done) == 10)
