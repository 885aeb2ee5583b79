"""A call whose transaction lost a race is run again by the server, where it may be."""

from collections import Counter

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from shared.errors import RaceLost
from shared.identity import IdentityVerifier
from shared.lifecycle import Registration
from shared.rpc.interceptors import RACE_PAUSES_S
from shared.rpc.policy import Access, Idempotency, MethodPolicy
from shared.rpc.server import RpcServer
from tests.engine import CONFIG

SERVICE = "tests.Races"
TRIES_MAX = 1 + len(RACE_PAUSES_S)
POLICIES = {
    f"/{SERVICE}/{kind.name}": MethodPolicy(
        f"/{SERVICE}/{kind.name}", access=Access.PUBLIC, idempotency=kind
    )
    for kind in Idempotency
}


class Racer:
    """Loses as often as the request says; counts its tries."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()

    async def run(self, request: StringValue, _) -> StringValue:
        self.tries[request.value] += 1
        if self.tries[request.value] <= int(request.value):
            raise RaceLost("another was faster")
        return request


@pytest.fixture
async def racer():
    racer = Racer()
    server = RpcServer(
        address="127.0.0.1:0", verifier=IdentityVerifier({}), config=CONFIG, policies=POLICIES
    )
    handler = grpc.unary_unary_rpc_method_handler(
        racer.run, StringValue.FromString, StringValue.SerializeToString
    )
    methods = {kind.name: handler for kind in Idempotency}
    server.add(
        Registration(lambda _, to: to.add_registered_method_handlers(SERVICE, methods), None)
    )
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        racer.channel = channel
        yield racer
    await server.stop(0)


async def call(racer: Racer, kind: Idempotency, losses: int) -> StringValue:
    method = racer.channel.unary_unary(
        f"/{SERVICE}/{kind.name}", StringValue.SerializeToString, StringValue.FromString
    )
    metadata = [("idempotency-key", "a-key-of-this-test")]
    return await method(StringValue(value=str(losses)), metadata=metadata, timeout=10)


@pytest.mark.parametrize("kind", [Idempotency.SAFE, Idempotency.REPEATABLE, Idempotency.KEYED])
async def test_what_may_be_repeated_is_tried_again_at_most_three_times_in_all(racer, kind):
    assert (await call(racer, kind, TRIES_MAX - 1)).value == f"{TRIES_MAX - 1}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(racer, kind, 99)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert racer.tries["99"] == TRIES_MAX == 3


@pytest.mark.parametrize("kind", [Idempotency.UNSPECIFIED, Idempotency.OPTIONAL, Idempotency.ONCE])
async def test_what_may_not_be_repeated_is_tried_once(racer, kind):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(racer, kind, 1)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert racer.tries["1"] == 1
