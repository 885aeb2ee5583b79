"""A gRPC server of any contract: it keeps what it received and answers as it was told."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio
from google.rpc import code_pb2, status_pb2

from edge.contracts import MethodInfo
from shared.rpc.status import STATUS_DETAILS_KEY

CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True)
class Received:
    """One call as it arrived.

    Attributes:
        path: "/conformance.v1.Templates/Single".
        request: the bytes of the message.
        metadata: what came beside it; the last value of a repeated name.
    """

    path: str
    request: bytes
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Script:
    """What to answer to the next calls.

    Attributes:
        messages: their bytes; None echoes the request.
        failure: ends the call after them; None ends it well.
    """

    messages: Sequence[bytes] | None = None
    failure: status_pb2.Status | None = None


@dataclass
class Echo(grpc.GenericRpcHandler):
    """Serves the methods it is given, by path."""

    methods: Mapping[str, MethodInfo]
    script: Script = field(default_factory=Script)
    received: list[Received] = field(default_factory=list)

    def follow(self, script: Script) -> None:
        """Forget what came before, and answer so from now on."""
        self.script, self.received = script, []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """See grpc.GenericRpcHandler."""
        method = self.methods.get(details.method)
        if method is None:
            return None
        record = self._recorder(method)
        if method.server_streaming:

            async def stream(request: bytes, context: grpc.aio.ServicerContext):
                record(request, context)
                async for message in self._answers(context):
                    yield message

            return grpc.unary_stream_rpc_method_handler(stream)

        async def unary(request: bytes, context: grpc.aio.ServicerContext):
            record(request, context)
            messages = [message async for message in self._answers(context)]
            echoed = request if method.input is method.output else b""
            return messages[0] if messages else echoed

        return grpc.unary_unary_rpc_method_handler(unary)

    def _recorder(self, method: MethodInfo) -> Callable[[bytes, grpc.aio.ServicerContext], None]:
        def record(request: bytes, context: grpc.aio.ServicerContext) -> None:
            metadata = dict(context.invocation_metadata() or ())
            self.received.append(Received(method.full_name, request, metadata))

        return record

    async def _answers(self, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        for message in self.script.messages or ():
            yield message
        failure = self.script.failure
        if failure is not None:
            details = (
                ((STATUS_DETAILS_KEY, failure.SerializeToString()),) if failure.details else ()
            )
            await context.abort(CODES[failure.code], failure.message, details)


def code_number(name: str) -> int:
    """The number of a gRPC code: "NOT_FOUND" is 5."""
    return int(code_pb2.Code.Value(name))
