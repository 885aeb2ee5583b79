from pathlib import Path

import pytest

from edge.contracts import Contracts
from edge.routes import RouteTable
from tests.protos import compile_protos

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def everything_contracts(tmp_path_factory):
    return Contracts(compile_protos(HERE, tmp_path_factory.mktemp("protos")))


@pytest.fixture(scope="session")
def everything_table(everything_contracts):
    return RouteTable.of_contracts(everything_contracts)


@pytest.fixture
def table_of(tmp_path):
    """Makes a route table of rules for methods M0, M1, ... of one service."""

    def make(*rules, more=""):
        methods = more + "".join(
            f"rpc M{i}(Q) returns (Q) {{ option (google.api.http) = {{{rule}}}; }}\n"
            for i, rule in enumerate(rules)
        )
        (tmp_path / "t.proto").write_text(
            'syntax = "proto3"; package t; import "google/api/annotations.proto";\n'
            'import "tenfold/options/v1/policy.proto";\n'
            "message Q { string a = 1; string b = 2; Q q = 3; repeated string r = 4;"
            " map<string, string> m = 5; }\n"
            f"service S {{ {methods} }}"
        )
        return RouteTable.of_contracts(compile_protos(tmp_path, tmp_path))

    return make
