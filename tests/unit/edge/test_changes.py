"""What differs between two contracts, and what of it breaks a client."""

from pathlib import Path

import pytest

from edge.changes import Changes, changes_between
from edge.contracts import Contracts
from edge.routes import RouteTable
from tests.protos import compile_protos

BASE = """
syntax = "proto3";
package t;
import "google/api/annotations.proto";
import "tenfold/options/v1/policy.proto";
enum Colour { COLOUR_UNSPECIFIED = 0; RED = 1; BLUE = 2; }
message Inner { string deep = 1; Inner again = 2; }
message In { string id = 1; int32 count = 2; repeated string tags = 3; Colour colour = 4; }
message Out { string id = 1; Inner inner = 2; oneof what { string a = 3; string b = 4; } }
service S {
  rpc Get(In) returns (Out) { option (google.api.http) = {get: "/v1/things/{id}"}; }
  rpc Make(In) returns (Out) { option (google.api.http) = {post: "/v1/things" body: "*"}; }
}
"""
GET, MAKE = "GET /v1/things/{id} (/t.S/Get)", "POST /v1/things (/t.S/Make)"


def compared(folder: Path, *replaced: tuple[str, str]) -> Changes:
    """The base contract against itself with something else in it."""
    new = BASE
    for old, other in replaced:
        assert old in new
        new = new.replace(old, other)
    return changes_between(*(_table(folder, text).routes for text in (BASE, new)))


def _table(folder: Path, text: str) -> RouteTable:
    source = folder / "source"
    source.mkdir(exist_ok=True)
    (source / "t.proto").write_text(text)
    return RouteTable.of_contracts(Contracts(compile_protos(source, folder)))


def test_the_same_contract_has_no_changes(tmp_path: Path) -> None:
    changes = compared(tmp_path)
    assert not changes
    assert list(changes.lines()) == []


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("string deep = 1;", "", "t.Inner.deep is gone"),
        ("string deep = 1;", "string deep = 7;", "t.Inner.deep has become number 7"),
        ("string deep = 1;", "string depth = 1;", "t.Inner.deep is called depth"),
        ("string deep = 1;", 'string deep = 1 [json_name = "d"];', "t.Inner.deep is 'd' in JSON"),
        ("int32 count = 2;", "int64 count = 2;", "t.In.count has another type"),
        ("int32 count = 2;", "repeated int32 count = 2;", "t.In.count is a list"),
        ("repeated string tags", "string tags", "t.In.tags was a list"),
        ("RED = 1;", "", "t.Colour has no value RED any more"),
        ("RED = 1;", "RED = 3;", "t.Colour.RED is another number"),
        ("string a = 3; string b = 4; }", "string b = 4; string c = 5; } string a = 3;",
         "t.Out.a is in another oneof"),
        ("rpc Get(In) returns (Out)", "rpc Get(In) returns (stream Out)",
         "it was unary and is a server stream"),
        ('body: "*"', 'body: "tags"', "its body was '*' and is 'tags'"),
        ('post: "/v1/things"', 'put: "/v1/things"', "it is gone"),
        ("rpc Make(In)", "rpc Build(In)", "it calls /t.S/Build"),
    ],
)  # fmt: skip
def test_what_breaks_a_client_is_named_with_its_route(
    tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    changes = compared(tmp_path, (old, new))
    assert any(sentence in line and line.startswith(("GET", "POST")) for line in changes.breaking)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("string deep = 1;", "string deep = 1; string more = 3;",
         f"~ {GET}: t.Inner.more is new"),
        ("BLUE = 2;", "BLUE = 2; GREEN = 3;", f"~ {GET}: t.Colour has a value GREEN"),
        ('{get: "/v1/things/{id}"}',
         '{get: "/v1/things/{id}" additional_bindings {get: "/v1/t/{id}"}}',
         "+ GET /v1/t/{id} (/t.S/Get)"),
        ('body: "*"};',
         'body: "*"}; option (tenfold.options.v1.method).access = ACCESS_ADMIN;',
         f"~ {MAKE}: its policy is another"),
    ],
    ids=["a field", "an enum value", "a route", "a policy"],
)  # fmt: skip
def test_what_is_new_is_told_and_breaks_nobody(
    tmp_path: Path, old: str, new: str, line: str
) -> None:
    changes = compared(tmp_path, (old, new))
    assert line in list(changes.lines())
    assert changes.breaking == ()


def test_a_message_may_be_renamed_for_json_does_not_show_it(tmp_path: Path) -> None:
    assert not compared(tmp_path, ("Inner", "Heart"))
