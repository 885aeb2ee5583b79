import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from tenfold.common.v1.money_pb2 import Money
from tenfold.ledger.v1.ledger_pb2 import SIDE_CREDIT, SIDE_DEBIT, Entry
from tenfold.ledger.v1.ledger_service_pb2 import (
    CreateAccountRequest,
    GetBalanceRequest,
    NewAccount,
    NewTransaction,
    PostTransactionRequest,
    TransferFundsRequest,
)
from tenfold.ledger.v1.ledger_service_pb2_grpc import (
    LedgerServiceStub,
    add_LedgerServiceServicer_to_server,
)

from services.payment.handler import LedgerHandler
from services.payment.lane import open_lanes
from services.payment.store import SqlLedgerStore
from services.payment.wiring import MIGRATIONS
from shared.clock import Clock
from shared.db.ids import new_id
from shared.db.port import Shards
from shared.identity import IdentitySigner, IdentityVerifier, Principal, PrincipalKind
from shared.lifecycle import Registration
from shared.rpc.client import Channels, Upstreams
from shared.rpc.server import RpcServer
from tests.databases import SECRET, Place, Places
from tests.engine import CONFIG

SERVICE = "tenfold.ledger.v1.LedgerService"
USER_SCOPES = frozenset({"ledger.read", "ledger.accounts.write", "ledger.transfer"})
ADMIN_SCOPES = USER_SCOPES | {"ledger.post", "ledger.audit"}


def new_user(bucket: int = 77, tenant: str = "default") -> Principal:
    return Principal(PrincipalKind.USER, str(new_id(bucket)), tenant, USER_SCOPES)


def new_operator(tenant: str = "default") -> Principal:
    return Principal(PrincipalKind.ADMIN, str(new_id(9)), tenant, ADMIN_SCOPES)


def key() -> str:
    return str(uuid.uuid4())


def euros(minor_units: int, code: str = "EUR") -> Money:
    return Money(currency_code=code, minor_units=minor_units)


def debit(account: str, amount: Money) -> Entry:
    return Entry(account=account, side=SIDE_DEBIT, amount=amount)


def credit(account: str, amount: Money) -> Entry:
    return Entry(account=account, side=SIDE_CREDIT, amount=amount)


@dataclass
class Ledger:
    """A client of the real service, speaking for whom it is told to."""

    shards: Shards
    signer: IdentitySigner
    stub: LedgerServiceStub
    place: Place
    operator: Principal = field(default_factory=new_operator)
    cash: str = ""

    def headers(self, principal: Principal) -> tuple[tuple[str, str], ...]:
        return (("tenfold-identity", self.signer.token_for(principal)),)

    async def call(self, method: str, request, principal: Principal):
        return await getattr(self.stub, method)(
            request, metadata=self.headers(principal), timeout=20
        )

    async def open_account(self, principal: Principal, code: str = "EUR", **options) -> str:
        request = CreateAccountRequest(
            account=NewAccount(currency_code=code, **options), request_id=key()
        )
        return (await self.call("CreateAccount", request, principal)).name

    async def post(self, *entries: Entry, request_id: str = "", **options):
        request = PostTransactionRequest(
            transaction=NewTransaction(entries=entries, **options), request_id=request_id or key()
        )
        return await self.call("PostTransaction", request, self.operator)

    async def deposit(self, account: str, minor_units: int) -> None:
        self.cash = self.cash or await self.open_account(self.operator, normal_side=SIDE_DEBIT)
        await self.post(debit(self.cash, euros(minor_units)), credit(account, euros(minor_units)))

    async def transfer(self, payer: Principal, account: str, to: str, amount: Money, **options):
        request = TransferFundsRequest(
            account=account,
            to_account=to,
            amount=amount,
            **{"request_id": key(), **options},
        )
        return await self.call("TransferFunds", request, payer)

    async def available(self, principal: Principal, account: str) -> int:
        balance = await self.call("GetBalance", GetBalanceRequest(account=account), principal)
        return balance.available_minor_units

    async def count(self, table: str) -> int:
        row = await self.shards.bucket(0).fetch_one(
            f"SELECT count(*) AS n FROM {table} /* any tenant: a test counts */"
        )
        return row["n"]


def identity_keys() -> tuple[bytes, bytes]:
    private = Ed25519PrivateKey.generate()
    return (
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


@asynccontextmanager
async def serving_ledger(place: Place, clock: Clock) -> AsyncIterator[Ledger]:
    private, public = identity_keys()
    async with place.open(clock=clock) as shards, open_lanes(shards, clock) as lanes:
        store = SqlLedgerStore(shards, lanes, secret=SECRET)
        handler = LedgerHandler(store, page_secret=SECRET, clock=clock)
        server = RpcServer(
            address="127.0.0.1:0",
            verifier=IdentityVerifier({"edge": public}),
            config=CONFIG,
        )
        server.add(Registration(add_LedgerServiceServicer_to_server, handler))
        port = await server.start()
        server.set_serving(SERVICE, True)
        channels = Channels(Upstreams.parse(f"*=127.0.0.1:{port}"), None, checks_health=False)
        try:
            stub = LedgerServiceStub(channels.channel(SERVICE))
            yield Ledger(shards, IdentitySigner("edge", private), stub, place)
        finally:
            await channels.close()
            await server.stop(0.1)


@pytest.fixture
async def place(places: Places) -> Place:
    return await places.make(MIGRATIONS, shard_count=1, owned_by_first=True)


@pytest.fixture
async def ledger(place: Place, clock: Clock) -> AsyncIterator[Ledger]:
    async with serving_ledger(place, clock) as served:
        yield served
