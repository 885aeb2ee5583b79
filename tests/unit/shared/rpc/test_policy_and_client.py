"""What the contracts say, and what the client makes of it."""

import json

import pytest

from shared.errors import Unavailable
from shared.rpc.client import Upstreams, service_config
from shared.rpc.policy import Access, Idempotency, contract_policies


def test_every_method_of_our_contracts_has_a_policy() -> None:
    nobody = [p.path for p in contract_policies().values() if p.access is Access.NOBODY]
    assert nobody == []


def test_a_keyed_method_can_carry_its_key() -> None:
    for policy in contract_policies().values():
        if policy.idempotency is Idempotency.KEYED:
            assert policy.has_request_id or policy.client_streaming, policy.path


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
