"""Long work from a queue: one job, one worker, with heartbeats, until it is acked.

A job stays in its stream until a worker says that it is done; a worker that dies stops
its heartbeats, and another gets the job after ack_wait. A job may therefore run twice,
even at the same time: its effects must bear it, by a fencing row or a content-addressed
place. The delivery count is the server's, so a job that kills its worker is counted too.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

import nats.errors
import structlog
from nats.aio.msg import Msg

from shared.bus import rules
from shared.bus.checkpoint import checkpoint
from shared.bus.jetstream import Bus, BusUnavailable, consumer_definition
from shared.bus.pull import Pull, Slots, run_pull
from shared.crashpoints import CrashPoint

DELIVER_WITHOUT_END = -1
"""A work-queue stream keeps a job that the server gave up, for ever and out of sight; our
own rule ends the tries and takes the job out."""

ACK_S = 5.0
GIVE_BACK_S = 1.0

DONE_NOT_ACKED = CrashPoint("jobs.done_not_acked", "the job's work is done, the message not acked")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Job:
    """One job as it was delivered.

    Attributes:
        id: the same for every delivery.
        name: what to do; the outbox row's type.
        bucket: where its root lives.
        aggregate: the resource's name.
        tenant: whose job it is.
        payload: as it was appended to the outbox.
        delivery_count: 1 for the first try.
        headers: everything else that came along.
    """

    id: UUID
    name: str
    bucket: int
    aggregate: str
    tenant: str
    payload: bytes
    delivery_count: int
    headers: Mapping[str, str]


@dataclass(frozen=True)
class JobQueue:
    """A queue and who works it.

    Attributes:
        service: the owner of the queue.
        queue: its name, as in OutboxRow.queue.
        handle: does one job. Returning means done; an exception means: later again.
        concurrency: jobs at once in this process, 1 or more.
        on_poison: told of a job that failed max_tries times, and why; when it returns the
            job is gone. None moves the job to the stream DLQ_<service>.
        max_tries: deliveries before a job is given up.
        ack_wait_s: silence after which another worker gets the job; heartbeats come at a
            third of it.
    """

    service: str
    queue: str
    handle: Callable[[Job], Awaitable[None]]
    concurrency: int = 1
    on_poison: Callable[[Job, str], Awaitable[None]] | None = None
    max_tries: int = rules.POISON_AT
    ack_wait_s: float = rules.ACK_WAIT_S


async def run_jobs(bus: Bus, queue: JobQueue) -> None:
    """Work on jobs until cancelled; a job cut short goes to another worker at once.

    Raises:
        BusClosed: the connection will never come back.
    """
    waiting: asyncio.Queue[Msg] = asyncio.Queue()
    pull = Pull(
        stream=rules.work_stream(queue.service),
        consumer=consumer_definition(
            f"{queue.service}-{queue.queue}",
            subject=f"wrk.{queue.service}.{queue.queue}.*",
            ack_wait_s=queue.ack_wait_s,
            max_deliver=DELIVER_WITHOUT_END,
            max_ack_pending=1000,
        ),
        prepare=lambda: bus.ensure_readable(queue.service),
        slots=Slots(queue.concurrency),
        accept=waiting.put_nowait,
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_pull(bus, pull))
        for _ in range(queue.concurrency):
            tasks.create_task(_run_worker(bus, queue, pull, waiting))


async def _run_worker(bus: Bus, queue: JobQueue, pull: Pull, waiting: "asyncio.Queue[Msg]") -> None:
    while True:
        checkpoint()
        message = await waiting.get()
        try:
            await _settle(bus, queue, pull, message)
        except (nats.errors.Error, TimeoutError, OSError, BusUnavailable) as error:
            # The ack did not arrive: the job comes again, and its handler knows its result.
            _log.info("jobs.not_settled", subject=message.subject, error=str(error))
        finally:
            pull.slots.give_back()


async def _settle(bus: Bus, queue: JobQueue, pull: Pull, message: Msg) -> None:
    """Run, acknowledge, or say when to try again: the boundary of one job."""
    try:
        job = job_of(message)
    except (KeyError, ValueError) as error:
        _log.error("jobs.malformed", subject=message.subject, error=repr(error))
        await message.term()
        return
    try:
        async with _Heartbeat(message, queue.ack_wait_s / 3):
            await _run_or_give_up(bus, queue, job, message)
    except asyncio.CancelledError:
        with suppress(nats.errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(GIVE_BACK_S):
                await pull.has_ended.wait()
                await message.nak()
        raise
    except Exception as error:
        _log.warning("jobs.failed", job=str(job.id), tries=job.delivery_count, error=repr(error))
        spread = random.uniform(-1, 1)  # noqa: S311 -- jitter, no secret
        await message.nak(delay=rules.backoff_s(job.delivery_count, spread=spread))
    else:
        DONE_NOT_ACKED.visit()
        # A job is dear: ask whether the server has noted that it is done.
        await message.ack_sync(timeout=ACK_S)


async def _run_or_give_up(bus: Bus, queue: JobQueue, job: Job, message: Msg) -> None:
    """Returns when the job needs no further try."""
    if job.delivery_count > queue.max_tries:
        return await _give_up(bus, queue, job, message, "it ended every worker that ran it")
    try:
        await queue.handle(job)
    except Exception as error:
        if job.delivery_count < queue.max_tries:
            raise
        _log.error("jobs.given_up", job=str(job.id), exc_info=error)
        await _give_up(bus, queue, job, message, f"{type(error).__name__}: {error}")


async def _give_up(bus: Bus, queue: JobQueue, job: Job, message: Msg, error: str) -> None:
    if queue.on_poison is not None:
        await queue.on_poison(job, error)
        return
    subject = f"dlq.{message.subject.removeprefix('wrk.')}"
    headers = {**job.headers, "tenfold-error": error[:1000]}
    await bus.publish(subject, job.payload, headers)


def job_of(message: Msg) -> Job:
    """Read one delivered job.

    Raises:
        KeyError, ValueError: a header is missing or not what it should be.
    """
    headers = message.headers or {}
    return Job(
        id=UUID(headers[rules.MESSAGE_ID]),
        name=headers[rules.TYPE],
        bucket=rules.bucket_of_subject(message.subject),
        aggregate=headers[rules.AGGREGATE],
        tenant=headers[rules.TENANT],
        payload=message.data,
        delivery_count=message.metadata.num_delivered,
        headers=headers,
    )


class _Heartbeat:
    """Tells the server every `period_s` that the job is still being worked on."""

    def __init__(self, message: Msg, period_s: float) -> None:
        self._message = message
        self._period_s = period_s

    async def __aenter__(self) -> None:
        self._beating = asyncio.create_task(self._beat())

    async def __aexit__(self, *_: object) -> None:
        self._beating.cancel()
        await asyncio.wait({self._beating})

    async def _beat(self) -> None:
        while True:
            checkpoint()
            await asyncio.sleep(self._period_s)
            # Lost heartbeats are no reason to stop: at worst the job runs twice.
            with suppress(nats.errors.Error, OSError):
                await self._message.in_progress()
