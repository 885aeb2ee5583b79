"""The notification service as its tests run it, and the events that others would send."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast
from uuid import UUID

from google.protobuf.message import Message
from tenfold.auth.v1.auth_events_pb2 import UserRegistered
from tenfold.ledger.v1.ledger_events_pb2 import PostedEntry, TransactionPosted
from tenfold.ledger.v1.ledger_pb2 import SIDE_CREDIT, SIDE_DEBIT
from tenfold.media.v1.media_events_pb2 import VideoFailed, VideoReady
from tenfold.media.v1.media_pb2 import Failure

from services.notification.wiring import open_service
from shared.bus import rules
from shared.bus.jetstream import Bus
from shared.clock import SystemClock
from shared.config import ProcessConfig
from shared.db.ids import bucket_of, new_id
from shared.identity import RevocationList
from shared.lifecycle import Service
from shared.rpc.client import Channels, Upstreams
from shared.runtime import Runtime
from shared.spawner import Spawner

TENANT = "default"


@dataclass(frozen=True)
class Cause:
    """One event as its emitter's outbox would hold it: the same id however often it is sent."""

    event_id: UUID
    aggregate: str
    bucket: int
    message: Message

    async def publish(self, bus: Bus) -> None:
        source = rules.source_of(type(self.message))
        await bus.ensure_readable(source)
        type_name = self.message.DESCRIPTOR.full_name
        headers = {
            rules.MESSAGE_ID: str(self.event_id),
            rules.TYPE: type_name,
            rules.AGGREGATE: self.aggregate,
            rules.EVENT_NO: "1",
            rules.SOURCE_BUCKET: str(self.bucket),
            rules.TENANT: TENANT,
            rules.TIME: datetime.now(UTC).isoformat(),
        }
        subject = rules.event_subject(source, type_name, self.bucket)
        await bus.publish(subject, self.message.SerializeToString(), headers)


def registered(user: UUID, email: str, name: str = "Ada") -> Cause:
    message = UserRegistered(user=f"users/{user}", email=email, display_name=name, locale="en")
    return Cause(new_id(bucket_of(user)), f"users/{user}", bucket_of(user), message)


def video_ready(owner: UUID, name: str = "holiday.mp4") -> Cause:
    bucket = bucket_of(owner)
    video = f"videos/{new_id(bucket)}"
    message = VideoReady(video=video, owner=f"users/{owner}", display_name=name, duration_s=20)
    return Cause(new_id(bucket), video, bucket, message)


def video_failed(owner: UUID, description: str) -> Cause:
    bucket = bucket_of(owner)
    video = f"videos/{new_id(bucket)}"
    failure = Failure(description=description)
    message = VideoFailed(
        video=video, owner=f"users/{owner}", display_name="a.mp4", failure=failure
    )
    return Cause(new_id(bucket), video, bucket, message)


def posted(payer: str, bucket: int, credited: Mapping[str, int], code: str = "EUR") -> Cause:
    transaction = f"transactions/{new_id(bucket)}"
    debit = PostedEntry(
        owner=payer, side=SIDE_DEBIT, currency_code=code, minor_units=sum(credited.values())
    )
    entries = [
        PostedEntry(owner=owner, side=SIDE_CREDIT, currency_code=code, minor_units=units)
        for owner, units in credited.items()
    ]
    message = TransactionPosted(
        transaction=transaction, description="Lunch", entries=[debit, *entries]
    )
    return Cause(new_id(bucket), transaction, bucket, message)


@asynccontextmanager
async def running_service(data: Path, bus: Bus, smtp_port: int) -> AsyncIterator[Service]:
    """The whole service in this process, on the given bus and mail server."""
    channels = Channels(Upstreams({}))
    runtime = Runtime(
        config=ProcessConfig(data=data),
        environ={
            "TENFOLD_NOTIFICATION_SMTP_URL": f"smtp://127.0.0.1:{smtp_port}",
            "TENFOLD_NOTIFICATION_SMTP_REPLY_TIMEOUT_S": "1",
            "TENFOLD_NOTIFICATION_MAIL_FROM": "tenfold@example.com",
        },
        clock=SystemClock(),
        bus=bus,
        channels=channels,
        secret=b"s" * 32,
        spawner=cast("Spawner", None),  # this service runs no programs
        revocations=RevocationList(),
        set_serving=lambda _name, _is_serving: None,
    )
    async with open_service(runtime) as service, asyncio.TaskGroup() as tasks:
        loops = [tasks.create_task(loop()) for loop in service.loops]
        try:
            yield service
        finally:
            for loop in loops:
                loop.cancel()
    await channels.close()
