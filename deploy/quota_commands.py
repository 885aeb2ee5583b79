"""tenfold quota show, set, reset: what the edges obey, changed while they run."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from deploy.local.data_folder import DataFolder, children_of, launcher_of
from deploy.local.errors import LaunchError
from deploy.quota import NoEdges, Operator
from deploy.settings import load_settings, value_of
from shared.config import ConfigError
from shared.identity import DEFAULT_TENANT
from shared.quota.keys import Level
from shared.quota.plans import (
    DEFAULT_PLAN,
    UNLIMITED,
    limit_field,
    limit_text,
    parse_limit,
    tenant_field,
)

URL_SETTING = "TENFOLD_VALKEY_URL"
VALKEY_TIMEOUT_S = 5.0
_PASSWORD = re.compile(r"^requirepass (\S+)$", re.MULTILINE)

quota_app = typer.Typer(
    name="quota",
    help="Show and change quotas while the edges run; they look once a second.\n\n"
    "What is set here wins over settings and the file of TENFOLD_QUOTA_PLANS, and is lost with "
    "Valkey's data: what must last belongs into the file.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help=f"The mesh's data folder, if {URL_SETTING} is not set."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
TenantOption = Annotated[str, typer.Option(help="Of which tenant.")]
CredentialOption = Annotated[
    str, typer.Option(help="The id of a session or an API key: its own buckets.")
]
AddressOption = Annotated[
    str, typer.Option(help="An address block as the edge counts it: 198.51.100.0/24.")
]


@quota_app.command()
def show(
    tenant: TenantOption = DEFAULT_TENANT,
    credential: CredentialOption = "",
    address: AddressOption = "",
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Print every limit in force, what was set by hand, and what is left to a tenant."""
    with _operator(data) as operator:
        plans, overrides = operator.plans(), operator.overrides()
        uses = operator.use(tenant, credential=credential, address=address)
        edges = operator.edge_count()
    limits = [
        {"plan": plan, "bucket": bucket, "level": level.value, "limit": limit_text(quota)}
        for plan, bucket, level, quota in plans.rows()
    ]
    left: list[dict[str, str | int]] = [
        {
            "bucket": use.quota.name,
            "level": use.level.value,
            "limit": limit_text(use.quota),
            "remaining_points": use.remaining_points,
            "leased_points": use.leased_points,
        }
        for use in uses
    ]
    if as_json:
        shown = {"edges": edges, "limits": limits, "tenants": dict(plans.tenants)}
        print(json.dumps({**shown, "overrides": overrides, "tenant": tenant, "left": left}))
        return
    print(f"{edges} edge{'s' if edges != 1 else ''}\n")
    for row in limits:
        is_set = limit_field(row["plan"], row["bucket"], Level(row["level"])) in overrides
        mark = "  (set)" if is_set else ""
        print(f"{row['plan']:<16} {row['bucket']:<12} {row['level']:<11} {row['limit']}{mark}")
    for name, plan in sorted(plans.tenants.items()):
        print(f"tenant {name} has the plan {plan}{'  (set)' * (tenant_field(name) in overrides)}")
    print(f"\nleft to tenant {tenant}, plan {plans.tenants.get(tenant, DEFAULT_PLAN)}:")
    for use in uses:
        points = f"{use.remaining_points} points, {use.leased_points} on lease"
        print(f"{use.quota.name:<12} {use.level:<11} {points}, of {limit_text(use.quota)}")


@quota_app.command(name="set")
def set_(
    *,
    bucket: Annotated[str, typer.Option(help="Named in the contract: api, login.")] = "",
    level: Annotated[str, typer.Option(help="address, credential, tenant or global.")] = "",
    rate: Annotated[str, typer.Option(help='Points per time: "600/s"; also min, h, d.')] = "",
    burst: Annotated[int, typer.Option(help="Points at once.")] = 0,
    unlimited: Annotated[bool, typer.Option("--unlimited", help="No limit at this level.")] = False,
    unset: Annotated[bool, typer.Option("--unset", help="Take back what was set.")] = False,
    plan: Annotated[str, typer.Option(help="Of which plan; a new name makes one.")] = DEFAULT_PLAN,
    tenant: Annotated[str, typer.Option(help="Give this tenant the plan.")] = "",
    data: DataOption = None,
) -> None:
    """Set one limit of a plan, or give a tenant a plan.

    \b
        tenfold quota set --plan gold --bucket api --level credential --rate 6000/s --burst 12000
        tenfold quota set --tenant acme --plan gold
        tenfold quota set --bucket api --level tenant --unset
    """  # noqa: D301 - \b keeps the lines of the example
    if bool(tenant) == bool(bucket):
        raise LaunchError("Say what to set: either --bucket and --level, or --tenant and --plan.")
    if tenant:
        with _operator(data) as operator:
            if unset:
                _say_unset(operator.unset(tenant_field(tenant)))
            else:
                operator.set_plan(tenant, plan)
        return
    if level not in set(Level):
        raise LaunchError(f"--level {level!r} is none of {', '.join(Level)}.")
    with _operator(data) as operator:
        if unset:
            _say_unset(operator.unset(limit_field(plan, bucket, Level(level))))
            return
        quota = None
        if not unlimited:
            quota = parse_limit(f"{plan}.{bucket}.{level}", bucket, rate or None, burst or None)
        operator.set_limit(plan, bucket, Level(level), quota)
        print(f"{plan} {bucket} {level}: {limit_text(quota) if quota else UNLIMITED}")


@quota_app.command()
def reset(
    tenant: TenantOption = DEFAULT_TENANT,
    credential: CredentialOption = "",
    address: AddressOption = "",
    data: DataOption = None,
) -> None:
    """Fill the buckets of a tenant and of all its callers, or of one caller alone."""
    with _operator(data) as operator:
        count = operator.reset(tenant, credential=credential, address=address)
    print(f"{count} bucket{'s were' if count != 1 else ' was'} filled.")


@contextmanager
def _operator(data: Path | None) -> Iterator[Operator]:
    """The mesh's Valkey; what goes wrong is said in one sentence."""
    from redis import Redis, RedisError  # no other command needs it loaded

    timeout_s = VALKEY_TIMEOUT_S
    try:
        with Redis.from_url(
            _valkey_url(data), socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        ) as valkey:
            yield Operator(valkey)
    except (ConfigError, NoEdges) as error:
        raise LaunchError(str(error)) from error
    except (RedisError, ValueError) as error:
        raise LaunchError(f"Valkey does not answer ({error}): see {URL_SETTING}.") from error


def _valkey_url(data: Path | None) -> str:
    """That of the settings; without one, that of the mesh which runs in the data folder."""
    settings = load_settings()
    if os.environ.get(URL_SETTING) and data is None:
        return os.environ[URL_SETTING]
    folder = DataFolder((data or Path(value_of("TENFOLD_DATA", os.environ, settings))).absolute())
    state = folder.read_state()
    launcher = launcher_of(state)
    if not (launcher and launcher.is_alive and "valkey" in children_of(state)):
        raise LaunchError(f"No mesh runs in {folder.path}, and {URL_SETTING} is not set.")
    found = _PASSWORD.search((folder.valkey / "valkey.conf").read_text())
    password = f":{found[1]}@" if found else ""
    return f"redis://{password}{state['children']['valkey']['address']}/0"


def _say_unset(was_set: bool) -> None:
    print("Taken back." if was_set else "Nothing was set there.")
