from contextlib import asynccontextmanager

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from tenfold.notification.v1 import notification_pb2 as resources
from tenfold.notification.v1 import notification_service_pb2 as messages
from tenfold.notification.v1 import notification_service_pb2_grpc as stubs

from services.notification.domain import Notice
from services.notification.handler import NotificationHandler
from services.notification.store import SqlNotificationStore, insert_notice
from services.notification.wake import InboxSignal
from services.notification.watch import STREAM_COUNT_MAX, InboxWatch
from shared.clock import SystemClock
from shared.db.ids import new_id
from shared.identity import IdentitySigner, IdentityVerifier, Principal, PrincipalKind
from shared.lifecycle import Registration
from shared.rpc.server import RpcServer
from tests.engine import CONFIG

ADA, BOB = new_id(7), new_id(7)
SCOPES = frozenset({"notify.inbox.read", "notify.inbox.write"})
CALL_S = 10


class Client:
    """One caller's stubs."""

    def __init__(self, channel, signer, principal) -> None:
        self._channel, self._signer, self._principal = channel, signer, principal
        self.inbox = stubs.InboxServiceStub(channel)
        self.deliveries = stubs.DeliveryServiceStub(channel)

    @property
    def metadata(self):
        return (("tenfold-identity", self._signer.token_for(self._principal)),)

    async def call(self, method, request):
        return await method(request, metadata=self.metadata, timeout=CALL_S)

    def watch(self, cursor=""):
        request = messages.WatchInboxRequest(cursor=cursor)
        return self.inbox.WatchInbox(request, metadata=self.metadata, timeout=CALL_S)


@asynccontextmanager
async def serving(handler):
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    verifier = IdentityVerifier({"edge": public})
    server = RpcServer(address="127.0.0.1:0", verifier=verifier, config=CONFIG)
    server.add(Registration(stubs.add_InboxServiceServicer_to_server, handler))
    server.add(Registration(stubs.add_DeliveryServiceServicer_to_server, handler))
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            signer = IdentitySigner("edge", private)

            def client_of(
                user, *, tenant="default", scopes=SCOPES, kind=PrincipalKind.USER
            ) -> Client:
                return Client(channel, signer, Principal(kind, str(user), tenant, scopes))

            yield client_of
    finally:
        await server.stop(0)


@pytest.fixture
def signal() -> InboxSignal:
    return InboxSignal()


@pytest.fixture
async def client_of(shards, signal):
    store = SqlNotificationStore(shards, emails_per_day_max=500)
    clock = SystemClock()
    handler = NotificationHandler(
        store,
        watch=InboxWatch(store, signal=signal, clock=clock, poll_s=0.2),
        signal=signal,
        page_secret=b"s" * 32,
        clock=clock,
    )
    async with serving(handler) as make:
        yield make


@pytest.fixture
def tell(shards, clock, signal):
    async def insert(title: str, recipient=ADA, *, email=True):
        notice = Notice(
            recipient, "default", title, "video.ready", title, "b", "videos/x", email=email
        )
        async with shards.holding(recipient).transaction() as tx:
            await insert_notice(tx, notice, now=clock.now())
        signal.ring("default", recipient)

    return insert


async def refused(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_notices_are_listed_page_by_page_newest_first(client_of, tell):
    ada = client_of(ADA)
    for number in range(5):
        await tell(str(number))
    titles, token = [], ""
    while True:
        page = await ada.call(
            ada.inbox.ListInboxItems,
            messages.ListInboxItemsRequest(page_size=2, page_token=token),
        )
        titles += [item.title for item in page.items]
        token = page.next_page_token
        if not token:
            break
    assert titles == ["4", "3", "2", "1", "0"]


async def test_another_callers_page_token_is_refused(client_of, tell):
    for user in (ADA, BOB):
        for number in range(2):
            await tell(str(number), user)
    ada, bob = client_of(ADA), client_of(BOB)
    request = messages.ListInboxItemsRequest(page_size=1)
    token = (await ada.call(ada.inbox.ListInboxItems, request)).next_page_token
    request.page_token = token
    code = await refused(bob.call(bob.inbox.ListInboxItems, request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    deliveries = messages.ListDeliveriesRequest(page_token=token)
    code = await refused(ada.call(ada.deliveries.ListDeliveries, deliveries))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_reading_is_repeatable_and_moves_the_summary(client_of, tell):
    ada = client_of(ADA)
    await tell("a")
    [item] = (await ada.call(ada.inbox.ListInboxItems, messages.ListInboxItemsRequest())).items
    request = messages.MarkInboxItemReadRequest(name=item.name)
    first = await ada.call(ada.inbox.MarkInboxItemRead, request)
    assert first.HasField("read_time")
    assert await ada.call(ada.inbox.MarkInboxItemRead, request) == first
    summary = await ada.call(ada.inbox.GetInboxSummary, messages.GetInboxSummaryRequest())
    assert summary == resources.InboxSummary(unread_count=0, total_count=1, version=2)


async def test_anothers_notice_looks_absent(client_of, tell):
    await tell("a")
    ada, bob, stranger = client_of(ADA), client_of(BOB), client_of(ADA, tenant="other")
    [item] = (await ada.call(ada.inbox.ListInboxItems, messages.ListInboxItemsRequest())).items
    request = messages.MarkInboxItemReadRequest(name=item.name)
    for other in (bob, stranger):
        code = await refused(other.call(other.inbox.MarkInboxItemRead, request))
        assert code is grpc.StatusCode.NOT_FOUND
        listed = await other.call(other.inbox.ListInboxItems, messages.ListInboxItemsRequest())
        assert not listed.items


@pytest.mark.parametrize("name", ["inbox/items/x", "items/018f0000-0000-7abc-8000-000000000001"])
async def test_a_malformed_name_is_an_error_that_names_the_field(client_of, name):
    ada = client_of(ADA)
    request = messages.MarkInboxItemReadRequest(name=name)
    code = await refused(ada.call(ada.inbox.MarkInboxItemRead, request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_without_the_scope_nothing_is_told(client_of):
    ada = client_of(ADA, scopes=frozenset())
    code = await refused(ada.call(ada.inbox.GetInboxSummary, messages.GetInboxSummaryRequest()))
    assert code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_caller_that_is_no_user_has_no_inbox(client_of):
    operator = client_of("operator", kind=PrincipalKind.ADMIN)
    code = await refused(
        operator.call(operator.inbox.GetInboxSummary, messages.GetInboxSummaryRequest())
    )
    assert code is grpc.StatusCode.FAILED_PRECONDITION


async def test_deliveries_say_where_a_mail_stands(client_of, tell):
    ada = client_of(ADA)
    await tell("with mail")
    await tell("without", email=False)
    answer = await ada.call(ada.deliveries.ListDeliveries, messages.ListDeliveriesRequest())
    [delivery] = answer.deliveries
    assert delivery.state == resources.Delivery.STATE_QUEUED
    assert delivery.channel == resources.Delivery.CHANNEL_EMAIL
    assert delivery.item.startswith("inbox/items/")
    assert delivery.HasField("next_attempt_time")
    assert not delivery.HasField("sent_time")


async def test_a_cut_stream_goes_on_by_its_cursor(client_of, tell):
    ada = client_of(ADA)
    await tell("0")
    stream = ada.watch("0")
    start = await stream.read()
    first = await stream.read()
    assert (start.cursor, first.item.title, first.cursor) == ("0", "0", "1")
    stream.cancel()
    await tell("1")
    stream = ada.watch(first.cursor)
    await stream.read()
    second = await stream.read()
    assert (second.item.title, second.summary.total_count) == ("1", 2)
    stream.cancel()


async def test_reading_a_notice_elsewhere_is_seen_live(client_of, tell):
    ada = client_of(ADA)
    await tell("a")
    [item] = (await ada.call(ada.inbox.ListInboxItems, messages.ListInboxItemsRequest())).items
    stream = ada.watch()
    await stream.read()
    await ada.call(ada.inbox.MarkInboxItemRead, messages.MarkInboxItemReadRequest(name=item.name))
    change = await stream.read()
    assert change.item.HasField("read_time")
    assert change.summary.unread_count == 0
    stream.cancel()


async def test_too_many_streams_are_refused_and_cut_ones_make_room(client_of, signal, eventually):
    ada = client_of(ADA)
    streams = [ada.watch() for _ in range(STREAM_COUNT_MAX)]
    for stream in streams:
        await stream.read()
    assert await refused(ada.watch().read()) is grpc.StatusCode.RESOURCE_EXHAUSTED
    for stream in streams:
        stream.cancel()

    async def nobody_watches() -> bool:
        return not signal.count("default", ADA)

    await eventually(nobody_watches)
    again = ada.watch()
    assert (await again.read()).cursor == "0"
    again.cancel()
