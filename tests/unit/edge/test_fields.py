import pytest

from edge.codec import Codecs
from edge.contracts import Contracts
from edge.fields import may_not_parse
from edge.json_text import Wrong
from tests.protos import compile_protos

PROTO = """
syntax = "proto2"; package t;
message Plain { optional Leaf left = 1; optional Leaf right = 2; }
message Leaf { optional string text = 1; }
message Needy { required string text = 1; }
message HoldsNeedy { repeated Needy needies = 1; }
message Open { extensions 100 to 199; }
message Node { optional Leaf leaf = 1; map<string, Node> nodes = 2; }
"""


@pytest.fixture(scope="module")
def contracts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("protos")
    (folder / "t.proto").write_text(PROTO)
    return Contracts(compile_protos(folder, folder))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Plain", False),
        ("Leaf", False),
        ("Needy", True),
        ("HoldsNeedy", True),
        ("Node", True),
        ("Open", True),
    ],
)
def test_required_fields_extensions_and_types_that_hold_themselves_may_not_parse(
    contracts, name, expected
):
    assert may_not_parse(contracts.message(f"t.{name}")) is expected


def test_a_missing_required_field_is_named(contracts):
    codec = Codecs(contracts.pool).of(contracts.message("t.HoldsNeedy"))
    assert codec.message_of_json(b'{"needies": [{"text": "x"}]}')
    with pytest.raises(Wrong, match="required") as caught:
        codec.message_of_json(b'{"needies": [{"text": "x"}, {}]}')
    assert caught.value.field == "needies[1].text"
