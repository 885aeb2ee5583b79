import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.binary import message_of_bytes
from edge.json_text import Wrong
from tests.unit.edge.messages import messages

PROPERTY = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="session")
def descriptor(everything_contracts):
    return everything_contracts.message("everything.v1.Everything")


@pytest.fixture(scope="session")
def everything(descriptor):
    return GetMessageClass(descriptor)


@PROPERTY
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(everything, data):
    try:
        message_of_bytes(everything, data)
    except Wrong as wrong:
        assert wrong.description


@PROPERTY
@given(data=st.data())
def test_a_message_without_nul_is_read_as_it_is(everything, descriptor, data):
    message = data.draw(messages(descriptor))
    assert message_of_bytes(everything, message.SerializeToString()) == message


@pytest.mark.parametrize(
    ("fill", "field"),
    [
        (lambda m: setattr(m, "text", "a\0"), "text"),
        (lambda m: setattr(m, "custom_named", "\0"), "otherName"),
        (lambda m: m.texts.extend(["a", "b\0c"]), "texts[1]"),
        (lambda m: m.inners.add(text="\0"), "inners[0].text"),
        (lambda m: m.labels.update({"a b": "\0"}), 'labels["a b"]'),
        (lambda m: m.labels.update({"\0": "a"}), "labels"),
        (lambda m: setattr(m.inner_by_number[7], "text", "\0"), 'innerByNumber["7"].text'),
        (lambda m: m.string_wrappers.add(value="\0"), "stringWrappers[0].value"),
        (lambda m: m.values.add(string_value="\0"), "values[0].stringValue"),
        (lambda m: m.inners.add().many.add().many.add(text="\0"), "inners[0].many[0].many[0].text"),
    ],
)
def test_text_with_nul_is_refused_by_name(everything, fill, field):
    message = everything()
    fill(message)
    with pytest.raises(Wrong, match="NUL") as caught:
        message_of_bytes(everything, message.SerializeToString())
    assert caught.value.field == field


def test_bytes_may_hold_nul(everything):
    message = everything(datas=[b"\0"], doubles=[2.0])
    assert message_of_bytes(everything, message.SerializeToString()) == message


def test_messages_too_deep_for_protobuf_are_refused(everything):
    message = everything()
    inner = message.inners.add()
    for _ in range(150):
        inner = inner.many.add()
    with pytest.raises(Wrong, match="not a binary"):
        message_of_bytes(everything, message.SerializeToString())


def test_what_a_newer_client_sends_is_passed_on(everything):
    newer = b"\xfa\x7f\x05later"  # field 2047
    assert message_of_bytes(everything, newer).SerializeToString() == newer
