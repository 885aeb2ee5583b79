"""Who may call what, over real gRPC."""

from dataclasses import replace

import grpc
import pytest
from tenfold.auth.v1 import auth_service_pb2 as auth

from shared.errors import (
    InvalidRequest,
    PermissionDenied,
    TenfoldError,
    Unauthenticated,
    Violation,
)
from shared.identity import (
    IDENTITY_METADATA_KEY,
    PUBLIC,
    IdentitySigner,
    Principal,
    PrincipalKind,
)
from tests.integration.shared.rpc.harness import SUBJECT, USER, key_pair, serving

pytestmark = pytest.mark.usefixtures("engine")

PATH = "/tenfold.auth.v1.SessionService/ListSessions"
ADMIN = replace(USER, kind=PrincipalKind.ADMIN)
SERVICE = Principal(PrincipalKind.SERVICE, "edge")


@pytest.mark.parametrize(
    ("principal", "refusal"),
    [(USER, None), (ADMIN, None), (PUBLIC, Unauthenticated), (SERVICE, PermissionDenied),
     (replace(USER, scopes=frozenset()), PermissionDenied)],
    ids=["user", "admin", "public", "service", "without scope"],
)  # fmt: skip
async def test_a_method_for_users(principal: Principal, refusal: type[TenfoldError] | None) -> None:
    async with serving() as harness:
        if refusal is None:
            await harness.list(principal)
            assert harness.handler.seen[0].principal == principal
        else:
            with pytest.raises(refusal):
                await harness.list(principal)
            assert harness.handler.seen == []


@pytest.mark.parametrize("principal", [USER, ADMIN, PUBLIC], ids=["user", "admin", "public"])
async def test_a_method_for_services_admits_nobody_else(principal: Principal) -> None:
    async with serving() as harness:
        call = harness.stub.WatchRevocations(
            auth.WatchRevocationsRequest(), metadata=harness.as_(principal)
        )
        with pytest.raises((PermissionDenied, Unauthenticated)):
            await anext(aiter(call))
        assert harness.handler.seen == []


async def test_without_any_identity_a_caller_is_the_public() -> None:
    async with serving() as harness, harness.raw_channel() as channel:
        refused = channel.unary_unary(PATH)(b"")
        assert await refused.code() is grpc.StatusCode.UNAUTHENTICATED
        request = auth.CreateSessionRequest(email="a@b.c", password="x").SerializeToString()
        path = PATH.replace("ListSessions", "CreateSession")
        await channel.unary_unary(path)(request)
        assert harness.handler.seen[0].principal == PUBLIC


async def test_more_than_one_identity_is_refused() -> None:
    async with serving() as harness, harness.raw_channel() as channel:
        metadata = harness.as_(USER) * 2
        call = channel.unary_unary(PATH)(b"", metadata=metadata)
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_stranger_s_token_and_claims_beside_the_token_mean_nothing() -> None:
    async with serving() as harness, harness.raw_channel() as channel:
        private, _ = key_pair()
        forged = IdentitySigner("edge", private).token_for(USER)
        for metadata in (
            [(IDENTITY_METADATA_KEY, forged)],
            [("x-user-id", SUBJECT), ("x-roles", "admin"), ("tenfold_identity", "x")],
            [(IDENTITY_METADATA_KEY + "-bin", b"x")],
        ):
            call = channel.unary_unary(PATH)(b"", metadata=metadata)
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert harness.handler.seen == []


async def test_a_service_may_not_speak_for_a_user() -> None:
    async with serving() as harness:
        metadata = [(IDENTITY_METADATA_KEY, harness.services.token_for(USER))]
        with pytest.raises(Unauthenticated):
            await harness.stub.ListSessions(auth.ListSessionsRequest(), metadata=metadata)


async def test_a_revoked_credential_is_refused_though_its_token_was_believed_before() -> None:
    async with serving() as harness:
        await harness.list()
        harness.revocations.revoke(USER.credential, 4e9)
        with pytest.raises(Unauthenticated) as refusal:
            await harness.list()
        assert refusal.value.error_reason == "CREDENTIAL_REVOKED"


async def test_a_called_service_sees_the_caller_of_its_caller() -> None:
    from tests.integration.shared.rpc.harness import Sessions

    async with serving() as inner:

        async def ask(_context: object) -> None:
            await inner.stub.ListSessions(auth.ListSessionsRequest())

        async with serving(Sessions(on_list=ask)) as outer:
            # Both trust the same edge here; the inner one verifies for itself.
            outer.server._chain.verifier = inner.server._chain.verifier
            await outer.stub.ListSessions(auth.ListSessionsRequest(), metadata=inner.as_(USER))
        assert inner.handler.seen[0].principal == USER
        assert inner.handler.seen[0].request_id == outer.handler.seen[0].request_id


async def test_permission_is_checked_before_the_request_is_looked_at() -> None:
    async with serving() as harness, harness.raw_channel() as channel:
        call = channel.unary_unary(PATH)(b"\xff\xff\xff", metadata=harness.as_(PUBLIC))
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        call = channel.unary_unary(PATH)(b"\xff\xff\xff", metadata=harness.as_(USER))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_wrong_field_is_named_in_proto_words() -> None:
    async with serving() as harness:
        with pytest.raises(InvalidRequest) as refusal:
            await harness.stub.ListSessions(
                auth.ListSessionsRequest(page_size=-1), metadata=harness.as_(USER)
            )
        assert refusal.value.violations == (
            Violation("page_size", "must be greater than or equal to 0"),
        )


async def test_a_request_id_from_outside_is_kept_if_it_is_harmless() -> None:
    async with serving() as harness, harness.raw_channel() as channel:
        for given in ("abc-1", "x" * 200):
            metadata = [*harness.as_(USER), ("x-request-id", given)]
            await channel.unary_unary(PATH)(b"", metadata=metadata)
        kept, made = (context.request_id for context in harness.handler.seen)
        assert kept == "abc-1"
        assert len(made) == 32
