"""The codecs against google.protobuf.json_format: every kind of field, in every syntax.

Messages are compared as bytes on the wire, documents as values. Where json_format departs from the
specification, ours follows the specification: such documents are left out here, and each has its
case at the end.
"""

import json
import math

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.codec import CodecOptions, Codecs
from edge.contracts import Contracts, load_contracts
from edge.json_text import Wrong
from tests.protos import compile_protos
from tests.unit.edge.conftest import HERE
from tests.unit.edge.messages import LARGEST_FLOAT_32, messages

PROPERTY = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TYPES = [
    "everything.v1.Everything",
    "syntaxes.edition.Edition",
    "syntaxes.legacy.Legacy",
    "tenfold.ledger.v1.Transaction",
    "tenfold.notification.v1.WatchInboxResponse",
    "tenfold.auth.v1.CreateApiKeyRequest",
]
every_type = pytest.mark.parametrize("name", TYPES)


@pytest.fixture(scope="session")
def codec_of(everything_contracts, tmp_path_factory):
    """Makes the codec of a type, by its full name and the options."""
    syntaxes = compile_protos(HERE / "syntaxes", tmp_path_factory.mktemp("protos"))
    ours = load_contracts()
    pools = {
        "everything": everything_contracts.pool,
        "syntaxes": Contracts(syntaxes).pool,
        "tenfold": ours.pool,
    }

    def make(name, **options):
        pool = pools[name.partition(".")[0]]
        return Codecs(pool, CodecOptions(**options)).of(pool.FindMessageTypeByName(name))

    return make


def on_the_wire(message):
    return message.SerializePartialToString(deterministic=True)


def reference_reads(codec, text, **options):
    """The bytes of what json_format reads."""
    pool, message = codec.descriptor.file.pool, codec.message_class()
    return on_the_wire(json_format.Parse(text, message, descriptor_pool=pool, **options))


def reference_writes(message, **options):
    pool = message.DESCRIPTOR.file.pool
    return json_format.MessageToJson(message, descriptor_pool=pool, **options)


def is_same(left, right):
    """Equal JSON, numbers by value: 1 is 1.0, and neither is true."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(is_same(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(is_same, left, right))
    return left == right and isinstance(left, bool) is isinstance(right, bool)


@every_type
@PROPERTY
@given(data=st.data())
def test_what_is_written_reads_back_as_the_same_bytes(codec_of, name, data):
    codec = codec_of(name, **data.draw(OPTIONS))
    message = data.draw(messages(codec.descriptor))
    text = codec.json_of_message(message)
    assert on_the_wire(codec.message_of_json(text)) == on_the_wire(message)


@every_type
@PROPERTY
@given(data=st.data())
def test_the_reference_reads_what_we_write_as_the_same_bytes(codec_of, name, data):
    codec = codec_of(name, **data.draw(OPTIONS))
    message = data.draw(messages(codec.descriptor))
    assert reference_reads(codec, codec.json_of_message(message)) == on_the_wire(message)


@every_type
@PROPERTY
@given(data=st.data())
def test_we_read_what_the_reference_writes_as_the_same_bytes(codec_of, name, data):
    codec = codec_of(name)
    message = data.draw(messages(codec.descriptor))
    text = reference_writes(message, preserving_proto_field_name=data.draw(st.booleans()))
    assert on_the_wire(codec.message_of_json(text.encode())) == on_the_wire(message)


@every_type
@PROPERTY
@given(data=st.data())
def test_documents_equal_the_references(codec_of, name, data):
    options = data.draw(OPTIONS)
    codec = codec_of(name, **options)
    message = data.draw(messages(codec.descriptor))
    reference = reference_writes(
        message,
        always_print_fields_with_no_presence=options["emit_defaults"],
        preserving_proto_field_name=options["proto_names"],
    )
    assert is_same(json.loads(codec.json_of_message(message)), json.loads(reference))


OPTIONS = st.fixed_dictionaries({"emit_defaults": st.booleans(), "proto_names": st.booleans()})
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    # Not beyond: there the reference rounds 5.112042593167633e+16 into an integer field.
    | st.floats(-(2.0**53), 2.0**53)
    | st.sampled_from(["", "x", "1", "1.0", "-1e3", "true", "NaN", "Infinity", "AA==", "-_8", "\0"])
    | st.sampled_from(["COLOR_RED", "OPEN_SAME", "CLOSED_SIX", "SIZE_SMALL", "NULL_VALUE"])
    | st.sampled_from(["1.5s", "-0.1s", "fooBar,baz", "foo_bar", "2026-1-1T0:0:0Z"])
    | st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01T00:00:00.5+01:00"])
    | st.sampled_from([{}, [], [[]], [None], {"a": 1}, {"1": {}}, {"text": "x"}, {"@type": "t/x"}])
)


def slots(value):
    """Every place in a document where another value could stand."""
    places = []
    for key in value if isinstance(value, dict) else range(len(value)):
        places.append((value, key))
        if isinstance(value[key], (dict, list)):
            places += slots(value[key])
    return places


@every_type
@settings(PROPERTY, max_examples=80)
@given(data=st.data())
def test_a_changed_document_is_read_as_the_reference_does_or_refused(codec_of, name, data):
    """We are the stricter one: nothing that we take may the reference refuse or read otherwise."""
    codec = codec_of(name)
    document = json.loads(reference_writes(data.draw(messages(codec.descriptor))))
    places = slots(document)
    if places:
        container, key = data.draw(st.sampled_from(places))
        container[key] = data.draw(VALUES)
    text = json.dumps(document)
    try:
        message = codec.message_of_json(text.encode())
    except Wrong as wrong:
        assert wrong.description
        return
    if not is_fault_of_the_reference(text):
        assert reference_reads(codec, text) == on_the_wire(message)


def is_fault_of_the_reference(text):
    return '"values": null' in text  # the first case below


# --- where the specification wins


def reference_refuses(codec, text):
    try:
        reference_reads(codec, text)
    except Exception:
        return True
    return False


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ('{"values": null}', "values", []),
        ('{"aFloat": 3.4028235e38}', "a_float", LARGEST_FLOAT_32),
    ],
)
def test_what_the_reference_refuses_and_the_specification_takes(codec_of, text, field, value):
    codec = codec_of("everything.v1.Everything")
    assert reference_refuses(codec, text)
    assert getattr(codec.message_of_json(text.encode()), field) == value


@pytest.mark.parametrize(
    "text",
    [
        '{"anInt32": true}',
        '{"aDouble": true}',
        '{"color": true}',
        '{"anInt32": 5.112042593167633e+16}',
        '{"anInt64": 9223372036854775807.5}',
        '{"anInt32": 1.00000000000000000001}',
        '{"anInt32": "1_000"}',
        '{"anInt32": "\\u0967"}',
        '{"color": "1"}',
        '{"aDouble": "1_0.5"}',
        '{"aDouble": "inf"}',
        '{"data": "not base64!"}',
        '{"time": "2026-1-01T00:00:00Z"}',
        '{"time": "2026-01-01T00:00:00+24:00"}',
        '{"time": "2026-01-01T00:00:00+01:60"}',
        '{"an_int32": 1, "anInt32": 1}',
        '{"anInt32": 1, "anInt32": 1}',
    ],
)
def test_what_the_specification_does_not_take_is_refused(codec_of, text):
    codec = codec_of("everything.v1.Everything")
    with pytest.raises(Wrong):
        codec.message_of_json(text.encode())


def test_a_nan_and_the_sign_of_zero_are_kept(codec_of):
    codec = codec_of("everything.v1.Everything")
    message = codec.message_class(a_double=-0.0, doubles=[math.nan, math.inf, -0.0])
    assert on_the_wire(codec.message_of_json(codec.json_of_message(message))) == on_the_wire(
        message
    )
