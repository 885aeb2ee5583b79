"""Plans: shared/quota/plans.py."""

import pytest

from shared.config import ConfigError
from shared.quota.gcra import Quota
from shared.quota.keys import Level
from shared.quota.plans import Plans, limit_field, limit_text, tenant_field

API = Quota("api", 1200, 1 / 600)
BASE = Plans({"default": {("api", Level.CREDENTIAL): API}})
FILE = """
[tenants]
acme = "gold"

[plans.gold.api]
credential = { rate = "6000/s", burst = 12000 }
tenant = "unlimited"

[plans.default.api]
tenant = { rate = "90/min", burst = 100 }

[global.api]
rate = "100000/s"
burst = 200000
"""


def limit(plans, tenant, level, bucket="api"):
    return limit_text(plans.quota(tenant, bucket, level))


def test_a_file_says_over_the_settings_what_it_says_and_leaves_the_rest():
    plans = BASE.with_file(FILE, "plans.toml")
    assert limit(plans, "acme", Level.CREDENTIAL) == "6000/s burst 12000"
    assert limit(plans, "acme", Level.TENANT) == "unlimited"
    assert limit(plans, "other", Level.CREDENTIAL) == "600/s burst 1200"
    assert limit(plans, "other", Level.TENANT) == "1.5/s burst 100"
    assert limit(plans, "acme", Level.GLOBAL) == limit(plans, "other", Level.GLOBAL)
    assert limit(BASE, "acme", Level.CREDENTIAL) == "600/s burst 1200"


def test_what_an_operator_has_set_wins_over_the_file():
    plans = BASE.with_file(FILE, "plans.toml").with_overrides(
        {
            limit_field("gold", "api", Level.CREDENTIAL): "1/min burst 2",
            limit_field("silver", "api", Level.TENANT): "unlimited",
            tenant_field("other"): "silver",
        }
    )
    assert limit(plans, "acme", Level.CREDENTIAL) == "1/min burst 2"
    assert limit(plans, "other", Level.TENANT) == "unlimited"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("plans = 1", "plans must be a table"),
        ("[plan.gold]", "plan is not known; use global, plans, tenants"),
        ("[plans]\ngold = 1", "plans.gold must be a table"),
        ("[plans.gold]\napi = 1", "plans.gold.api must be a table"),
        ("[plans.gold.api]\nuser = 1", "plans.gold.api.user is not known; use address"),
        ("[plans.gold.api]\nglobal = 1", "plans.gold.api.global is not known"),
        ("[plans.gold.api]\ntenant = 600", "plans.gold.api.tenant: must be {"),
        ('[plans.gold.api]\ntenant = {rate = "1/s"}', "plans.gold.api.tenant.burst: None must"),
        ("[plans.gold.api.tenant]\nburst = 1", "plans.gold.api.tenant.rate: None must"),
        ('[plans.gold.api.tenant]\nrate = "1/s"\nburst = 0', "tenant.burst: 0 must be a whole"),
        ('[plans.gold.api.tenant]\nrate = "1/s"\nburst = true', "tenant.burst: True must be"),
        ('[plans.gold.api.tenant]\nrate = "1/s"\nburst = 2000000000', "must be at most 1000000000"),
        ('[plans.gold.api.tenant]\nrate = "0/s"\nburst = 1', "tenant.rate: '0/s' must be"),
        ('[plans.gold.api.tenant]\nrate = "-1/s"\nburst = 1', "tenant.rate: '-1/s' must be"),
        ('[plans.gold.api.tenant]\nrate = "1/week"\nburst = 1', "'1/week' must be points per"),
        ('[plans.gold.api.tenant]\nrate = "9000000/s"\nburst = 1', "must be at most 1000000/s"),
        ('[plans.gold.api.tenant]\nrate = "1/d"\nburst = 99', "takes more than 31 d to fill"),
        ('[plans.gold.api.tenant]\nrate = "1/s"\nburst = 1\nx = 1', "tenant.x is not known"),
        ('[plans."a b".api]', "plans.a b: a name is letters"),
        ("[global]\napi = 1", "global.api: must be {"),
        ("tenants = 1", "tenants must be a table"),
        ("[tenants]\nacme = 1", "tenants.acme: must be a plan's name"),
        ('[tenants]\n"a b" = "gold"', "tenants.'a b': this is no tenant's name"),
        ("[", "plans.toml: "),
    ],
)
def test_a_wrong_file_is_refused_and_the_key_is_named(text, named):
    with pytest.raises(ConfigError) as refusal:
        BASE.with_file(text, "plans.toml")
    assert str(refusal.value).startswith("plans.toml: ")
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("limit/gold/api", "1/s burst 1", "limit/gold/api is not plan/bucket/level"),
        ("limit/gold/api/user", "1/s burst 1", "limit/gold/api/user is not"),
        ("limit/gold/api/global", "1/s burst 1", "all plans share one global limit"),
        ("limit/gold/api/tenant", "much", "'much' is not"),
        ("limit/gold/api/tenant", "1/s burst 0", "limit/gold/api/tenant.burst: 0 must"),
    ],
)
def test_a_wrong_override_is_refused_and_named(field, value, named):
    with pytest.raises(ConfigError) as refusal:
        BASE.with_overrides({field: value})
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[plans.gold.apo]\ntenant = "unlimited"', "plans.gold.apo.tenant: no contract names"),
        ('[tenants]\nacme = "golf"', "tenants.acme: there is no plan 'golf'"),
    ],
)
def test_what_nothing_would_read_is_a_typing_error(text, named):
    with pytest.raises(ConfigError) as refusal:
        BASE.with_file(text, "plans.toml").require_known(frozenset({"api"}), "plans.toml")
    assert named in str(refusal.value)


@pytest.mark.parametrize("text", ["600/s burst 1200", "1/min burst 60", "3/h burst 1"])
def test_a_limit_reads_as_it_is_written(text):
    field = limit_field("default", "api", Level.CREDENTIAL)
    plans = BASE.with_overrides({field: text})
    assert limit(plans, "any", Level.CREDENTIAL) == text
