"""`body` and `response_body` that name a field, of every kind there is."""

import json
import shutil

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.contracts import Contracts
from edge.routes import RouteTable
from edge.transcode import response_json
from tests.protos import compile_protos
from tests.unit.edge.conftest import HERE, request_of
from tests.unit.edge.messages import fill_field

RPC = """
rpc F{number}(Everything) returns (Everything) {{
  option (google.api.http) = {{post: "/{name}" body: "{name}" response_body: "{name}"}};
}}"""


@pytest.fixture(scope="session")
def table(everything_contracts, tmp_path_factory):
    """A route for each field of Everything."""
    folder = tmp_path_factory.mktemp("fields")
    shutil.copy(HERE / "everything.proto", folder)
    fields = everything_contracts.message("everything.v1.Everything").fields
    methods = "".join(RPC.format(number=field.number, name=field.name) for field in fields)
    (folder / "fields.proto").write_text(
        'syntax = "proto3"; package everything.v1; import "everything.proto";'
        f'import "google/api/annotations.proto"; service Fields {{ {methods} }}'
    )
    return RouteTable.of_contracts(Contracts(compile_protos(folder, folder)))


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_field_of_any_kind_is_the_whole_document_both_ways(table, data):
    [*fields] = table.match("POST", "/text").route.method.input.DESCRIPTOR.fields
    field = data.draw(st.sampled_from(fields))
    route = table.match("POST", f"/{field.name}").route
    message = route.method.input()
    fill_field(data.draw, message, field, 2)
    whole = json_format.MessageToJson(
        message, descriptor_pool=field.file.pool, always_print_fields_with_no_presence=True
    )
    document = json.loads(whole).get(field.json_name)
    request = request_of(table, "POST", f"/{field.name}", json.dumps(document).encode())
    assert on_the_wire(request) == on_the_wire(message)
    assert json.loads(response_json(route, message)) == document


def on_the_wire(message):
    return message.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("inner", None),
        ("time", None),
        ("value", None),
        ("string_wrapper", None),
        ("maybe_text", None),
        ("choice_text", None),
        ("text", ""),
        ("an_int64", "0"),
        ("color", "COLOR_UNSPECIFIED"),
        ("texts", []),
        ("labels", {}),
    ],
)
def test_a_field_that_is_not_set_is_null_where_it_can_be_told(table, name, document):
    route = table.match("POST", f"/{name}").route
    assert json.loads(response_json(route, route.method.output())) == document


@pytest.mark.parametrize("name", ["inner", "time", "maybe_text", "texts", "labels", "text"])
def test_null_leaves_a_field_unset(table, name):
    assert not request_of(table, "POST", f"/{name}", b"null").ByteSize()
