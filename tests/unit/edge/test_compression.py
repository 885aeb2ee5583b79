"""Which answers may carry a secret."""

import pytest

from edge.compression import carries_secrets
from edge.contracts import load_contracts
from edge.fields import descriptor_of

SECRET = "[(tenfold.options.v1.field) = {sensitive: true}]"


@pytest.mark.parametrize(
    ("fields", "is_secret"),
    [
        ("string a = 2;", False),
        (f"string a = 2 {SECRET};", True),
        ("Inner a = 2;", True),
        ("repeated Inner a = 2;", True),
        ("map<string, Inner> a = 2;", True),
        ("oneof b { Inner a = 2; }", True),
        ("A a = 2;", False),
    ],
    ids=["none", "own", "inside", "in a list", "in a map", "in a oneof", "in itself"],
)
def test_a_sensitive_field_is_found_however_deep(contracts_of, fields, is_secret):
    inner = f"message Inner {{ Q q = 1; string secret = 2 {SECRET}; }}"
    contracts = contracts_of("", f"{inner} message A {{ string id = 1; {fields} }}")
    message = contracts.message("t.A")
    assert carries_secrets(message) is is_secret
    assert carries_secrets(message, "id") is False
    assert carries_secrets(message, "a") is is_secret


def test_our_answers_with_tokens_and_keys_are_never_compressed():
    names = {m.name for m in load_contracts().methods() if carries_secrets(descriptor_of(m.output))}
    assert names == {"CreateSession", "RefreshSession", "CreateApiKey"}
