import math
import time
from functools import partial

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.contracts import load_contracts
from edge.routes import Match, RouteTable
from edge.transcode import request_message, response_json, set_request_id
from shared.errors import Internal, InvalidRequest
from tests.unit.edge.conftest import request_of


@pytest.fixture
def call(everything_table):
    """Makes the request message of an HTTP request, as the edge does."""
    return partial(request_of, everything_table)


def refused(call, *request):
    """The field that a refused request names, and why."""
    with pytest.raises(InvalidRequest) as caught:
        call(*request)
    violation = caught.value.violations[0]
    assert caught.value.message == f"{violation.field}: {violation.description}"
    return violation.field


@pytest.mark.parametrize(
    ("query", "field", "value"),
    [
        ("anInt64=5", "an_int64", 5),
        ("an_int64=-5", "an_int64", -5),
        ("flag=true", "flag", True),
        ("color=COLOR_RED", "color", 1),
        ("color=-1", "color", -1),
        ("aDouble=1e3", "a_double", 1000.0),
        ("aDouble=-Infinity", "a_double", float("-inf")),
        ("data=-_8", "data", b"\xfb\xff"),
        ("maybeText=", "maybe_text", ""),
        ("otherName=a+b%2Bc%20d", "custom_named", "a b+c d"),
        ("otherName=%C3%BC", "custom_named", "ü"),
        ("otherName=a=b", "custom_named", "a=b"),
        ("otherName", "custom_named", ""),
        ("&&otherName=x&", "custom_named", "x"),
        ("texts=a&texts=b&texts=", "texts", ["a", "b", ""]),
        ("int64s=1&int64s=2", "int64s", [1, 2]),
        ("colors=COLOR_RED&colors=5", "colors", [1, 5]),
        ("labels[a]=x&labels[b.c]=y&labels%5Bd%5D=z", "labels", {"a": "x", "b.c": "y", "d": "z"}),
        ("countByFlag[true]=1", "count_by_flag", {True: 1}),
        ("choiceInt64=7", "choice_int64", 7),
        ("choiceNull=null", "choice_null", 0),
        ("choiceNull=NULL_VALUE", "choice_null", 0),
        ("custom_named=x", "custom_named", "x"),
        ("data=%2B%2F8%3D", "data", b"\xfb\xff"),
        ("aFloat=3.4028235e38", "a_float", 3.4028234663852886e38),
        ("maybeInt64=0", "maybe_int64", 0),
        ("colorByName[a]=COLOR_RED&colorByName[b]=-1", "color_by_name", {"a": 1, "b": -1}),
        ("countByNumber[-5]=1", "count_by_number", {-5: 1}),
        ("labels[]=x&labels[a]]=y&labels[b[]=z", "labels", {"": "x", "a]": "y", "b[": "z"}),
        ("doubles=NaN&doubles=-0", "doubles", None),
    ],
)
def test_query_parameters_fill_fields(call, query, field, value):
    got = getattr(call("GET", f"/v1/things/x?{query}"), field)
    if value is None:
        assert (math.isnan(got[0]), math.copysign(1, got[1])) == (True, -1)
        return
    assert (dict(got) if isinstance(value, dict) else got) == value


KINDS = {
    "aSint32": "a_sint32", "aSfixed32": "a_sfixed32", "aUint32": "a_uint32",
    "aFixed32": "a_fixed32", "aSint64": "a_sint64", "aSfixed64": "a_sfixed64",
    "aUint64": "a_uint64", "aFixed64": "a_fixed64", "anInt32": "an_int32",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_integer_is_read_within_its_range(call, name):
    bits = 64 if name.endswith("64") else 32
    is_unsigned = "Uint" in name or "aFixed" in name
    low, high = (0, 2**bits - 1) if is_unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for number in (low, high):
        message = call("GET", f"/v1/things/x?{name}={number}")
        assert getattr(message, KINDS[name]) == number
    for number in (low - 1, high + 1):
        assert refused(call, "GET", f"/v1/things/x?{name}={number}") == name


def test_structs_values_lists_anys_and_empties_are_json_documents(call):
    query = (
        "struct=%7B%22a%22%3A%5B1%2Cnull%5D%7D&list=%5B1%2C%22x%22%5D&value=%22text%22&values=1&values=null"
        "&empty=%7B%7D&any=%7B%22@type%22%3A%22t/everything.v1.Inner%22%2C%22text%22%3A%22y%22%7D"
    )
    message = call("GET", f"/v1/things/x?{query}")
    assert message.struct["a"][0] == 1
    assert list(message.list) == [1, "x"]
    assert message.value.string_value == "text"
    assert [value.WhichOneof("kind") for value in message.values] == ["number_value", "null_value"]
    assert message.HasField("empty")
    assert message.any.type_url == "t/everything.v1.Inner"


def test_maps_of_well_known_types_and_every_wrapper_are_filled(call):
    query = (
        "lengthByName[a]=1.5s&lengthByName[b]=-2s&doubleWrapper=1e3&bytesWrapper=AA&uint32Wrapper=7"
    )
    message = call("GET", f"/v1/things/x?{query}")
    assert {key: value.seconds for key, value in message.length_by_name.items()} == {
        "a": 1,
        "b": -2,
    }
    assert message.double_wrapper.value == 1000
    assert message.bytes_wrapper.value == b"\0"
    assert message.uint32_wrapper.value == 7


def test_a_wrapper_of_a_default_is_present(call):
    message = call("GET", "/v1/things/x?stringWrapper=&int64Wrapper=0")
    assert message.HasField("string_wrapper")
    assert message.HasField("int64_wrapper")


def test_nested_and_well_known_parameters_fill_messages(call):
    query = (
        "inner.text=a&inner.inner.bigNumber=7&time=2026-01-01T00:00:00Z&length=1.5s"
        "&mask=fooBar,baz&stringWrapper=w&int64Wrapper=9&boolWrapper=false"
        "&times=1970-01-01T00:00:01Z&stringWrappers=p"
    )
    message = call("GET", f"/v1/things/x?{query}")
    assert (message.inner.text, message.inner.inner.big_number) == ("a", 7)
    assert message.time.seconds == 1767225600
    assert (message.length.seconds, message.length.nanos) == (1, 500_000_000)
    assert list(message.mask.paths) == ["foo_bar", "baz"]
    assert (message.string_wrapper.value, message.int64_wrapper.value) == ("w", 9)
    assert message.HasField("bool_wrapper")
    assert not message.bool_wrapper.value
    assert message.times[0].seconds == 1
    assert message.string_wrappers[0].value == "p"


def test_free_form_parameters_are_json_documents(call):
    message = call("GET", "/v1/things/x?struct=%7B%22a%22:1%7D&value=null&list=%5Btrue%5D")
    assert message.struct["a"] == 1
    assert message.value.WhichOneof("kind") == "null_value"
    assert message.list[0] is True


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("nothing=1", "nothing"),
        ("inner.nothing=1", "inner.nothing"),
        ("otherName.x=1", "otherName.x"),
        ("inner=x", "inner"),
        ("inners=x", "inners"),
        ("inners.text=x", "inners.text"),
        ("struct=x", "struct"),
        ("struct=%5B%5D", "struct"),
        ("struct=%7B%22a%22:%5B%22%5Cu0000%22%5D%7D", "struct.a[0]"),
        ("struct=", "struct"),
        ("struct.a=1", "struct.a"),
        ("list=%7B%7D", "list"),
        ("value=abc", "value"),
        ("value=1&value=2", "value"),
        ("any=x", "any"),
        ("any=%7B%22@type%22:%22t/nothing.Known%22%7D", "any.@type"),
        ("empty=", "empty"),
        ("empty=%7B%22a%22:1%7D", "empty.a"),
        ("lengthByName[a]=soon", "lengthByName[a]"),
        ("time=2026-1-1T00:00:00Z", "time"),
        ("int64Wrapper=1.5", "int64Wrapper"),
        ("int64Wrapper=1&int64_wrapper=1", "int64Wrapper"),
        ("stringWrappers=a&stringWrappers=%00", "stringWrappers"),
        ("choiceNull=5", "choiceNull"),
        ("customNamed=x", "customNamed"),
        ("innerByNumber[1].text=x", "innerByNumber[1].text"),
        ("countByNumber[0]=1&countByNumber[-0]=1", "countByNumber[-0]"),
        ("countByNumber[01]=1", "countByNumber[01]"),
        ("data=+/8=", "data"),
        ("time.seconds=1", "time.seconds"),
        ("labels=x", "labels"),
        ("labels[a=x", "labels[a"),
        ("labels[a]=x&labels[a]=y", "labels[a]"),
        ("countByFlag[true]=1&countByFlag[true]=2", "countByFlag[true]"),
        ("texts[0]=x", "texts[0]"),
        ("innerByNumber[1]=x", "innerByNumber[1]"),
        ("countByFlag[yes]=1", "countByFlag[yes]"),
        ("anInt64=", "anInt64"),
        ("anInt64=1.5", "anInt64"),
        ("anInt64=9223372036854775808", "anInt64"),
        ("anInt64=1&anInt64=1", "anInt64"),
        ("anInt64=1&an_int64=1", "anInt64"),
        ("flag=1", "flag"),
        ("flag=TRUE", "flag"),
        ("color=RED", "color"),
        ("int64s=1&int64s=x", "int64s"),
        ("text=x", "text"),
        ("otherName=%", "otherName"),
        ("otherName=%4", "otherName"),
        ("otherName=%gg", "otherName"),
        ("otherName=%ff", "otherName"),
        ("otherName=%00", "otherName"),
        ("%ff=1", "a parameter's name"),
        ("choiceText=a&choiceInt64=1", "choiceInt64"),
        ("choiceText=a&choiceInner.text=b", "choiceInner.text"),
        (".".join(["inner"] * 1000) + ".text=x", ("inner." * 11)[:64]),
        ("inner..text=x", "inner..text"),
        ("=x", ""),
    ],
)
def test_a_wrong_query_parameter_is_refused_by_its_json_name(call, query, field):
    if not field:  # a parameter without a name has none to tell
        with pytest.raises(InvalidRequest):
            call("GET", f"/v1/things/x?{query}")
        return
    assert refused(call, "GET", f"/v1/things/x?{query}") == field


@pytest.mark.parametrize("query", ["a=1&" * 100_000, "texts=&" * 100_000, "&" * 100_000])
def test_100_000_parameters_are_refused_at_once(call, query):
    def cost_s():
        started = time.thread_time()
        with pytest.raises(InvalidRequest, match="more than 1000 parameters"):
            call("GET", f"/v1/things/x?{query}")
        return time.thread_time() - started

    assert min(cost_s() for _ in range(5)) < 0.05


def test_the_body_takes_what_the_path_leaves(call):
    message = call("POST", "/v1/things/x:check", b'{"anInt64": "5", "inner": {"text": "y"}}')
    assert (message.text, message.an_int64, message.inner.text) == ("x", 5, "y")
    assert call("POST", "/v1/things/x:check").text == "x"


def test_a_body_field_is_the_document_itself(call):
    message = call("PUT", "/v1/inners/i?text=t&anInt64=3", b'{"bigNumber": "7"}')
    assert (message.inner.text, message.inner.big_number) == ("inners/i", 7)
    assert (message.text, message.an_int64) == ("t", 3)
    assert call("POST", "/v1/texts", b'["a", "b"]').texts == ["a", "b"]


def test_a_body_may_repeat_the_path_and_not_contradict_it(call):
    assert call("POST", "/v1/things/x:check", b'{"text": "x"}').text == "x"
    assert call("PUT", "/v1/inners/i", b'{"text": "inners/i"}').inner.text == "inners/i"
    assert refused(call, "POST", "/v1/things/x:check", b'{"text": "y"}') == "text"
    assert refused(call, "PUT", "/v1/inners/i", b'{"text": "y"}') == "inner.text"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (("POST", "/v1/things/x:check?anInt64=5", b"{}"), "anInt64"),
        (("PUT", "/v1/inners/i?inner.bigNumber=5", b"{}"), "inner.bigNumber"),
        (("PUT", "/v1/inners/i", b'{"bigNumber": true}'), "inner.bigNumber"),
        (("PUT", "/v1/inners/i", b"[]"), "inner"),
        (("POST", "/v1/texts", b'["a", 5]'), "texts[1]"),
        (("POST", "/v1/texts?texts=a", b"[]"), "texts"),
        (("GET", "/v1/inners/i/things/x",), "anInt64"),
        (("GET", "/v1/inners/i/things/5?inner.text=j",), "inner.text"),
        (("POST", "/v1/things/x:check", b'{"inner": {"nothing": 1}}'), "inner.nothing"),
    ],
)  # fmt: skip
def test_a_field_belongs_to_one_part_of_the_request(call, request_, field):
    assert refused(call, *request_) == field


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (("GET", "/v1/things/x", b"{}"), "must have no body"),
        (("POST", "/v1/things/x:check", b"[]"), "must be an object"),
        (("POST", "/v1/things/x:check", b"{}{}"), "not valid JSON"),
        (("POST", "/v1/things/x:check", b"null"), "must be an object"),
    ],
)
def test_a_body_that_is_wrong_as_a_whole_is_refused_without_a_field(call, request_, why):
    with pytest.raises(InvalidRequest, match=why) as caught:
        call(*request_)
    assert not caught.value.violations


TARGETS = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.sampled_from(
            [b"a", b"&", b"=", b"%", b"%41", b"%ff", b"%00", b"+", b".", b"[", b"]", b"1"]
        )
        | st.sampled_from(
            [b"text", b"labels", b"times", b"anInt64", b"inner", b"inner.text", b";", b"\xff"]
        ),
        max_size=12,
    ).map(b"".join),
)


@settings(max_examples=500, deadline=None)
@given(path=TARGETS, query=TARGETS, body=st.binary(max_size=20) | st.just(b"{}"))
def test_no_request_can_end_in_anything_but_a_refusal_or_a_message(
    everything_table, path, query, body
):
    for method, start in [("GET", b"/v1/things/"), ("POST", b"/v1/things/"), ("PUT", b"/v1/")]:
        try:
            found = everything_table.match(method, start + path)
            if isinstance(found, Match):
                request_message(found.route, found.captures, query, body)
                request_message(found.route, found.captures, query, b"")
        except InvalidRequest as error:
            assert error.message


def test_nothing_decoded_twice_reaches_the_message(call):
    assert call("GET", "/v1/things/%2541").text == "%41"
    assert call("GET", "/v1/things/x?otherName=%2541").custom_named == "%41"


def test_an_http_body_is_taken_as_it_is(call):
    message = call("POST", "/v1/uploads", b"\x00\xff", content_type="image/png")
    assert (message.content_type, message.data) == ("image/png", b"\x00\xff")


def test_response_body_is_the_field_alone(everything_table):
    put = everything_table.match("PUT", "/v1/inners/i").route
    answer = put.method.output(inner={"text": "x"})
    assert orjson.loads(response_json(put, answer)) == {"text": "x", "bigNumber": "0", "many": []}
    texts = everything_table.match("POST", "/v1/texts").route
    assert response_json(texts, texts.method.output(texts=["a"])) == b'["a"]'


def test_an_answer_that_json_cannot_hold_is_our_error(everything_table):
    route = everything_table.match("GET", "/v1/things/x").route
    answer = route.method.output(time={"seconds": 10**12})
    with pytest.raises(Internal, match="Timestamp"):
        response_json(route, answer)


def test_the_idempotency_key_becomes_the_request_id(call):
    message = call("POST", "/v1/things/x:check", b'{"requestId": "k"}')
    set_request_id(message, "k")
    assert message.request_id == "k"
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        set_request_id(message, "other")


def test_our_generated_messages_are_written_too():
    from tenfold.ledger.v1.ledger_pb2 import Account

    route = RouteTable.of_contracts(load_contracts()).match("GET", "/v1/accounts/a").route
    written = orjson.loads(response_json(route, Account(name="accounts/a", normal_side=2)))
    assert written["normalSide"] == "SIDE_CREDIT"
