import sysconfig
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

from edge.contracts import Contracts
from edge.routes import RouteTable

HERE = Path(__file__).parent
SITE_PACKAGES = sysconfig.get_paths()["purelib"]


def compile_protos(folder, *names):
    """A descriptor set of .proto files, with all they import."""
    image = folder / "image.binpb"
    arguments = [f"-I{folder}", f"-I{SITE_PACKAGES}", f"-I{SITE_PACKAGES}/grpc_tools/_proto"]
    arguments += [f"--descriptor_set_out={image}", "--include_imports", "--include_source_info"]
    assert protoc.main(["protoc", *arguments, *names]) == 0
    return FileDescriptorSet.FromString(image.read_bytes())


@pytest.fixture(scope="session")
def everything_contracts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("protos")
    (folder / "everything.proto").write_text((HERE / "everything.proto").read_text())
    return Contracts(compile_protos(folder, "everything.proto"))


@pytest.fixture(scope="session")
def everything_table(everything_contracts):
    return RouteTable.of_contracts(everything_contracts)


@pytest.fixture
def table_of(tmp_path):
    """Makes a route table of rules for methods M0, M1, ... of one service."""

    def make(*rules):
        methods = "".join(
            f"rpc M{i}(Q) returns (Q) {{ option (google.api.http) = {{{rule}}}; }}\n"
            for i, rule in enumerate(rules)
        )
        (tmp_path / "t.proto").write_text(
            'syntax = "proto3"; package t; import "google/api/annotations.proto";\n'
            "message Q { string a = 1; string b = 2; Q q = 3; repeated string r = 4;"
            " map<string, string> m = 5; }\n"
            f"service S {{ {methods} }}"
        )
        return RouteTable.of_contracts(compile_protos(tmp_path, "t.proto"))

    return make
