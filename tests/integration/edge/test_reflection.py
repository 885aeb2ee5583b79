"""Contracts asked of a server: of honest ones in both versions, and of those that tell half."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2

from edge.contracts import ContractError, Contracts
from edge.foreign import files_of_servers
from shared.rpc.client import Upstreams
from tests.protos import compile_protos

V1, V1ALPHA = "grpc.reflection.v1", "grpc.reflection.v1alpha"
PROTO = """
syntax = "proto3";
package acme.%(name)s.v1;
import "google/api/annotations.proto";
import "common.proto";
service %(name)s {
  rpc Get(acme.Q) returns (acme.Q) { option (google.api.http) = {get: "/v1/%(name)s"}; }
}
service Hidden { rpc Get(acme.Q) returns (acme.Q); }
"""
COMMON = 'syntax = "proto3"; package acme; message Q { string text = 1; }'

Answer = reflection_pb2.ServerReflectionResponse
Files = dict[str, FileDescriptorProto]
Tell = Callable[[reflection_pb2.ServerReflectionRequest], Answer | None]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The files of two services, "tea" and "cup", and all that they import."""
    source = tmp_path / "protos"
    source.mkdir()
    (source / "common.proto").write_text(COMMON)
    for name in ("tea", "cup"):
        (source / f"{name}.proto").write_text(PROTO % {"name": name})
    return {file.name: file for file in compile_protos(source, tmp_path).file}


def honest(files: Files, *services: str) -> Tell:
    """Tells one file at a time, as many languages do."""

    def tell(request: reflection_pb2.ServerReflectionRequest) -> Answer:
        if request.list_services:
            names = [f"acme.{service}.v1.{service}" for service in services]
            listed = [{"name": name} for name in (*names, f"{V1}.ServerReflection")]
            return Answer(list_services_response={"service": listed})
        name = request.file_by_filename
        if request.file_containing_symbol:
            name = request.file_containing_symbol.split(".")[1] + ".proto"
        return told(files[name]) if name in files else refused("no such file")

    return tell


def told(*files: FileDescriptorProto) -> Answer:
    serialized = [file.SerializeToString() for file in files]
    return Answer(file_descriptor_response={"file_descriptor_proto": serialized})


def refused(message: str) -> Answer:
    return Answer(error_response={"error_code": 5, "error_message": message})


@asynccontextmanager
async def serving(tell: Tell, version: str = V1) -> AsyncIterator[str]:
    """A server with nothing but reflection; where `tell` returns None, it hangs up."""

    async def converse(requests: AsyncIterator[object], _context: object) -> AsyncIterator[Answer]:
        async for request in requests:
            answer = tell(request)
            if answer is None:
                return
            yield answer

    method = grpc.stream_stream_rpc_method_handler(
        converse,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=Answer.SerializeToString,
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers = {"ServerReflectionInfo": method}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(f"{version}.ServerReflection", handlers)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def ask(upstreams: str) -> tuple[Contracts, frozenset[str]]:
    files, services = await files_of_servers(
        Upstreams.parse(upstreams), None, wait_s=0, tell=lambda sentence: None
    )
    return Contracts(files), services


@pytest.mark.parametrize("version", [V1, V1ALPHA])
async def test_both_versions_tell_all_services_but_reflection_with_their_imports(files, version):
    async with serving(honest(files, "tea", "cup"), version) as address:
        contracts, services = await ask(f"*={address}")
    assert services == {"acme.tea.v1.tea", "acme.cup.v1.cup"}
    assert {file.name for file in contracts.file_set.file} == files.keys()
    assert contracts.message("acme.Q").fields[0].name == "text"


async def test_each_server_is_believed_for_its_own_packages_alone(files):
    async with serving(honest(files, "tea")) as tea, serving(honest(files, "tea", "cup")) as cup:
        contracts, services = await ask(f"acme.tea={tea},acme.cup={cup}")
    assert services == {"acme.tea.v1.tea", "acme.cup.v1.cup"}
    assert len(contracts.file_set.file) == len(files)


async def test_two_servers_that_disagree_on_a_file_are_both_named(files):
    other = {
        name: FileDescriptorProto.FromString(f.SerializeToString()) for name, f in files.items()
    }
    other["common.proto"].message_type[0].field[0].number = 2
    async with serving(honest(files, "tea")) as tea, serving(honest(other, "cup")) as cup:
        with pytest.raises(ContractError, match=r"tell of two different common\.proto") as error:
            await ask(f"acme.tea={tea},acme.cup={cup}")
    assert tea in str(error.value)
    assert cup in str(error.value)


async def test_the_versions_of_google_s_own_files_may_differ(files):
    other = {
        name: FileDescriptorProto.FromString(f.SerializeToString()) for name, f in files.items()
    }
    other["google/protobuf/descriptor.proto"].options.java_package = "older"
    async with serving(honest(files, "tea")) as tea, serving(honest(other, "cup")) as cup:
        assert len((await ask(f"acme.tea={tea},acme.cup={cup}"))[1]) == 2


def without(name: str) -> Callable[[Files], Tell]:
    return lambda files: honest({n: file for n, file in files.items() if n != name}, "tea")


def instead_of_imports(answer: Callable[[Files], Answer | None]) -> Callable[[Files], Tell]:
    def spoilt(files: Files) -> Tell:
        tell = honest(files, "tea")
        return lambda request: answer(files) if request.file_by_filename else tell(request)

    return spoilt


def garbage(_files: Files) -> Answer:
    return Answer(file_descriptor_response={"file_descriptor_proto": [b"\xff"]})


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (without("tea.proto"), r"does not tell of acme\.tea\.v1\.tea: no such file"),
        (without("common.proto"), r"not tell of common\.proto, which tea\.proto imports: no such"),
        (instead_of_imports(lambda files: told(files["tea.proto"])), "tells of another file when"),
        (instead_of_imports(garbage), "is no file descriptor"),
        (instead_of_imports(lambda files: None), "hung up when asked for"),
    ],
    ids=["service", "import", "another file", "garbage", "hangs up"],
)
async def test_a_server_that_tells_half_is_refused_with_what_is_missing(files, spoilt, reason):
    async with serving(spoilt(files)) as address:
        with pytest.raises(ContractError, match=reason) as error:
            await ask(f"*={address}")
    assert str(error.value).startswith(address)
