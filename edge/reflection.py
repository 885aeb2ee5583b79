"""The contracts of a running server, asked of itself (gRPC Server Reflection).

The protocol's v1 is tried first, then v1alpha, whose messages are the same. The answer is
complete, every imported file included, or it is refused: a contract with holes would be
served with holes.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc.aio
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection_pb2  # type: ignore[import-untyped]

from edge.contracts import ContractError
from shared.errors import TenfoldError, Unavailable, Unimplemented
from shared.rpc.client import Channel

# Newest first (grpc/reflection/v1 and v1alpha).
_PATHS = (
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
# Not for REST: they speak of the server and not for it.
_OWN_PACKAGES = ("grpc.reflection.", "grpc.health.")

# A whole conversation with a server that answers.
CONVERSATION_S = 10.0
ANSWER_PAUSE_S = 0.2
# More than the largest public sets of contracts hold.
FILES_MAX = 20_000


async def told_contracts(
    channel: Channel, *, wait_s: float, is_away: Callable[[str], None]
) -> tuple[FileDescriptorSet, frozenset[str]]:
    """Ask a server what it serves; one that is not up yet is asked again.

    Args:
        channel: to the server.
        wait_s: how long it may be away, in all.
        is_away: called once, with the reason, when it does not answer the first time.

    Returns:
        The files with all that they import, and the full names of the services: all but
        reflection and health.

    Raises:
        ContractError: it stayed away, does not tell, or tells less than everything.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + wait_s
    is_first = True
    while True:
        try:
            return await _ask_any(channel)
        except Unavailable as error:
            if is_first:
                is_away(reason_of(error))
            if loop.time() >= until_s:
                raise ContractError(
                    f"it did not answer for {wait_s:g} s ({reason_of(error)})"
                ) from error
        is_first = False
        await asyncio.sleep(ANSWER_PAUSE_S)


def reason_of(error: TenfoldError) -> str:
    """What gRPC says of a failed call, for the operator; it may name addresses."""
    cause = error.__cause__
    text = cause.details() if isinstance(cause, grpc.aio.AioRpcError) else ""
    return " ".join((text or error.message).split())


async def _ask_any(channel: Channel) -> tuple[FileDescriptorSet, frozenset[str]]:
    for path in _PATHS:
        try:
            async with asyncio.timeout(CONVERSATION_S):
                return await _ask(channel, path)
        except Unimplemented:
            continue
        except TimeoutError as error:
            raise ContractError(f"it took longer than {CONVERSATION_S:g} s to tell") from error
        except Unavailable:
            raise
        except TenfoldError as error:
            raise ContractError(f"it does not tell its contracts: {reason_of(error)}") from error
    raise ContractError("it does not serve reflection: turn that on there, or use --descriptors")


async def _ask(channel: Channel, path: str) -> tuple[FileDescriptorSet, frozenset[str]]:
    method = channel.stream_stream(
        path,
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    async with method(timeout=CONVERSATION_S) as call:
        teller = _Teller(call)
        listed = await teller.services()
        services = frozenset(name for name in listed if not name.startswith(_OWN_PACKAGES))
        for name in sorted(services):
            await teller.learn(name, file_containing_symbol=name)
        await teller.learn_imports()
    return FileDescriptorSet(file=teller.files.values()), services


class _Teller:
    """One conversation, question by question.

    Args:
        call: a stream of the reflection service.
    """

    def __init__(self, call: Any) -> None:  # noqa: ANN401 - grpc's own call
        self._call = call
        self.files: dict[str, FileDescriptorProto] = {}

    async def services(self) -> list[str]:
        """The full names of all services."""
        answer = await self._answer("its services", list_services="*")
        return [service.name for service in answer.list_services_response.service]

    async def learn_imports(self) -> None:
        """Ask for what the files import, until nothing is missing."""
        waiting = deque(self.files.values())
        while waiting:
            importer = waiting.popleft()
            for name in importer.dependency:
                if name not in self.files:
                    what = f"{name}, which {importer.name} imports"
                    waiting += await self.learn(what, file_by_filename=name)
                    if name not in self.files:
                        raise ContractError(f"it tells of another file when asked for {what}")

    async def learn(self, what: str, **question: str) -> list[FileDescriptorProto]:
        """Ask for a file; the answer may hold others that it needs. Those that are new."""
        answer = await self._answer(what, **question)
        new = []
        for serialized in answer.file_descriptor_response.file_descriptor_proto:
            try:
                file = FileDescriptorProto.FromString(serialized)
            except DecodeError as error:
                raise ContractError(f"what it tells of {what} is no file descriptor") from error
            if file.name not in self.files:
                self.files[file.name] = file
                new.append(file)
        if len(self.files) > FILES_MAX:
            raise ContractError(f"it tells of more than {FILES_MAX} files")
        return new

    async def _answer(self, what: str, **question: str) -> Any:  # noqa: ANN401 - untyped message
        # A write into a call that is over fails without the reason; the read has it.
        with suppress(Unavailable):
            await self._call.write(reflection_pb2.ServerReflectionRequest(**question))
        answer = await self._call.read()
        if answer is grpc.aio.EOF:
            raise ContractError(f"it hung up when asked for {what}")
        if answer.HasField("error_response"):
            error = answer.error_response
            text = error.error_message or f"code {error.error_code}"
            raise ContractError(f"it does not tell of {what}: {text}")
        return answer
