"""Whose buckets pay: edge/accounts.py."""

import pytest

from edge.accounts import Accounts
from shared.quota.gcra import Quota
from shared.quota.keys import Level

LIMITS = {
    ("api", Level.CREDENTIAL): Quota("api", 1200, 1 / 600),
    ("api", Level.TENANT): Quota("api", 40_000, 1 / 20_000),
    ("api", Level.GLOBAL): Quota("api", 100_000, 1 / 50_000),
    ("login", Level.ADDRESS): Quota("login", 60, 1.0),
}
BLOCK = "198.51.100.0/24"


def limit_of(bucket, tenant, level):
    return LIMITS.get((bucket, level))


def keys_of(accounts, *caller):
    return [bucket.key for bucket in accounts.of(*caller).buckets]


@pytest.mark.parametrize(
    ("caller", "keys"),
    [
        (
            ("api", "acme", "session-1", BLOCK),
            ["quota:api:credential:acme:session-1", "quota:api:tenant:acme", "quota:api:global"],
        ),
        (("login", "default", "", BLOCK), ["quota:login:address:default:198.51.100.0%2F24"]),
        (
            ("api", "default", "", BLOCK),
            ["quota:api:address:default:198.51.100.0%2F24", "quota:api:global"],
        ),
    ],
    ids=["a credential", "log-in", "no credential: the address pays the credential's rate"],
)
def test_a_caller_pays_first_from_its_own_bucket_then_from_those_it_shares(caller, keys):
    assert keys_of(Accounts(limit_of), *caller) == keys


def test_no_text_of_a_caller_names_anothers_bucket():
    accounts = Accounts(limit_of)
    odd = {"a:b": "c", "a": "b:c", "a\r\n": "b", "ä": "b", "a%3Ab": "c"}
    own = {keys_of(accounts, "api", tenant, who, BLOCK)[0] for tenant, who in odd.items()}
    assert len(own) == len(odd)
    assert all(key.isascii() and key.isprintable() and key.count(":") == 4 for key in own)


def test_callers_of_one_tenant_share_its_bucket_as_long_as_any_is_remembered():
    accounts = Accounts(limit_of, accounts_max=4)
    first = accounts.of("api", "acme", "one", BLOCK)
    for number in range(50):
        account = accounts.of("api", "acme", f"caller-{number}", BLOCK)
        assert account.buckets[1] is first.buckets[1]
    assert accounts.of("api", "acme", "one", BLOCK) is not first


def test_what_all_tenants_do_together_is_told_to_none():
    account = Accounts(limit_of).of("api", "acme", "one", BLOCK)
    assert account.policy == b'"api";q=1200;w=2, "api-tenant";q=40000;w=2'


def test_the_tightest_bucket_is_told_and_never_a_faster_pace_than_its_rate():
    account = Accounts(limit_of).of("api", "acme", "one", BLOCK)
    assert account.limit(0, 0) == b'"api";r=1200;t=2'
    own, tenant = account.buckets[:2]
    own.full_at_us = 600 * own.quota.refill_us
    assert account.limit(0, 0) == b'"api";r=600;t=1'
    tenant.full_at_us = 39_990 * tenant.quota.refill_us
    assert account.limit(0, 0) == b'"api-tenant";r=10;t=1'
    assert account.limit(0, 5) == b'"api-tenant";r=15;t=1'


def test_a_caller_whose_plan_has_no_limit_is_as_good_as_never_refused():
    account = Accounts(lambda *_: None).of("api", "acme", "one", BLOCK)
    assert [bucket.quota.burst_points for bucket in account.buckets] == [1_000_000_000]


def test_points_that_come_back_never_exceed_what_was_granted():
    bucket = Accounts(limit_of).of("api", "acme", "one", BLOCK).own
    bucket.granted_points, bucket.held_points, bucket.lease_ends_us = 15, 12, 1000
    bucket.take_back(9, now_us=999)
    assert (bucket.held_points, bucket.surplus_points) == (15, 6)
    bucket.take_back(9, now_us=1000)
    assert (bucket.held_points, bucket.surplus_points) == (15, 15)
