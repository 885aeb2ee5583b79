"""The straight way reads as the long one does: the same bytes, or the same words of refusal."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge import straight_line
from edge.codec import Codecs, JsonReader
from edge.contracts import Contracts, load_contracts
from edge.json_text import Wrong
from edge.straight_line import UNUSUAL
from tests.protos import compile_protos
from tests.unit.edge.conftest import HERE
from tests.unit.edge.messages import messages

TYPES = [
    "everything.v1.Everything",
    "syntaxes.edition.Edition",
    "syntaxes.legacy.Legacy",
    "tenfold.ledger.v1.PostTransactionRequest",
    "tenfold.ledger.v1.Transaction",
    "tenfold.media.v1.Video",
]
STRANGE = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "1", "-0", "1e3", "NaN", "AA==", "\0", "x", "2026-01-31T12:30:00Z"])
    | st.sampled_from([[], {}, [None], [[]], {"a": None}, {"0": 1}, {"text": "x"}, ["x", 1]])
)


@pytest.fixture(scope="module")
def codec_of(everything_contracts, tmp_path_factory):
    pools = {
        "everything": everything_contracts.pool,
        "syntaxes": Contracts(
            compile_protos(HERE / "syntaxes", tmp_path_factory.mktemp("protos"))
        ).pool,
        "tenfold": load_contracts().pool,
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(straight_line, "FIELDS_MAX", 1000)  # the large test message, too
        yield lambda name: _compiled(pools[name.partition(".")[0]], name)


def _compiled(pool, name):
    codec = Codecs(pool).of(pool.FindMessageTypeByName(name))
    assert codec.reader.fill is not None
    return codec


def outcome(codec, reader, text):
    message = codec.message_class()
    try:
        reader.read(message, text)
    except Wrong as wrong:
        return wrong.field, wrong.description
    return message.SerializePartialToString(deterministic=True)


@st.composite
def documents(draw, codec):
    """What a message is written as, with one value exchanged, or one key more."""
    document = json.loads(codec.json_of_message(draw(messages(codec.descriptor))))
    inside = document
    while isinstance(inside, dict | list) and inside:
        key = draw(
            st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside)))
        )
        if not isinstance(inside[key], dict | list) or draw(st.booleans()):
            inside[key] = draw(STRANGE)
            break
        inside = inside[key]
    if draw(st.booleans()):
        document[draw(st.sampled_from(["unknown", "an_int32", "anInt32", "reference"]))] = 1
    return json.dumps(document).encode()


@pytest.mark.parametrize("name", TYPES)
@settings(
    max_examples=75,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_both_ways_read_the_same(codec_of, name, data):
    codec = codec_of(name)
    text = data.draw(documents(codec))
    straight = outcome(codec, codec.reader, text)
    assert straight == outcome(codec, JsonReader(codec.into, None), text)


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("everything.v1.Everything", {"text": "x", "anInt32": 5, "anInt64": "7", "texts": ["y"]}),
        ("everything.v1.Everything", {"an_int32": 5}),
        ("tenfold.ledger.v1.Transaction", {"entries": [{"side": "SIDE_DEBIT"}, {}]}),
        ("tenfold.ledger.v1.Transaction", {"recordedTime": "2026-03-01T12:00:00Z"}),
    ],
)
def test_the_usual_document_goes_straight(codec_of, name, document):
    codec = codec_of(name)
    keys = json.dumps(document).count('":')
    assert codec.reader.fill(codec.message_class(), document) == keys


@pytest.mark.parametrize(
    "document",
    [{"text": None}, {"unknown": 1}, {"anInt32": 1, "an_int32": 1}, [], {"texts": "x"}],
    ids=["null", "unknown key", "two spellings", "no object", "no array"],
)
def test_an_unusual_document_goes_the_long_way(codec_of, document):
    codec = codec_of("everything.v1.Everything")
    assert codec.reader.fill(codec.message_class(), document) == UNUSUAL


def test_a_key_that_is_given_twice_is_seen_on_the_straight_way(codec_of):
    codec = codec_of("everything.v1.Everything")
    with pytest.raises(Wrong, match="is given twice"):
        codec.message_of_json(b'{"text": "x", "text": "y"}')
