"""What the contracts say, and what the client makes of it."""

import json

import pytest
from google.protobuf.descriptor_pb2 import (
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from shared.errors import Unavailable
from shared.rpc.client import Upstreams, service_config
from shared.rpc.policy import Access, Idempotency, contract_policies, load_policies


def test_every_method_of_our_contracts_has_a_policy() -> None:
    nobody = [p.path for p in contract_policies().values() if p.access is Access.NOBODY]
    assert nobody == []


def test_a_keyed_method_can_carry_its_key() -> None:
    for policy in contract_policies().values():
        if policy.idempotency is Idempotency.KEYED:
            assert policy.has_request_id or policy.client_streaming, policy.path


@pytest.mark.parametrize(
    ("label", "kind", "has_one"),
    [("optional", "string", True), ("optional", "int32", False), ("repeated", "string", False)],
)
def test_only_one_text_can_be_a_request_id(label: str, kind: str, has_one: bool) -> None:
    field = FieldDescriptorProto(name="request_id")
    field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    field.label = FieldDescriptorProto.Label.Value(f"LABEL_{label.upper()}")
    file = FileDescriptorProto(name="a.proto")
    file.message_type.add(name="Q").field.append(field)
    file.service.add(name="S").method.add(name="M", input_type=".Q", output_type=".Q")
    assert load_policies(FileDescriptorSet(file=[file]))["/S/M"].has_request_id is has_one


def test_deadlines_are_the_contract_s_or_the_general_ones() -> None:
    policies = contract_policies()
    sign_up = policies["/tenfold.auth.v1.IdentityService/SignUp"]
    watch = policies["/tenfold.auth.v1.SessionService/WatchRevocations"]
    assert (sign_up.deadline_default_s, sign_up.deadline_max_s) == (10, 60)
    assert (watch.deadline_default_s, watch.deadline_max_s) == (3600, 3600)
    assert all(0 < p.deadline_default_s <= p.deadline_max_s for p in policies.values())


def test_only_what_is_safe_is_retried() -> None:
    config = json.loads(service_config(contract_policies(), checks_health=True))
    names = {f"/{n['service']}/{n['method']}" for n in config["methodConfig"][0]["name"]}
    assert names == {p.path for p in contract_policies().values() if p.retry_safe}
    assert "/tenfold.auth.v1.IdentityService/SignUp" not in names
    assert config["methodConfig"][0]["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]


def test_the_longest_prefix_in_whole_words_wins() -> None:
    upstreams = Upstreams.parse("tenfold.media=m:1, tenfold.media.v2=n:2, *=a:0,")
    assert upstreams.target_of("tenfold.media.v1.VideoService") == "m:1"
    assert upstreams.target_of("tenfold.media.v2.VideoService") == "n:2"
    assert upstreams.target_of("tenfold.mediator.v1.Service") == "a:0"
    with pytest.raises(Unavailable):
        Upstreams.parse("tenfold.media=m:1").target_of("tenfold.auth.v1.X")


@pytest.mark.parametrize("text", ["tenfold.media", "*=m", "*=m:", "=m:1", "*=http://m:1"])
def test_an_upstream_without_a_package_or_a_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="package=host:port"):
        Upstreams.parse(text)
