import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tenfold.ledger.v1.ledger_pb2 import Transaction

from edge.codec import ANY_LEVELS_MAX, CodecOptions, Codecs
from edge.contracts import ContractError, Contracts
from edge.json_text import Wrong
from tests.protos import compile_protos
from tests.unit.edge.conftest import HERE


@pytest.fixture(scope="session")
def codec(everything_contracts):
    descriptor = everything_contracts.message("everything.v1.Everything")
    return Codecs(everything_contracts.pool).of(descriptor)


@pytest.fixture(scope="session")
def sparse_codec(everything_contracts):
    descriptor = everything_contracts.message("everything.v1.Everything")
    return Codecs(everything_contracts.pool, CodecOptions(emit_defaults=False)).of(descriptor)


def read(codec, document):
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return codec.message_of_json(text)


def written(codec, message):
    return json.loads(codec.json_of_message(message))


# --- what is accepted


@pytest.mark.parametrize(
    ("document", "field", "value"),
    [
        ({"text": "x"}, "text", "x"),
        ({"an_int32": 5}, "an_int32", 5),
        ({"anInt32": "5"}, "an_int32", 5),
        ({"anInt32": 5.0}, "an_int32", 5),
        ({"anInt32": "1e2"}, "an_int32", 100),
        (b'{"anInt32": 1E+5}', "an_int32", 100000),
        (b'{"anInt32": -0}', "an_int32", 0),
        (b'{"anInt32": -0.0}', "an_int32", 0),
        (b'{"anInt32": 1.00000000000000000000}', "an_int32", 1),
        ({"anInt32": -(2**31)}, "an_int32", -(2**31)),
        ({"anInt64": str(2**63 - 1)}, "an_int64", 2**63 - 1),
        ({"anInt64": 2**53 + 1}, "an_int64", 2**53 + 1),
        (b'{"anInt64": 9007199254740993.0}', "an_int64", 2**53 + 1),
        ({"anInt64": 2**63 - 1}, "an_int64", 2**63 - 1),
        ({"aUint64": 2**64 - 1}, "a_uint64", 2**64 - 1),
        ({"aUint64": str(2**64 - 1)}, "a_uint64", 2**64 - 1),
        ({"aDouble": "NaN"}, "a_double", None),
        ({"aDouble": "-Infinity"}, "a_double", -math.inf),
        ({"aDouble": "1.5"}, "a_double", 1.5),
        ({"aDouble": 2**63}, "a_double", float(2**63)),
        ({"aFloat": 3.4028235e38}, "a_float", 3.4028234663852886e38),
        ({"data": "-_8="}, "data", b"\xfb\xff"),
        ({"data": "+/8"}, "data", b"\xfb\xff"),
        ({"data": "-_"}, "data", b"\xfb"),
        ({"color": "COLOR_DARK_BLUE"}, "color", 5),
        ({"color": 5}, "color", 5),
        ({"color": 99}, "color", 99),
        ({"otherName": "x"}, "custom_named", "x"),
        ({"custom_named": "x"}, "custom_named", "x"),
        ({"text": None, "inner": None, "texts": None, "labels": None, "time": None}, "text", ""),
        ({"maybeInt64": 0}, "maybe_int64", 0),
        ({"text": "\u202ertl"}, "text", "\u202ertl"),
        ({"int64s": ["1", 2]}, "int64s", [1, 2]),
    ],
)
def test_canonical_json_and_its_allowed_variants_are_read(codec, document, field, value):
    got = getattr(read(codec, document), field)
    assert got == value or (value is None and math.isnan(got))


def test_a_double_keeps_the_sign_of_zero(codec):
    for document in [b'{"aDouble": -0}', b'{"aDouble":-0.0}', b'{"doubles":[1,-0]}']:
        message = read(codec, document)
        number = message.doubles[1] if message.doubles else message.a_double
        assert math.copysign(1, number) == -1


@pytest.mark.parametrize(
    ("text", "seconds", "nanos"),
    [
        ("1970-01-01T00:00:00Z", 0, 0),
        ("1970-01-01T00:00:00.5Z", 0, 500_000_000),
        ("1969-12-31T23:59:59.999999999Z", -1, 999_999_999),
        ("1970-01-01T02:00:00+02:00", 0, 0),
        ("0001-01-01T00:00:00Z", -62135596800, 0),
        ("9999-12-31T23:59:59Z", 253402300799, 0),
        ("2024-02-29T00:00:00-00:30", 1709166600, 0),
    ],
)
def test_times_of_rfc_3339_are_read(codec, text, seconds, nanos):
    time = read(codec, {"time": text}).time
    assert (time.seconds, time.nanos) == (seconds, nanos)


def test_null_is_a_value_only_where_it_is_one(codec):
    message = read(codec, {"value": None, "values": [None], "choiceNull": None})
    assert message.value.WhichOneof("kind") == "null_value"
    assert len(message.values) == 1
    assert message.WhichOneof("choice") == "choice_null"
    assert not read(codec, {"stringWrapper": None, "choiceText": None}).ByteSize()
    # An unset repeated field, as for every other type; the reference fails with its own error.
    assert not read(codec, {"values": None}).values


def test_an_empty_message_is_present(codec):
    message = read(codec, {"inner": {}, "empty": {}, "struct": {}})
    assert message.HasField("inner")
    assert message.HasField("empty")
    assert message.HasField("struct")


def test_an_any_carries_a_known_type(codec):
    url = "type.googleapis.com/everything.v1.Inner"
    message = read(codec, {"any": {"@type": url, "text": "x"}})
    assert written(codec, message)["any"] == {
        "@type": url,
        "text": "x",
        "bigNumber": "0",
        "many": [],
    }
    nested = {"@type": "type.googleapis.com/google.protobuf.Duration", "value": "1.500s"}
    assert written(codec, read(codec, {"any": nested}))["any"] == nested


# --- what is refused, and how


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"nothing": 1}, "nothing"),
        ({"inner": {"nothing": 1}}, "inner.nothing"),
        ({"inners": [{}, {"text": 5}]}, "inners[1].text"),
        ({"labels": {"a b": 5}}, 'labels["a b"]'),
        ({"innerByNumber": {"7": {"text": 1}}}, 'innerByNumber["7"].text'),
        ({"innerByNumber": {"x": {}}}, "innerByNumber.x"),
        ({"innerByNumber": {"0": {}, "-0": {}}}, 'innerByNumber["-0"]'),
        ({"countByFlag": {"yes": 1}}, "countByFlag.yes"),
        ({"labels": {"a": None}}, "labels.a"),
        ({"text": 5}, "text"),
        ({"text": {}}, "text"),
        ({"text": "a\0b"}, "text"),
        ({"labels": {"a\0": "b"}}, 'labels["a\\u0000"]'),
        ({"flag": 1}, "flag"),
        ({"flag": "true"}, "flag"),
        ({"anInt32": True}, "anInt32"),
        ({"anInt32": 1.5}, "anInt32"),
        ({"anInt32": "1.5"}, "anInt32"),
        ({"anInt32": ""}, "anInt32"),
        ({"anInt32": " 1"}, "anInt32"),
        ({"anInt32": "0x10"}, "anInt32"),
        ({"anInt32": "१"}, "anInt32"),
        ({"anInt32": 2**31}, "anInt32"),
        ({"aUint32": -1}, "aUint32"),
        ({"anInt64": 2**63}, "anInt64"),
        ({"anInt64": str(2**63)}, "anInt64"),
        ({"aUint64": 2**64}, "aUint64"),
        ({"aUint64": "-1"}, "aUint64"),
        (b'{"anInt64": 9223372036854775808.0}', "anInt64"),
        (b'{"anInt32": 1.00000000000000000001}', "anInt32"),
        (b'{"anInt64": 1e300}', "anInt64"),
        ({"anInt64": "1e99999"}, "anInt64"),
        ({"int64s": [1, None]}, "int64s[1]"),
        ({"int64s": 1}, "int64s"),
        ({"inners": {}}, "inners"),
        ({"inner": "x"}, "inner"),
        ({"inner": []}, "inner"),
        ({"aDouble": True}, "aDouble"),
        ({"aDouble": "inf"}, "aDouble"),
        ({"aDouble": "1e999"}, "aDouble"),
        ({"aFloat": 3.5e38}, "aFloat"),
        ({"color": "COLOR_NONE"}, "color"),
        ({"color": "color_red"}, "color"),
        ({"color": True}, "color"),
        ({"color": 1.5}, "color"),
        ({"color": 2**31}, "color"),
        ({"colors": ["COLOR_RED", {}]}, "colors[1]"),
        ({"data": "not base64!"}, "data"),
        ({"data": "A"}, "data"),
        ({"data": "AA==="}, "data"),
        ({"data": "AA="}, "data"),
        ({"data": "=="}, "data"),
        ({"choiceText": "x", "choiceInt64": "1"}, "choiceInt64"),
        ({"choiceText": "x", "choiceNull": None}, "choiceNull"),
        ({"an_int32": 1, "anInt32": 1}, "anInt32"),
        ({"time": "2026-01-01"}, "time"),
        ({"time": "2026-1-01T00:00:00Z"}, "time"),
        ({"time": "2026-01-01t00:00:00z"}, "time"),
        ({"time": "2026-01-01 00:00:00Z"}, "time"),
        ({"time": "2026-01-01T00:00:00"}, "time"),
        ({"time": "2026-02-30T00:00:00Z"}, "time"),
        ({"time": "2026-01-01T24:00:00Z"}, "time"),
        ({"time": "2026-01-01T00:00:00+24:00"}, "time"),
        ({"time": "2026-01-01T00:00:00+01:60"}, "time"),
        ({"time": "2026-01-01T00:00:00.1234567890Z"}, "time"),
        ({"time": "0000-01-01T00:00:00Z"}, "time"),
        ({"time": "10000-01-01T00:00:00Z"}, "time"),
        ({"time": "0001-01-01T00:00:00+01:00"}, "time"),
        ({"time": "9999-12-31T23:59:59-01:00"}, "time"),
        ({"time": {"seconds": 1}}, "time"),
        ({"length": "1"}, "length"),
        ({"length": "1.s"}, "length"),
        ({"length": "315576000001s"}, "length"),
        ({"length": "1000000000000s"}, "length"),
        ({"mask": "snake_case"}, "mask"),
        ({"mask": ["a"]}, "mask"),
        ({"mask": "a,,b"}, "mask"),
        ({"stringWrapper": 5}, "stringWrapper"),
        ({"boolWrapper": "true"}, "boolWrapper"),
        ({"struct": []}, "struct"),
        ({"list": {}}, "list"),
        ({"struct": {"a": [{"b": "\0"}]}}, "struct.a[0].b"),
        ({"any": {"text": "x"}}, "any.@type"),
        ({"any": {"@type": "type.googleapis.com/nothing.Known"}}, "any.@type"),
        ({"any": {"@type": "everything.v1.Inner"}}, "any.@type"),
        ({"any": {"@type": 5}}, "any.@type"),
        ({"any": {"@type": "t/everything.v1.Inner", "nothing": 1}}, "any.nothing"),
        ({"any": {"@type": "t/google.protobuf.Duration"}}, "any"),
        ({"[everything.v1.extension]": 1}, '["[everything.v1.extension]"]'),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_its_path(codec, document, field):
    with pytest.raises(Wrong) as caught:
        read(codec, document)
    assert caught.value.field == field


def test_a_long_unknown_name_is_not_told_back_at_length(codec):
    with pytest.raises(Wrong) as caught:
        read(codec, {"x" * 100_000: 1})
    assert len(caught.value.field) < 100


@pytest.mark.parametrize(("levels", "is_read"), [(30, True), (40, False)])
def test_free_form_json_is_as_deep_as_messages_may_be(codec, levels, is_read):
    """Each of its levels is three of a message's hundred: a struct, an entry, a value."""
    value = {}
    for _ in range(levels):
        value = {"a": value}
    in_any = {"@type": "t/google.protobuf.Struct", "value": value}
    for document in ({"struct": value}, {"any": in_any}):
        if is_read:
            assert codec.message_of_json(json.dumps(document).encode())
        else:
            with pytest.raises(Wrong, match="nested deeper"):
                read(codec, document)


def test_anys_inside_each_other_are_bounded_both_ways(codec):
    document = {}
    for _ in range(ANY_LEVELS_MAX + 1):
        document = {"@type": "t/google.protobuf.Any", "value": document}
    with pytest.raises(Wrong, match="inside each other"):
        read(codec, {"any": document})
    message = codec.message_class()
    inner = type(message.any)()
    for _ in range(ANY_LEVELS_MAX + 2):
        outer = type(message.any)()
        outer.Pack(inner)
        inner = outer
    message.any.CopyFrom(inner)
    with pytest.raises(ValueError, match="Any"):
        codec.json_of_message(message)


@pytest.mark.parametrize(
    ("fill", "what"),
    [
        (lambda m: setattr(m.time, "seconds", 253402300800), "Timestamp"),
        (lambda m: setattr(m.time, "nanos", -1), "Timestamp"),
        (lambda m: setattr(m.length, "seconds", 10**12), "Duration"),
        (lambda m: m.value.SetInParent(), "Value"),
        (lambda m: setattr(m.value, "number_value", math.inf), "Value"),
        (lambda m: m.mask.paths.append("fooBar"), "FieldMask"),
        (lambda m: setattr(m.any, "type_url", "t/nothing.Known"), "Any"),
        (
            lambda m: (
                setattr(m.any, "type_url", "t/everything.v1.Inner"),
                setattr(m.any, "value", b"\xff"),
            ),
            "Any",
        ),
    ],
)
def test_a_message_that_json_cannot_hold_is_a_value_error(codec, fill, what):
    message = codec.message_class()
    fill(message)
    with pytest.raises(ValueError, match=what):
        codec.json_of_message(message)


def test_text_that_is_no_utf_8_is_a_value_error(tmp_path):
    """Where a contract has it unchecked (utf8_validation = NONE, proto2), a service may send it."""
    pool = Contracts(compile_protos(HERE / "syntaxes", tmp_path)).pool
    codec = Codecs(pool).of(pool.FindMessageTypeByName("syntaxes.edition.Edition"))
    message = codec.message_class.FromString(b"\x1a\x01\xff")
    with pytest.raises(ValueError, match="a string holds what is no UTF-8"):
        codec.json_of_message(message)
    legacy = Codecs(pool).of(pool.FindMessageTypeByName("syntaxes.legacy.Legacy"))
    keyed = legacy.message_class.FromString(b"\x6a\x05\x0a\x01\xff\x10\x01")
    with pytest.raises(ValueError, match="utf-8"):
        legacy.json_of_message(keyed)


def test_two_fields_with_one_json_name_are_refused_by_both_names(tmp_path):
    (tmp_path / "t.proto").write_text(
        'syntax = "proto2"; package t; message Q {'
        "option deprecated_legacy_json_field_conflicts = true;"
        "optional string foo_bar = 1; optional string fooBar = 2; }"
    )
    pool = Contracts(compile_protos(tmp_path, tmp_path)).pool
    with pytest.raises(ContractError, match=r"t\.Q\.foo_bar and t\.Q\.fooBar"):
        Codecs(pool).of(pool.FindMessageTypeByName("t.Q"))


def test_defaults_are_written_where_presence_says_nothing(codec, sparse_codec):
    message = codec.message_class(maybe_text="")
    full = written(codec, message)
    assert full["text"] == ""
    assert full["anInt64"] == "0"
    assert full["color"] == "COLOR_UNSPECIFIED"
    assert full["texts"] == []
    assert full["labels"] == {}
    assert full["maybeText"] == ""
    assert not {"inner", "maybeInt64", "choiceText", "time"} & full.keys()
    assert written(sparse_codec, message) == {"maybeText": ""}


def test_floats_are_written_with_the_fewest_digits_that_keep_them(codec):
    for number in [0.1, 3.4028235e38, 1e-45, 16777216.0, 1 / 3]:
        message = codec.message_class(a_float=number)
        text = codec.json_of_message(message)
        assert codec.message_of_json(text) == message
    assert written(codec, codec.message_class(a_float=0.1))["aFloat"] == 0.1


def test_equal_messages_have_equal_documents(codec):
    one, other = codec.message_class(), codec.message_class()
    for key in "abc":
        one.labels[key] = key
    for key in "cba":
        other.labels[key] = key
    assert codec.json_of_message(one) == codec.json_of_message(other)


def test_a_codec_that_another_thread_compiles_is_waited_for(monkeypatch):
    descriptor, begun, compile_ = Transaction.DESCRIPTOR, threading.Event(), Codecs._compile

    def slow(codecs, *arguments):
        begun.set()
        time.sleep(0.01)
        return compile_(codecs, *arguments)

    monkeypatch.setattr(Codecs, "_compile", slow)
    codecs = Codecs(descriptor.file.pool)
    with ThreadPoolExecutor(1) as others:
        first = others.submit(codecs.of, descriptor)
        begun.wait()
        assert codecs.of(descriptor).to_json(Transaction(name="transactions/1"))
    assert first.result() is codecs.of(descriptor)


def test_a_codec_that_could_not_be_compiled_is_not_kept_half_done(monkeypatch):
    descriptor, compile_ = Transaction.DESCRIPTOR, Codecs._compile

    def failing(codecs, one, any_level):
        if one is not descriptor:
            raise ValueError("as it may be")
        return compile_(codecs, one, any_level)

    codecs = Codecs(descriptor.file.pool)
    with monkeypatch.context() as patched:
        patched.setattr(Codecs, "_compile", failing)
        with pytest.raises(ValueError, match="as it may be"):
            codecs.of(descriptor)
    assert codecs.of(descriptor).to_json(Transaction(name="transactions/1"))
