"""One edge of the conformance contracts, in front of one server that answers as it is told."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from google.protobuf import descriptor_pool, text_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from edge.config import EdgeConfig
from edge.contracts import Contracts, MethodInfo
from edge.serving import serving
from edge.wiring import Surroundings, open_edge
from shared.clock import SystemClock
from shared.listening import bind
from shared.rpc.client import Upstreams
from tests.integration.edge.case import CASES, Case
from tests.integration.edge.echo import Echo, Script, code_number
from tests.integration.edge.wire import Connection
from tests.protos import compile_protos

PACKAGE = "conformance.v1"
assert error_details_pb2  # known to the pool that reads the details of failures


@dataclass(frozen=True)
class Bench:
    """One edge, what is behind it, and a connection to it."""

    url: str
    methods: dict[str, MethodInfo]
    contracts: Contracts
    echo: Echo
    connection: Connection

    def method(self, name: str) -> MethodInfo:
        """A method by its short name: "Templates.Single"."""
        return self.methods[f"/{PACKAGE}.{name.replace('.', '/')}"]

    def message(self, kind: type[Message], text: str) -> Message:
        """A message written in protobuf's text format."""
        return text_format.Parse(text, kind(), descriptor_pool=self.contracts.pool)

    def script(self, case: Case) -> Script:
        """What the server answers in this case."""
        texts = case.streams if case.streams is not None else ()
        if case.answers is not None:
            texts = (case.answers,)
        kind = self.method(case.calls).output if texts else None
        messages = [self.message(kind, text).SerializePartialToString() for text in texts]
        has_answer = case.answers is not None or case.streams is not None
        return Script(messages if has_answer else None, _failure(case))


def _failure(case: Case) -> status_pb2.Status | None:
    if case.fails is None:
        return None
    failure = status_pb2.Status(
        code=code_number(case.fails["code"]), message=case.fails.get("message", "")
    )
    pool = descriptor_pool.Default()
    return text_format.Merge(case.fails.get("details", ""), failure, descriptor_pool=pool)


@asynccontextmanager
async def open_bench(folder: Path) -> AsyncIterator[Bench]:
    """A running bench; the compiled contracts are left in the folder."""
    image = folder / "image.binpb"
    image.write_bytes(compile_protos(CASES, folder).SerializeToString())
    contracts = Contracts.of_bytes(image.read_bytes())
    methods = {method.full_name: method for method in contracts.methods()}
    echo = Echo(methods)
    async with AsyncExitStack() as stack:
        port = await _start_server(stack, echo)
        port = await _start_edge(stack, image, f"*=127.0.0.1:{port}")
        connection = stack.enter_context(closing(Connection(port)))
        yield Bench(f"http://127.0.0.1:{port}", methods, contracts, echo, connection)


async def _start_server(stack: AsyncExitStack, echo: Echo) -> int:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([echo])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return port


async def _start_edge(stack: AsyncExitStack, image: Path, upstreams: str) -> int:
    config = EdgeConfig(
        listen="127.0.0.1:0",
        descriptors=str(image),
        allow_anonymous=True,
        api_burst_points=1_000_000,
    )
    around = Surroundings(Upstreams.parse(upstreams), None, "", SystemClock())
    listener = stack.enter_context(closing(bind(config.listen, setting="listen")))
    app = await stack.enter_async_context(open_edge(config, around))
    return await stack.enter_async_context(serving(app, config, listener))
