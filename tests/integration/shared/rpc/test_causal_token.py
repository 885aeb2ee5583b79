"""What a caller has seen travels with its calls, and what a call wrote with its answer."""

import time

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from shared import causal
from shared.causal import Position, Seen
from shared.identity import IdentityVerifier
from shared.lifecycle import Registration
from shared.rpc.client import Channels, Upstreams
from shared.rpc.policy import Access, Idempotency, MethodPolicy
from shared.rpc.server import RpcServer
from tests.engine import CONFIG

SERVICE = "tests.Books"
READ, WRITE, PASS_ON = (f"/{SERVICE}/{name}" for name in ("Read", "Write", "PassOn"))
POLICIES = {
    READ: MethodPolicy(READ, Access.PUBLIC, idempotency=Idempotency.SAFE, causal_reads=True),
    WRITE: MethodPolicy(WRITE, Access.PUBLIC),
    PASS_ON: MethodPolicy(PASS_ON, Access.PUBLIC),
}


class Books:
    """Notes what each call has seen; writes at the position that the request names."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    async def read(self, request: StringValue, context) -> StringValue:
        self.seen.append(context.seen)
        return request

    async def write(self, request: StringValue, context) -> StringValue:
        self.seen.append(context.seen)
        position = Position(1, int(request.value), time.time())
        causal.current().note("books.0", position)
        if context.metadata.get("replayed"):
            context.mark_replayed()
        return request

    async def pass_on(self, request: StringValue, context) -> StringValue:
        """As a service that has the other two as its upstream."""
        write = self.channels.channel(SERVICE).unary_unary(
            WRITE, StringValue.SerializeToString, StringValue.FromString
        )
        return await write(request, timeout=5)


@pytest.fixture
async def books():
    books = Books()
    server = RpcServer(
        address="127.0.0.1:0", verifier=IdentityVerifier({}), config=CONFIG, policies=POLICIES
    )
    methods = {
        path.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(
            method, StringValue.FromString, StringValue.SerializeToString
        )
        for path, method in ((READ, books.read), (WRITE, books.write), (PASS_ON, books.pass_on))
    }
    server.add(
        Registration(lambda _, to: to.add_registered_method_handlers(SERVICE, methods), None)
    )
    port = await server.start()
    upstreams = Upstreams({"*": f"127.0.0.1:{port}"})
    books.channels = Channels(upstreams, policies=POLICIES, checks_health=False)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        books.channel = channel
        yield books
    await books.channels.close()
    await server.stop(0)


async def call(books: Books, path: str, text: str = "", **metadata: str) -> dict[str, str]:
    """Make a call; the trailing metadata of its answer."""
    method = books.channel.unary_unary(path, StringValue.SerializeToString, StringValue.FromString)
    sent = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
    calling = method(StringValue(value=text), metadata=sent, timeout=10)
    await calling
    return dict(await calling.trailing_metadata())


async def test_what_a_call_wrote_comes_back_and_is_known_to_the_next(books):
    token = (await call(books, WRITE, "7"))[causal.KEY]
    answered = await call(books, READ, causal_token=token)
    assert causal.KEY not in answered  # nothing new: the client keeps what it has
    assert books.seen[-1].needed("books.0").lsn == 7


async def test_an_answer_keeps_what_the_caller_had_seen(books):
    other = (await call(books, WRITE, "7"))[causal.KEY].replace("books.0", "other.3")
    token = (await call(books, WRITE, "8", causal_token=other))[causal.KEY]
    assert Seen.of_token(token).positions.keys() == {"books.0", "other.3"}


async def test_what_a_service_had_written_for_a_call_comes_back_through_it(books):
    token = (await call(books, PASS_ON, "9"))[causal.KEY]
    assert Seen.of_token(token).needed("books.0").lsn == 9
    await call(books, PASS_ON, "10", causal_token=token.replace("books.0", "other.3"))
    assert books.seen[-1].needed("other.3").lsn == 9


async def test_only_a_call_whose_contract_says_so_may_lag(books):
    await call(books, READ)
    await call(books, WRITE, "1")
    assert [seen.may_lag for seen in books.seen] == [True, False]


async def test_a_replayed_answer_says_both(books):
    answered = await call(books, WRITE, "7", replayed="yes")
    assert answered["idempotency-replayed"] == "true"
    assert causal.KEY in answered


async def test_what_is_no_token_is_refused_before_the_handler(books):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(books, READ, causal_token="not one of ours")
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not books.seen
