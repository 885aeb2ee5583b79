"""A gRPC server of any contract: it keeps what it received and answers as it was told."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        requests: the bytes of each message; one, but for a client stream.
        metadata: what came beside it; the last value of a repeated name.
    """

    path: str
    requests: Sequence[bytes]
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
        if method.server_streaming:
            return self._streaming(method)

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> bytes:
            requests = await self._record(method, request, context)
            messages = [message async for message in self._answers(context)]
            echoes = method.input is method.output and requests
            return messages[0] if messages else requests[-1] if echoes else b""

        kind = (
            grpc.stream_unary_rpc_method_handler
            if method.client_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return kind(unary)

    def _streaming(self, method: MethodInfo) -> grpc.RpcMethodHandler:
        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            await self._record(method, request, context)
            async for message in self._answers(context):
                yield message

        kind = (
            grpc.stream_stream_rpc_method_handler
            if method.client_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return kind(stream)

    async def _record(
        self, method: MethodInfo, request: Any, context: grpc.aio.ServicerContext
    ) -> Sequence[bytes]:
        requests = [item async for item in request] if method.client_streaming else [request]
        metadata = dict(context.invocation_metadata() or ())
        self.received.append(Received(method.full_name, requests, metadata))
        return requests

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
