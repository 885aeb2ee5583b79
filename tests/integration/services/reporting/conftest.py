"""The reporting service on a real gRPC server and real files."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from google.protobuf.message import Message
from tenfold.ledger.v1.ledger_events_pb2 import PostedEntry, TransactionPosted
from tenfold.ledger.v1.ledger_pb2 import SIDE_CREDIT, SIDE_DEBIT
from tenfold.reporting.v1.reporting_service_pb2_grpc import (
    MetricServiceStub,
    ReportServiceStub,
    add_MetricServiceServicer_to_server,
    add_ReportServiceServicer_to_server,
)

from services.reporting.handler import ReportingHandler
from services.reporting.store import SqlReportStore
from services.reporting.wiring import MIGRATIONS
from shared.bus.worker import Event
from shared.clock import SystemClock
from shared.db.ids import bucket_of, new_id
from shared.db.port import Shards
from shared.identity import IdentitySigner, IdentityVerifier, Principal, PrincipalKind
from shared.lifecycle import Registration
from shared.rpc.server import RpcServer
from tests.databases import Place, Places
from tests.engine import CONFIG

SECRET = b"thirty-two bytes that are secret."
SCOPES = frozenset({"reports.run", "reports.read", "metrics.read"})


def person(tenant: str = "default") -> Principal:
    return Principal(PrincipalKind.USER, str(new_id(77)), tenant, SCOPES, "session")


def operator(tenant: str = "default") -> Principal:
    return Principal(PrincipalKind.ADMIN, str(new_id(5)), tenant, SCOPES, "key")


@pytest.fixture
async def place(places: Places) -> Place:
    return await places.make(MIGRATIONS)


@pytest.fixture
async def shards(place: Place) -> AsyncIterator[Shards]:
    async with place.open() as opened:
        yield opened


@dataclass
class Client:
    """Calls as whom one likes."""

    signer: IdentitySigner
    reports: ReportServiceStub
    metrics: MetricServiceStub

    def identity(self, principal: Principal) -> tuple[tuple[str, str], ...]:
        return (("tenfold-identity", self.signer.token_for(principal)),)


@pytest.fixture
async def client(shards: Shards) -> AsyncIterator[Client]:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    handler = ReportingHandler(SqlReportStore(shards), page_secret=SECRET, clock=SystemClock())
    server = RpcServer(
        address="127.0.0.1:0",
        verifier=IdentityVerifier({"edge": public}),
        config=CONFIG,
    )
    server.add(Registration(add_ReportServiceServicer_to_server, handler))
    server.add(Registration(add_MetricServiceServicer_to_server, handler))
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Client(
            IdentitySigner("edge", private), ReportServiceStub(channel), MetricServiceStub(channel)
        )
    await server.stop(0)


def event_of_message(message: Message, *, bucket: int, tenant: str = "default") -> Event:
    """As the bus delivers it."""
    event_id, time = new_id(bucket), datetime.now(UTC)
    return Event(
        id=event_id,
        type=message.DESCRIPTOR.full_name,
        bucket=bucket,
        aggregate=f"things/{event_id}",
        event_no=1,
        tenant=tenant,
        time=time,
        payload=message.SerializeToString(),
        headers={"tenfold-tenant": tenant},
    )


def transfer(
    debited: Principal, credited: Principal, units: int, *, at: datetime | None = None
) -> TransactionPosted:
    """A posted transfer, recorded now unless `at` says otherwise."""
    message = TransactionPosted(
        transaction="transactions/1",
        entries=[
            PostedEntry(
                owner=f"users/{owner.owner}", side=side, currency_code="EUR", minor_units=units
            )
            for owner, side in ((debited, SIDE_DEBIT), (credited, SIDE_CREDIT))
        ],
    )
    message.recorded_time.FromDatetime(at or datetime.now(UTC))
    return message


def bucket_of_owner(principal: Principal) -> int:
    owner: UUID = principal.owner
    return bucket_of(owner)
