from pathlib import Path

import pytest

from edge.contracts import Contracts
from edge.routes import RouteTable
from edge.transcode import request_message
from tests.protos import compile_protos

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def everything_contracts(tmp_path_factory):
    return Contracts(compile_protos(HERE, tmp_path_factory.mktemp("protos")))


@pytest.fixture(scope="session")
def everything_table(everything_contracts):
    return RouteTable.of_contracts(everything_contracts)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The routes of library.proto."""
    return RouteTable.of_contracts(
        compile_protos(HERE / "library", tmp_path_factory.mktemp("protos"))
    )


def request_of(table, method, target, body=b"", **options):
    """The request message of an HTTP request, as the edge makes it."""
    path, _, query = target.partition("?")
    found = table.match(method, path)
    return request_message(found.route, found.captures, query.encode(), body, **options)


@pytest.fixture
def contracts_of(tmp_path):
    """Makes contracts of one service's methods, and of more messages than Q."""

    def make(methods, messages=""):
        (tmp_path / "t.proto").write_text(
            'syntax = "proto3"; package t; import "google/api/annotations.proto";\n'
            'import "tenfold/options/v1/policy.proto"; import "google/api/httpbody.proto";\n'
            "message Q { string a = 1; string b = 2; Q q = 3; repeated string r = 4;"
            " map<string, string> m = 5; google.api.HttpBody body = 6; }\n"
            f"{messages} service S {{ {methods} }}"
        )
        return Contracts(compile_protos(tmp_path, tmp_path))

    return make


@pytest.fixture
def table_of(contracts_of):
    """Makes a route table of rules for methods M0, M1, ... of one service."""

    def make(*rules, more=""):
        methods = more + "".join(
            f"rpc M{i}(Q) returns (Q) {{ option (google.api.http) = {{{rule}}}; }}\n"
            for i, rule in enumerate(rules)
        )
        return RouteTable.of_contracts(contracts_of(methods))

    return make
