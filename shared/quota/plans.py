"""Plans: named sets of limits, per bucket and level, and which tenant has which.

A file in TOML, checked as a whole; overrides that an operator sets live in Valkey as one field
each, and win over the file:

    [tenants]
    acme = "gold"                                         # all others have "default"

    [plans.gold.api]                                      # plan, bucket
    credential = { rate = "6000/s", burst = 12000 }       # level
    tenant = { rate = "20000/s", burst = 40000 }

    [global.api]                                          # all tenants together
    rate = "100000/s"
    burst = 200000

What a plan does not say is as in "default"; "unlimited" instead of a table switches a level off.
A rate is kept as the whole microseconds that restore one point.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shared.config import ConfigError
from shared.quota.gcra import Quota
from shared.quota.keys import Level

DEFAULT_PLAN = "default"
UNLIMITED = "unlimited"
# More than any machine answers, and few enough for arithmetic in double precision.
BURST_POINTS_MAX = 1_000_000_000
# A bucket that takes longer to fill is no rate: what counts per month is a stock.
WINDOW_S_MAX = 31 * 86_400

_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)/(s|min|h|d)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
# A tenant's name may hold more, but nothing that could not be typed.
_TENANT = re.compile(r"[\x21-\x7e]{1,255}")
_OF_PLANS = (Level.ADDRESS, Level.CREDENTIAL, Level.TENANT)

# None: not limited.
Limits = Mapping[tuple[str, Level], Quota | None]


@dataclass(frozen=True)
class Plans:
    """All plans, and who has which.

    Attributes:
        limits: by plan, then by bucket and level; GLOBAL stands in "default" alone.
        tenants: tenant -> plan.
    """

    limits: Mapping[str, Limits]
    tenants: Mapping[str, str] = field(default_factory=dict)

    @property
    def buckets(self) -> frozenset[str]:
        """Every bucket that has a limit."""
        return frozenset(bucket for limits in self.limits.values() for bucket, _ in limits)

    def quota(self, tenant: str, bucket: str, level: Level) -> Quota | None:
        """The limit that a tenant's calls meet at a level; None if there is none."""
        key, plan = (bucket, level), self.tenants.get(tenant, DEFAULT_PLAN)
        own = self.limits.get(plan, {})
        return own[key] if key in own else self.limits[DEFAULT_PLAN].get(key)

    def rows(self) -> Iterator[tuple[str, str, Level, Quota | None]]:
        """Plan, bucket, level and limit, in order."""
        for plan, limits in sorted(self.limits.items()):
            for bucket, level in sorted(limits):
                yield plan, bucket, level, limits[bucket, level]

    def with_file(self, text: str, source: str) -> "Plans":
        """These plans with what a file says over them.

        Args:
            text: TOML, as the module's docstring shows.
            source: names the file in errors.

        Raises:
            ConfigError: naming the key that is wrong, and what is allowed.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source}: {error}.") from error
        return _Reader(source).plans(self, document)

    def with_overrides(self, fields: Mapping[str, str]) -> "Plans":
        """These plans with what an operator has set over them.

        Args:
            fields: what `limit_field` and `tenant_field` name -> what they say.

        Raises:
            ConfigError: naming the field that is wrong.
        """
        reader, plans = _Reader("override"), self
        for name, value in sorted(fields.items()):
            kind, _, rest = name.partition("/")
            if kind == "tenant":
                plans = replace(plans, tenants={**plans.tenants, rest: value})
                continue
            plan, bucket, level = reader.parts_of(rest)
            plans = plans.with_limit(plan, bucket, level, reader.quota_of_text(name, bucket, value))
        return plans

    def with_limit(self, plan: str, bucket: str, level: Level, quota: Quota | None) -> "Plans":
        """These plans with one limit changed; a plan of a new name is made."""
        changed = {**self.limits.get(plan, {}), (bucket, level): quota}
        return replace(self, limits={**self.limits, plan: changed})

    def require_known(self, known_buckets: frozenset[str], source: str) -> None:
        """Refuse what nothing would ever read: a typing error would be ignored silently.

        Raises:
            ConfigError: naming the key.
        """
        for plan, bucket, level, _ in self.rows():
            if bucket not in known_buckets:
                known = ", ".join(sorted(known_buckets))
                where = _path_of(plan, bucket, level)
                raise ConfigError(f"{source}: {where}: no contract names this bucket ({known}).")
        for tenant, plan in self.tenants.items():
            if plan not in self.limits:
                raise ConfigError(f"{source}: tenants.{tenant}: there is no plan {plan!r}.")


def limit_field(plan: str, bucket: str, level: Level) -> str:
    """The field that overrides one limit."""
    return f"limit/{plan}/{bucket}/{level}"


def tenant_field(tenant: str) -> str:
    """The field that overrides a tenant's plan."""
    return f"tenant/{tenant}"


def limit_text(quota: Quota | None) -> str:
    """A limit as an override says it, and as operators read it: "600/s burst 1200"."""
    if quota is None:
        return UNLIMITED
    return f"{rate_text(quota)} burst {quota.burst_points}"


def rate_text(quota: Quota) -> str:
    """The rate in the smallest unit in which it is 1 or more: "600/s", "60/min"."""
    for unit, seconds in _UNITS_S.items():
        points = seconds / quota.refill_s
        if points >= 1 or unit == "d":
            return f"{round(points, 6):.6f}".rstrip("0").rstrip(".") + f"/{unit}"
    raise AssertionError("the last unit always fits")


def parse_limit(where: str, bucket: str, rate: object, burst: object) -> Quota:
    """A limit from its two parts.

    Args:
        where: names the place in errors.
        bucket: whose.
        rate: "600/s"; also per min, h or d.
        burst: points, 1 or more.

    Raises:
        ConfigError: naming the part that is wrong.
    """
    found = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f'{where}.rate: {rate!r} must be points per time, such as "600/s".')
    if not isinstance(burst, int) or isinstance(burst, bool) or burst < 1:
        raise ConfigError(f"{where}.burst: {burst!r} must be a whole number of points, 1 or more.")
    if burst > BURST_POINTS_MAX:
        raise ConfigError(f"{where}.burst: {burst} must be at most {BURST_POINTS_MAX}.")
    refill_s = _UNITS_S[found[2]] / float(found[1])
    if refill_s < 1e-6:
        raise ConfigError(f"{where}.rate: {rate!r} must be at most 1000000/s.")
    if refill_s * burst > WINDOW_S_MAX:
        days = WINDOW_S_MAX // 86_400
        raise ConfigError(
            f"{where}: at {rate} a burst of {burst} takes more than {days} d to fill."
        )
    return Quota(bucket, burst, refill_s)


@dataclass(frozen=True)
class _Reader:
    """Reads a document; every error begins with its source and names the key."""

    source: str

    def plans(self, base: Plans, document: Mapping[str, Any]) -> Plans:
        self._refuse_others(document, {"tenants", "plans", "global"}, "")
        plans = base
        for plan, _ in self._tables(document, "plans"):
            plans = replace(plans, limits={plan: {}, **plans.limits})
            for bucket, levels in self._tables(document["plans"], plan, "plans."):
                for level, quota in self._levels(f"plans.{plan}.{bucket}", bucket, levels):
                    plans = plans.with_limit(plan, bucket, level, quota)
        for bucket, _ in self._tables(document, "global"):
            quota = self._quota(f"global.{bucket}", bucket, document["global"][bucket])
            plans = plans.with_limit(DEFAULT_PLAN, bucket, Level.GLOBAL, quota)
        return replace(plans, tenants={**plans.tenants, **self._tenants(document)})

    def parts_of(self, name: str) -> tuple[str, str, Level]:
        plan, _, rest = name.partition("/")
        bucket, _, level = rest.partition("/")
        if not plan or not bucket or level not in set(Level):
            raise ConfigError(f"{self.source}: limit/{name} is not plan/bucket/level.")
        if level == Level.GLOBAL and plan != DEFAULT_PLAN:
            raise ConfigError(f"{self.source}: limit/{name}: all plans share one global limit.")
        return plan, bucket, Level(level)

    def quota_of_text(self, name: str, bucket: str, text: str) -> Quota | None:
        """What `limit_text` wrote."""
        if text == UNLIMITED:
            return None
        rate, word, burst = text.partition(" burst ")
        if not word or not burst.isdecimal():
            raise ConfigError(f'{self.source}: {name}: {text!r} is not "600/s burst 1200".')
        return parse_limit(f"{self.source}: {name}", bucket, rate, int(burst))

    def _tenants(self, document: Mapping[str, Any]) -> dict[str, str]:
        table = document.get("tenants", {})
        if not isinstance(table, dict):
            raise ConfigError(f"{self.source}: tenants must be a table of tenant = plan.")
        for tenant, plan in table.items():
            if not _TENANT.fullmatch(tenant):
                raise ConfigError(f"{self.source}: tenants.{tenant!r}: this is no tenant's name.")
            if not isinstance(plan, str):
                raise ConfigError(f"{self.source}: tenants.{tenant}: must be a plan's name.")
        return table

    def _levels(
        self, where: str, bucket: str, table: Mapping[str, Any]
    ) -> Iterator[tuple[Level, Quota | None]]:
        self._refuse_others(table, set(_OF_PLANS), f"{where}.")
        for level in _OF_PLANS:
            if level in table:
                yield level, self._quota(f"{where}.{level}", bucket, table[level])

    def _quota(self, where: str, bucket: str, table: object) -> Quota | None:
        if table == UNLIMITED:
            return None
        if not isinstance(table, dict):
            shape = f'{{ rate = "600/s", burst = 1200 }} or "{UNLIMITED}"'
            raise ConfigError(f"{self.source}: {where}: must be {shape}.")
        self._refuse_others(table, {"rate", "burst"}, f"{where}.")
        at = f"{self.source}: {where}"
        return parse_limit(at, bucket, table.get("rate"), table.get("burst"))

    def _tables(
        self, document: Mapping[str, Any], name: str, prefix: str = ""
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        table = document.get(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{self.source}: {prefix}{name} must be a table.")
        for key, value in table.items():
            where = f"{prefix}{name}.{key}"
            self._require_name(key, where)
            if not isinstance(value, dict) and name != "global":
                raise ConfigError(f"{self.source}: {where} must be a table.")
            yield key, value

    def _require_name(self, name: str, where: str) -> None:
        if not _NAME.fullmatch(name):
            allowed = "letters, digits, - and _, at most 63"
            raise ConfigError(f"{self.source}: {where}: a name is {allowed}.")

    def _refuse_others(self, table: Mapping[str, Any], known: set[str], prefix: str) -> None:
        for key in table:
            if key not in known:
                allowed = ", ".join(sorted(known))
                raise ConfigError(f"{self.source}: {prefix}{key} is not known; use {allowed}.")


def _path_of(plan: str, bucket: str, level: Level) -> str:
    return f"global.{bucket}" if level is Level.GLOBAL else f"plans.{plan}.{bucket}.{level}"
