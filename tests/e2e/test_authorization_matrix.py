"""Every method of every contract, tried by everyone who may not call it, and by one who may.

The methods come from the descriptors: a new one fails here until its valid request stands in
VALID_REQUESTS. That the handler was reached is read from the service's own log line.
"""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.common.v1.money_pb2 import Money
from tenfold.ledger.v1 import ledger_pb2
from tenfold.ledger.v1 import ledger_service_pb2 as ledger
from tenfold.media.v1 import media_service_pb2 as media
from tenfold.notification.v1 import notification_service_pb2 as notification
from tenfold.reporting.v1 import reporting_service_pb2 as reporting

from shared.db.ids import bucket_of, new_id
from shared.identity import IDENTITY_METADATA_KEY, IdentitySigner, Principal, PrincipalKind
from shared.rpc.policy import Access, MethodPolicy, contract_policies
from tests.mesh import Mesh, poll_until

TODAY = time.strftime("%Y-%m-%d", time.gmtime())
POLICIES = contract_policies()
EVERY_SCOPE = frozenset(scope for policy in POLICIES.values() for scope in policy.scopes)
METHODS = sorted(POLICIES)
REFUSAL_TIMEOUT_S = 0.3
SILENCE_S = 2
TUS = {"http-header-tus-resumable": "1.0.0"}


@dataclass(frozen=True)
class World:
    """What exists: one user's resources, and the keys to speak as anyone."""

    mesh: Mesh
    channel: grpc.aio.Channel
    edge: IdentitySigner
    services: IdentitySigner
    owner: Principal
    admin: Principal
    account: str
    cash: str
    transaction: str
    upload: str
    video: str
    item: str
    session: str
    api_key: str
    report_run: str

    def may_call(self, policy: MethodPolicy) -> Principal:
        """Somebody who may call the method, with no scope too many."""
        if policy.access is Access.SERVICE:
            return self.services.own
        who = self.admin if policy.access is Access.ADMIN else self.owner
        return replace(who, scopes=policy.scopes)


def fresh() -> str:
    """A request id that was never used."""
    return secrets.token_hex(8)


def in_a_week() -> Timestamp:
    return Timestamp(seconds=int(time.time()) + 7 * 86_400)


# Path -> a valid request of the world's owner. Raw methods: the metadata that the edge sets.
VALID_REQUESTS: dict[str, Callable[[World], Message | dict[str, str]]] = {
    "/tenfold.auth.v1.IdentityService/SignUp": lambda _: auth.SignUpRequest(
        email=f"{fresh()}@example.com", password=fresh() * 2, request_id=fresh()
    ),
    "/tenfold.auth.v1.IdentityService/GetUser": lambda w: auth.GetUserRequest(
        name=f"users/{w.owner.subject}"
    ),
    "/tenfold.auth.v1.SessionService/CreateSession": lambda _: auth.CreateSessionRequest(
        email="nobody@example.com", password="wrong"
    ),
    "/tenfold.auth.v1.SessionService/RefreshSession": lambda _: auth.RefreshSessionRequest(
        refresh_token="junk"
    ),
    "/tenfold.auth.v1.SessionService/ListSessions": lambda _: auth.ListSessionsRequest(),
    "/tenfold.auth.v1.SessionService/RevokeSession": lambda w: auth.RevokeSessionRequest(
        name=w.session
    ),
    "/tenfold.auth.v1.SessionService/WatchRevocations": lambda _: auth.WatchRevocationsRequest(),
    "/tenfold.auth.v1.TokenService/GetJwks": lambda _: auth.GetJwksRequest(),
    "/tenfold.auth.v1.ApiKeyService/CreateApiKey": lambda _: auth.CreateApiKeyRequest(
        display_name="k", scopes=["auth.keys.write"], expire_time=in_a_week(), request_id=fresh()
    ),
    "/tenfold.auth.v1.ApiKeyService/ListApiKeys": lambda _: auth.ListApiKeysRequest(),
    "/tenfold.auth.v1.ApiKeyService/RevokeApiKey": lambda w: auth.RevokeApiKeyRequest(
        name=w.api_key
    ),
    "/tenfold.auth.v1.ApiKeyService/ResolveApiKey": lambda w: auth.ResolveApiKeyRequest(
        secret=w.mesh.admin_key
    ),
    "/tenfold.ledger.v1.LedgerService/CreateAccount": lambda _: ledger.CreateAccountRequest(
        account=ledger.NewAccount(currency_code="EUR"), request_id=fresh()
    ),
    "/tenfold.ledger.v1.LedgerService/GetAccount": lambda w: ledger.GetAccountRequest(
        name=w.account
    ),
    "/tenfold.ledger.v1.LedgerService/ListAccounts": lambda _: ledger.ListAccountsRequest(),
    "/tenfold.ledger.v1.LedgerService/GetBalance": lambda w: ledger.GetBalanceRequest(
        account=w.account
    ),
    "/tenfold.ledger.v1.LedgerService/TransferFunds": lambda w: ledger.TransferFundsRequest(
        account=w.account, to_account=w.cash, amount=euros(1), request_id=fresh()
    ),
    "/tenfold.ledger.v1.LedgerService/PostTransaction": lambda w: ledger.PostTransactionRequest(
        transaction=deposit(w), request_id=fresh()
    ),
    "/tenfold.ledger.v1.LedgerService/BatchPostTransactions": (
        lambda w: ledger.BatchPostTransactionsRequest(
            transactions=[deposit(w)], request_id=fresh()
        )
    ),
    "/tenfold.ledger.v1.LedgerService/GetTransaction": lambda w: ledger.GetTransactionRequest(
        name=w.transaction
    ),
    "/tenfold.ledger.v1.LedgerService/ListTransactions": lambda w: ledger.ListTransactionsRequest(
        account=w.account
    ),
    "/tenfold.ledger.v1.LedgerService/GetTrialBalance": lambda _: ledger.GetTrialBalanceRequest(),
    "/tenfold.media.v1.UploadService/DescribeTus": lambda _: {"http-method": "OPTIONS"},
    "/tenfold.media.v1.UploadService/CreateTusUpload": lambda _: {
        **TUS, "http-method": "POST", "http-header-upload-length": "10",
    },
    "/tenfold.media.v1.UploadService/HeadTusUpload": lambda w: {
        **TUS, "http-method": "HEAD", "http-path-upload": tail(w.upload),
    },
    "/tenfold.media.v1.UploadService/PatchTusUpload": lambda w: {
        **TUS, "http-method": "PATCH", "http-path-upload": tail(w.upload),
        "http-header-upload-offset": "0",
        "http-header-content-type": "application/offset+octet-stream",
    },
    "/tenfold.media.v1.UploadService/TerminateTusUpload": lambda w: {
        **TUS, "http-method": "DELETE", "http-path-upload": tail(w.upload),
    },
    "/tenfold.media.v1.UploadService/GetUpload": lambda w: media.GetUploadRequest(name=w.upload),
    "/tenfold.media.v1.VideoService/GetVideo": lambda w: media.GetVideoRequest(name=w.video),
    "/tenfold.media.v1.VideoService/ListVideos": lambda _: media.ListVideosRequest(),
    "/tenfold.media.v1.VideoService/WatchVideo": lambda w: media.WatchVideoRequest(name=w.video),
    "/tenfold.media.v1.VideoService/DeleteVideo": lambda w: media.DeleteVideoRequest(name=w.video),
    "/tenfold.media.v1.VideoService/GetVideoFile": lambda w: {
        "http-method": "GET", "http-path-video": tail(w.video), "http-path-file": "master.m3u8",
    },
    "/tenfold.notification.v1.InboxService/ListInboxItems": lambda _: (
        notification.ListInboxItemsRequest()
    ),
    "/tenfold.notification.v1.InboxService/GetInboxSummary": lambda _: (
        notification.GetInboxSummaryRequest()
    ),
    "/tenfold.notification.v1.InboxService/WatchInbox": lambda _: notification.WatchInboxRequest(),
    "/tenfold.notification.v1.InboxService/MarkInboxItemRead": lambda w: (
        notification.MarkInboxItemReadRequest(name=w.item)
    ),
    "/tenfold.notification.v1.DeliveryService/ListDeliveries": lambda _: (
        notification.ListDeliveriesRequest()
    ),
    "/tenfold.reporting.v1.ReportService/RunReport": lambda _: reporting.RunReportRequest(
        first_day=TODAY, last_day=TODAY, request_id=fresh()
    ),
    "/tenfold.reporting.v1.ReportService/GetReportRun": lambda w: reporting.GetReportRunRequest(
        name=w.report_run
    ),
    "/tenfold.reporting.v1.ReportService/ListReportRuns": lambda _: (
        reporting.ListReportRunsRequest()
    ),
    "/tenfold.reporting.v1.MetricService/QueryDailySums": lambda _: (
        reporting.QueryDailySumsRequest(first_day=TODAY, last_day=TODAY)
    ),
}  # fmt: skip

# Methods about one resource: to a stranger it looks absent.
OF_ONE_RESOURCE = sorted(
    path
    for path in METHODS
    if POLICIES[path].access is Access.USER
    and path.rpartition("/")[2]
    in {
        "GetUser", "RevokeSession", "RevokeApiKey", "GetAccount", "GetBalance", "TransferFunds",
        "GetTransaction", "ListTransactions", "HeadTusUpload", "PatchTusUpload",
        "TerminateTusUpload", "GetUpload", "GetVideo", "WatchVideo", "DeleteVideo", "GetVideoFile",
        "MarkInboxItemRead", "GetReportRun",
    }
)  # fmt: skip


def euros(minor_units: int) -> Money:
    return Money(currency_code="EUR", minor_units=minor_units)


def entry(account: str, side: ledger_pb2.Side.ValueType) -> ledger_pb2.Entry:
    return ledger_pb2.Entry(account=account, side=side, amount=euros(1_000))


def deposit(world: "World") -> ledger.NewTransaction:
    return ledger.NewTransaction(
        entries=[
            entry(world.cash, ledger_pb2.SIDE_DEBIT),
            entry(world.account, ledger_pb2.SIDE_CREDIT),
        ]
    )


def tail(name: str) -> str:
    return name.rpartition("/")[2]


@pytest.fixture(scope="module")
async def world(mesh: Mesh):
    """One user with one of everything, made over REST as anybody would."""
    email, password = f"owner-{fresh()}@example.com", fresh() * 2
    mesh.post(
        "/v1/users:signUp",
        json={"email": email, "password": password},
        headers={"Idempotency-Key": fresh()},
    )
    login = mesh.post("/v1/sessions", json={"email": email, "password": password}).json()
    token = login["tokens"]["accessToken"]

    def made(path: str, body: object, *, key: str = token) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": fresh()}
        answer = mesh.post(path, json=body, headers=headers)
        assert answer.status_code == 200, f"{path}: {answer.text}"
        return answer.json()

    account = made("/v1/accounts", {"currencyCode": "EUR"})["name"]
    cash_account = {"currencyCode": "EUR", "normalSide": "SIDE_DEBIT", "mayOverdraw": True}
    cash = made("/v1/accounts", cash_account, key=mesh.admin_key)
    amount = {"currencyCode": "EUR", "minorUnits": "5000"}
    entries = [
        {"account": cash["name"], "side": "SIDE_DEBIT", "amount": amount},
        {"account": account, "side": "SIDE_CREDIT", "amount": amount},
    ]
    transaction = made("/v1/transactions", {"entries": entries}, key=mesh.admin_key)["name"]
    api_key = made(
        "/v1/apiKeys",
        {
            "displayName": "k",
            "scopes": ["ledger.read"],
            "expireTime": f"{TODAY[:4]}-12-31T23:59:59Z",
        },
    )["apiKey"]["name"]
    report_run = made("/v1/reportRuns", {"firstDay": TODAY, "lastDay": TODAY})["name"]
    upload, video = uploaded(mesh, token)
    item = poll_until(
        lambda: mesh.get("/v1/inbox/items", headers=bearer(token)).json()["items"],
        timeout_s=30,
        what="a first notice",
    )[0]["name"]
    identity = mesh.data / "identity"
    owner = tail(login["session"]["user"])
    admin = tail(cash["owner"])
    async with grpc.aio.insecure_channel(services_address(mesh)) as channel:
        yield World(
            mesh=mesh,
            channel=channel,
            edge=IdentitySigner("edge", (identity / "edge.pem").read_bytes()),
            services=IdentitySigner("services", (identity / "services.pem").read_bytes()),
            owner=Principal(PrincipalKind.USER, owner, scopes=EVERY_SCOPE),
            admin=Principal(PrincipalKind.ADMIN, admin, scopes=EVERY_SCOPE),
            account=account,
            cash=cash["name"],
            transaction=transaction,
            upload=upload,
            video=video,
            item=item,
            session=login["session"]["name"],
            api_key=api_key,
            report_run=report_run,
        )


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def uploaded(mesh: Mesh, token: str) -> tuple[str, str]:
    """(upload, video) of ten bytes that are no film: the resources exist all the same."""
    tus = {**bearer(token), "Tus-Resumable": "1.0.0"}
    name = base64.b64encode(b"x.mp4").decode()
    created = mesh.post(
        "/v1/files", headers={**tus, "Upload-Length": "10", "Upload-Metadata": f"filename {name}"}
    )
    assert created.status_code == 201, created.text
    path = "/v1/files/" + created.headers["location"].rpartition("/")[2]
    kind = {"Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    patched = mesh.request("PATCH", path, headers={**tus, **kind}, content=b"0123456789")
    assert patched.status_code == 204, patched.text
    upload = "uploads/" + tail(path)
    return upload, mesh.get(f"/v1/{upload}", headers=bearer(token)).json()["video"]


def services_address(mesh: Mesh) -> str:
    return str(mesh.state["children"]["services"]["address"])


@dataclass(frozen=True)
class Outcome:
    """How a call ended, and under which request id it is in the log."""

    code: grpc.StatusCode
    request_id: str
    http_status: str = ""

    @property
    def is_absent(self) -> bool:
        """NOT_FOUND; a raw method may also say it as an HTTP status."""
        return self.code is grpc.StatusCode.NOT_FOUND or self.http_status == "404"


async def attempt(world: World, path: str, principal: Principal | None) -> Outcome:
    """Call the method with its valid request, speaking as this principal."""
    policy, request = POLICIES[path], VALID_REQUESTS[path](world)
    request_id = f"matrix-{fresh()}"
    metadata = [("x-request-id", request_id)]
    if isinstance(request, dict):
        metadata += request.items()
    if principal is not None:
        is_service = principal.kind is PrincipalKind.SERVICE
        signer = world.services if is_service else world.edge
        metadata.append((IDENTITY_METADATA_KEY, signer.token_for(principal)))
    shape = "stream" if policy.client_streaming else "unary"
    shape += "_stream" if policy.server_streaming else "_unary"
    call_method = getattr(world.channel, shape)(path)
    if isinstance(request, dict):
        return await _raw_outcome_of(call_method(metadata=metadata, timeout=10), request_id)
    call = call_method(request.SerializeToString(), metadata=metadata, timeout=10)
    return await _outcome_of(call, request_id, is_stream=policy.server_streaming)


async def _raw_outcome_of(call, request_id: str) -> Outcome:
    try:
        # A refusal comes unasked. To write into it would replace its status (a trap of
        # grpc.aio), so the empty body is ended only when none has come.
        async with asyncio.timeout(REFUSAL_TIMEOUT_S):
            return Outcome(await call.code(), request_id)
    except TimeoutError:
        await call.done_writing()
        return await _outcome_of(call, request_id, is_stream=True)
    finally:
        call.cancel()


async def _outcome_of(call, request_id: str, *, is_stream: bool) -> Outcome:
    try:
        if not is_stream:
            await call
            return Outcome(grpc.StatusCode.OK, request_id)
        # A live stream has nothing to say yet: that it stays open is the answer.
        async with asyncio.timeout(SILENCE_S):
            await call.read()
            headers = dict(await call.initial_metadata())
            return Outcome(grpc.StatusCode.OK, request_id, headers.get("http-status", ""))
    except TimeoutError:
        return Outcome(grpc.StatusCode.OK, request_id)
    except grpc.aio.AioRpcError as error:
        return Outcome(error.code(), request_id)
    finally:
        call.cancel()


def handler_was_reached(world: World, outcome: Outcome) -> bool:
    """Whether the service's log says that this request came to its handler."""
    log: Path = world.mesh.data / "logs" / "services.log"

    def line() -> dict[str, object] | None:
        for text in log.read_text(errors="replace").splitlines():
            if outcome.request_id in text and '"handled"' in text:
                return json.loads(text)
        return None

    found = poll_until(line, timeout_s=5, what=f"the log line of {outcome.request_id}")
    return bool(found["handled"])


def test_every_method_has_a_valid_request_here() -> None:
    assert sorted(VALID_REQUESTS) == METHODS


@pytest.mark.parametrize("path", [p for p in METHODS if POLICIES[p].access is not Access.PUBLIC])
async def test_without_a_credential_it_is_refused(world: World, path: str) -> None:
    outcome = await attempt(world, path, None)
    assert outcome.code is grpc.StatusCode.UNAUTHENTICATED
    assert not handler_was_reached(world, outcome)


@pytest.mark.parametrize(
    "path", [p for p in METHODS if POLICIES[p].access in (Access.ADMIN, Access.SERVICE)]
)
async def test_a_user_with_every_scope_is_refused(world: World, path: str) -> None:
    outcome = await attempt(world, path, world.owner)
    assert outcome.code is grpc.StatusCode.PERMISSION_DENIED
    assert not handler_was_reached(world, outcome)


@pytest.mark.parametrize("path", [p for p in METHODS if POLICIES[p].access is Access.SERVICE])
async def test_an_operator_may_not_play_a_service(world: World, path: str) -> None:
    outcome = await attempt(world, path, world.admin)
    assert outcome.code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("path", [p for p in METHODS if POLICIES[p].scopes])
async def test_without_each_scope_it_is_refused(world: World, path: str) -> None:
    policy = POLICIES[path]
    who = world.admin if policy.access is Access.ADMIN else world.owner
    for scope in policy.scopes:
        outcome = await attempt(world, path, replace(who, scopes=EVERY_SCOPE - {scope}))
        assert outcome.code is grpc.StatusCode.PERMISSION_DENIED
        assert not handler_was_reached(world, outcome)


@pytest.mark.parametrize("path", OF_ONE_RESOURCE)
async def test_to_another_user_it_looks_absent(world: World, path: str) -> None:
    stranger = new_id(bucket_of(UUID(world.owner.subject)))
    outcome = await attempt(world, path, replace(world.owner, subject=str(stranger)))
    assert outcome.is_absent


@pytest.mark.parametrize("path", OF_ONE_RESOURCE)
async def test_to_another_tenant_it_looks_absent(world: World, path: str) -> None:
    outcome = await attempt(world, path, replace(world.owner, tenant="another"))
    assert outcome.is_absent


@pytest.mark.parametrize("path", METHODS)
async def test_with_just_the_right_scopes_it_reaches_the_handler(world: World, path: str) -> None:
    policy = POLICIES[path]
    principal = None if policy.access is Access.PUBLIC else world.may_call(policy)
    outcome = await attempt(world, path, principal)
    assert handler_was_reached(world, outcome)
    refused = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT)
    assert outcome.code not in refused
