"""The conformance cases, over real HTTP, through a real edge, to a real gRPC server."""

import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf import descriptor_pool, text_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from edge.config import EdgeConfig
from edge.contracts import Contracts, MethodInfo
from edge.serving import bind, serving
from edge.wiring import Surroundings, open_edge
from shared.clock import SystemClock
from shared.rpc.client import Upstreams
from tests.integration.edge.case import CASES, Case, all_cases
from tests.integration.edge.echo import Echo, Script, code_number
from tests.integration.edge.wire import Answer, Connection
from tests.protos import compile_protos

PACKAGE = "conformance.v1"
CASE_LIST = [pytest.param(case, id=f"{topic}: {case.name}") for topic, case in all_cases()]
assert error_details_pb2  # known to the pool that reads the details of failures


@dataclass(frozen=True)
class Bench:
    """One edge, what is behind it, and a connection to it."""

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
        return Script(messages if has_answer else None, failure_of(case))


def failure_of(case: Case) -> status_pb2.Status | None:
    if case.fails is None:
        return None
    failure = status_pb2.Status(
        code=code_number(case.fails["code"]), message=case.fails.get("message", "")
    )
    pool = descriptor_pool.Default()
    return text_format.Merge(case.fails.get("details", ""), failure, descriptor_pool=pool)


@pytest.fixture(scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> AsyncIterator[Bench]:
    image = tmp_path_factory.mktemp("conformance") / "image.binpb"
    image.write_bytes(compile_protos(CASES, image.parent).SerializeToString())
    contracts = Contracts.of_bytes(image.read_bytes())
    methods = {method.full_name: method for method in contracts.methods()}
    echo = Echo(methods)
    async with AsyncExitStack() as stack:
        port = await start_server(stack, echo)
        port = await start_edge(stack, image, f"*=127.0.0.1:{port}", valkey_url)
        connection = stack.enter_context(closing(Connection(port)))
        yield Bench(methods, contracts, echo, connection)


async def start_server(stack: AsyncExitStack, echo: Echo) -> int:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([echo])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return port


async def start_edge(stack: AsyncExitStack, image: Path, upstreams: str, valkey_url: str) -> int:
    config = EdgeConfig(
        listen="127.0.0.1:0",
        descriptors=str(image),
        allow_anonymous=True,
        api_burst_points=1_000_000,
    )
    around = Surroundings(Upstreams.parse(upstreams), None, valkey_url, SystemClock())
    listener = stack.enter_context(closing(bind(config.listen, setting="listen")))
    # Inherited by what is accepted. uvloop sets it, asyncio's own loop here does not: without
    # it the end of each answer waits 40 ms for the client's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    app = await stack.enter_async_context(open_edge(config, around))
    return await stack.enter_async_context(serving(app, config, listener))


def test_each_case_has_a_name_of_its_own() -> None:
    names = [param.id for param in CASE_LIST]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASE_LIST)
async def test_case(bench: Bench, case: Case) -> None:
    bench.echo.follow(bench.script(case))
    answer = await bench.connection.ask(
        case.method, case.target, case.header_lines, case.body_bytes
    )
    check_answer(case, answer)
    if case.is_refused:
        assert not bench.echo.received, "a refused request has reached the server"
    elif case.calls:
        check_call(bench, case)


def check_call(bench: Bench, case: Case) -> None:
    [received] = bench.echo.received
    method = bench.method(case.calls)
    assert received.path == method.full_name
    if case.receives is not None:
        got, wanted = method.input.FromString(received.request), method.input()
        text_format.Parse(case.receives, wanted, descriptor_pool=bench.contracts.pool)
        # As bytes: NaN is not equal to itself.
        assert canonical(got) == canonical(wanted), f"received {got}"
    for name, value in case.metadata.items():
        assert received.metadata.get(name, "") == value, name


def canonical(message: Message) -> bytes:
    return message.SerializePartialToString(deterministic=True)


def check_answer(case: Case, answer: Answer) -> None:
    told = answer.body.decode("utf-8", "replace")
    assert answer.status == case.expected_status, told
    for name, value in case.response_headers.items():
        assert answer.headers.get(name.lower(), "") == value, name
    if case.text is not None:
        assert told == case.text
    if case.text_hex is not None:
        assert answer.body.hex() == case.text_hex
    check_json(case, answer.body)
    check_problem(case, answer)


def check_json(case: Case, body: bytes) -> None:
    if case.json is not None:
        assert exact(parsed(body)) == exact(parsed(case.json)), body.decode()
    if case.json_has is not None:
        document = parsed(body)
        for name, value in parsed(case.json_has).items():
            assert exact(document[name]) == exact(value), name
    for path in case.json_lacks:
        assert not has_member(parsed(body), path.split(".")), path


def check_problem(case: Case, answer: Answer) -> None:
    """RFC 9457, section 3; and what the case says of its members."""
    if case.expected_status < 400 or case.method == "HEAD":
        return
    assert answer.headers["content-type"] == "application/problem+json"
    problem = parsed(answer.body)
    assert problem["status"] == answer.status
    assert {"type", "title", "detail", "code", "reason", "request_id"} <= problem.keys()
    violation = problem.get("violations", [{}])[0]
    told = {**problem, **violation}
    for name in ("code", "reason", "field", "pointer"):
        wanted = getattr(case, name)
        if wanted:
            assert told.get(name) == wanted, problem
    assert case.detail in problem["detail"]
    # What is wrong is said by name, not by the name of a class or a line of a trace.
    assert not re.search(r"Traceback|Error\b.*\bline [0-9]", problem["detail"])


def parsed(text: str | bytes) -> Any:
    return json.loads(text, parse_float=Decimal)


def exact(value: Any) -> Any:
    """A value that equals another only if both are the same JSON: true is not 1."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return ("bool", value) if isinstance(value, bool) else value


def has_member(document: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(document, dict) or name not in document:
            return False
        document = document[name]
    return True
