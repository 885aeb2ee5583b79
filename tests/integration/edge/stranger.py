"""A stranger's gRPC server, of `foreign/rooms.proto`: every kind of stream, and metadata."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from edge.contracts import Contracts, MethodInfo

CONTRACT = Path(__file__).parent / "foreign"
BINARY = bytes(range(256)) * 4


class Stranger(grpc.GenericRpcHandler):
    """Behaves as the names and texts that it is sent say; remembers what reached it.

    Attributes:
        metadata: of the last call.
        received: the messages of the last call with a client stream, as they came.
        gate: closed, it takes no more messages.
        open_calls: calls that have begun and not ended.
        was_cancelled: set when a call ended because its client left.
        answers: metadata that it sends, initial and trailing.
    """

    def __init__(self, contracts: Contracts) -> None:
        self._methods = {method.full_name: method for method in contracts.methods()}
        self._contracts = contracts
        self.gate = asyncio.Event()
        self.reset()

    def reset(self) -> None:
        """Forget what was."""
        self.metadata: dict[str, Any] = {}
        self.received: list[Any] = []
        self.open_calls = 0
        self.was_cancelled = asyncio.Event()
        self.answers: tuple[tuple[str, str], ...] = ()
        self.trailers: tuple[tuple[str, str], ...] = ()
        self.gate.set()

    def message(self, kind: str, /, **fields: Any) -> Any:
        """A message of the contract."""
        return GetMessageClass(self._contracts.message(f"foreign.v1.{kind}"))(**fields)

    def body(self, data: bytes, content_type: str = "") -> Any:
        """An HttpBody of the contract's own pool."""
        kind = GetMessageClass(self._contracts.message("google.api.HttpBody"))
        return kind(data=data, content_type=content_type)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """See grpc.GenericRpcHandler."""
        method = self._methods.get(details.method)
        if method is None:
            return None
        behaviour = getattr(self, method.name)
        codec = {
            "request_deserializer": method.input.FromString,
            "response_serializer": method.output.SerializeToString,
        }
        if method.server_streaming:
            return _HANDLERS[method.client_streaming, True](self._watched(behaviour), **codec)
        return _HANDLERS[method.client_streaming, False](self._watched_once(behaviour), **codec)

    def _watched(self, behaviour: Callable[..., AsyncIterator[Any]]) -> Any:
        async def run(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await self._begin(context)
            try:
                async for answer in behaviour(request, context):
                    yield answer
            except (asyncio.CancelledError, GeneratorExit):
                self.was_cancelled.set()
                raise
            finally:
                self.open_calls -= 1

        return run

    def _watched_once(self, behaviour: Callable[..., Any]) -> Any:
        async def run(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await self._begin(context)
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                self.was_cancelled.set()
                raise
            finally:
                self.open_calls -= 1

        return run

    async def _begin(self, context: grpc.aio.ServicerContext) -> None:
        self.open_calls += 1
        self.received = []
        self.metadata = _texts(context.invocation_metadata())
        if self.answers:
            await context.send_initial_metadata(self.answers)
        context.set_trailing_metadata(self.trailers)

    async def _take(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """The messages as they come; "refuse" refuses, "stop" stops reading."""
        async for request in requests:
            self.received.append(request)
            await self.gate.wait()
            text = getattr(request, "text", "")
            if text == "refuse":
                await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such room.")
            if text == "stop":
                return
            yield request

    # Unary
    async def GetNote(self, request: Any, context: Any) -> Any:
        return self.message(
            "Note", room=request.room, text="x" * max(0, request.number), etag=request.etag
        )

    async def GetKey(self, request: Any, context: Any) -> Any:
        return self.message("Key", name=request.name, secret="s" * 30, text="x" * 5000)

    async def GetFile(self, request: Any, context: Any) -> Any:
        return self.body(b"x" * 5000, request.name.replace("~", "/"))

    # Client streams
    async def AddNotes(self, requests: Any, context: Any) -> Any:
        taken = [note async for note in self._take(requests, context)]
        notes = [self.message("Note", room=note.room, text=note.text[:9]) for note in taken]
        return self.message("Notes", notes=notes)

    AddAuthors = AddNotes
    AddNothing = AddNotes

    async def AddTable(self, requests: Any, context: Any) -> Any:
        self.received = [part async for part in requests]
        return self.message("Notes")

    async def Upload(self, requests: Any, context: Any) -> Any:
        async for part in self._take(requests, context):
            if part.data.startswith(b"refuse"):
                await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such room.")
        return self.message("Notes")

    UploadChunks = AddTable

    # Two ways
    async def Chat(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for note in self._take(requests, context):
            if note.text == "fail":
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "The room is closed.")
            yield self.message("Note", room=note.room, text=note.text.upper())

    async def Pipe(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for part in requests:
            yield self.body(part.data[::-1], part.content_type)

    # Server streams
    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if request.room == "silent":
            await asyncio.Event().wait()
        for number in range(request.cursor + 1, request.cursor + 1 + request.count):
            note = self.message("Note", room=request.room, text="x" * 200, number=number)
            yield self.message("NoteEvent", note=note, cursor=number)
            await self.gate.wait()
        if request.room == "breaks":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "The room is closed.")

    async def WatchKeys(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield self.message("Key", secret="s" * 30, text="x" * 5000)

    async def Download(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if request.name == "empty":
            return
        if request.name == "absent":
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such file.")
        yield self.body(BINARY, "application/x-test")
        if request.name == "breaks":
            await context.abort(grpc.StatusCode.INTERNAL, "The disk is on fire.")
        yield self.body(b"")
        yield self.body(BINARY, "text/ignored")

    async def DownloadPages(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for number in range(3):
            yield self.message("Page", number=number, content=self.body(BINARY, "image/test"))


def _texts(metadata: Any) -> dict[str, Any]:
    """Metadata, a name that came twice with all its values."""
    found: dict[str, Any] = {}
    for name, value in metadata or ():
        found[name] = (*found[name], value) if name in found else (value,)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


_HANDLERS: Mapping[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}

__all__ = ["BINARY", "CONTRACT", "MethodInfo", "Stranger"]
