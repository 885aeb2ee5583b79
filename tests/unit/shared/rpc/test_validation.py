"""A request that breaks its contract is refused by field, however large it is."""

import time
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.internal.encoder import _VarintBytes as varint
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.ledger.v1 import ledger_service_pb2 as ledger
from tenfold.ledger.v1.ledger_pb2 import Entry

from shared.errors import InvalidRequest, Violation
from shared.rpc.validation import ITEMS_MAX, RequestReader


def struct(value: dict[str, Any]) -> Struct:
    message = Struct()
    message.update(value)
    return message


def post(transaction: ledger.NewTransaction) -> ledger.PostTransactionRequest:
    return ledger.PostTransactionRequest(transaction=transaction)


def refusal(message: Message) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        RequestReader(type(message).FromString).read(message.SerializeToString())
    return refused.value


def test_a_good_message_is_read() -> None:
    message = auth.ListSessionsRequest(page_size=3)
    reader = RequestReader(auth.ListSessionsRequest.FromString)
    assert reader.read(message.SerializeToString()) == message


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\xff\xff\xff", "no message"),
        (b"\x0b" * 10_000 + b"\x0c" * 10_000, "groups 10,000 deep"),
        (b"\x12\x01\xff", "text that is no UTF-8"),
        (b"\x12\xff\xff\xff\xff\x0f", "a field longer than the message"),
    ],
)
def test_malformed_bytes_are_refused(raw: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest, match="the request message is malformed"):
        RequestReader(auth.ListSessionsRequest.FromString).read(raw)


def test_every_broken_rule_is_named() -> None:
    transaction = ledger.NewTransaction(reference="x" * 101, entries=[Entry(), Entry()])
    fields = {v.field for v in refusal(post(transaction)).violations}
    assert {"transaction.reference", "transaction.entries[1].account"} <= fields


@pytest.mark.parametrize(
    ("message", "field", "most"),
    [
        (auth.CreateApiKeyRequest(scopes=["a"] * 65), "scopes", 64),
        (post(ledger.NewTransaction(entries=[Entry()] * 101)), "transaction.entries", 100),
        (FieldMask(paths=["a"] * (ITEMS_MAX + 1)), "paths", ITEMS_MAX),
        (struct({str(n): n for n in range(ITEMS_MAX + 1)}), "fields", ITEMS_MAX),
        (
            struct({"a": {"b": [1, [0] * (ITEMS_MAX + 1)]}}),
            "fields['a'].struct_value.fields['b'].list_value.values[1].list_value.values",
            ITEMS_MAX,
        ),
    ],
    ids=["by its rule", "inside a message", "without a rule", "of a map", "deep inside"],
)
def test_a_list_that_is_too_long_is_the_one_thing_that_is_named(
    message: Message, field: str, most: int
) -> None:
    description = f"must contain no more than {most} item(s)"
    assert refusal(message).violations == (Violation(field, description),)


def test_millions_of_items_are_refused_in_less_time_than_it_takes_to_parse_them() -> None:
    reader = RequestReader(ledger.PostTransactionRequest.FromString)
    entries = b"\x1a\0" * 1_000_000  # empty ones, of two bytes each
    raw = b"\x0a" + varint(len(entries)) + entries
    start_s = time.thread_time()
    ledger.PostTransactionRequest.FromString(raw)
    parsed_s = time.thread_time()
    with pytest.raises(InvalidRequest, match=r"^transaction\.entries: "):
        reader.read(raw)
    assert time.thread_time() - parsed_s < 3 * (parsed_s - start_s)
