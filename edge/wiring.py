"""The only place that chooses the edge's implementations."""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge.accounts import Accounts
from edge.aip193 import google_error_of
from edge.api import Api, foreign_api, own_api
from edge.app import EdgeApp, Limits, Parts
from edge.auth import Authenticator
from edge.calls import CallLimits, Calls
from edge.charges import Charges, require_payable
from edge.config import ERROR_GOOGLE, EdgeConfig
from edge.connect_calls import ConnectCalls
from edge.contracts import ContractError, Contracts
from edge.cors import Cors
from edge.foreign import Tell, opened, require_upstreams
from edge.guards import Guards
from edge.health import Readiness
from edge.live_plans import LivePlans
from edge.problem import problem_of
from edge.quota_store import LocalQuotas, LocalQuotaStore, QuotaStore
from edge.reload import Reloader, following
from edge.slots import LocalSlots, Slots, SlotStore
from edge.sources import FileSource, Found, ServerSource, Source
from edge.streams import OpenStreams
from edge.upstream import Upstream
from shared import log
from shared.clock import Clock
from shared.identity import IdentitySigner
from shared.quota.gcra import Quota
from shared.quota.keys import Level
from shared.rpc.client import Channels, Upstreams
from shared.rpc.tls import ClientTls
from shared.telemetry.metrics import Metrics

_log = log.get_logger("edge")


@dataclass(frozen=True)
class Surroundings:
    """What the edge finds around it.

    Attributes:
        upstreams: where each service is.
        signer: signs identities as "edge"; None fronts a server that knows no identities, so
            that the edge takes no credentials and serves what anybody may call.
        valkey_url: where quotas are counted for all edges of a mesh.
        clock: where time comes from.
        tls: how to speak to the upstreams; None for plaintext.
        metrics: where every part counts what it does.
        quota_plans: a file, see shared.quota.plans; None for none.
    """

    upstreams: Upstreams
    signer: IdentitySigner | None
    valkey_url: str
    clock: Clock
    tls: ClientTls | None = None
    metrics: Metrics = field(default_factory=Metrics)
    quota_plans: Path | None = None


async def load_api(config: EdgeConfig, around: Surroundings, tell: Tell) -> Api:
    """What the edge will serve, from where the settings say.

    Args:
        config: says where contracts come from, and whether anybody may call.
        around: the servers that may be asked.
        tell: takes a sentence about what is waited for, or left out.

    Raises:
        ContractError: it cannot be served.
        ConfigError: plans and contracts do not go together.
    """
    api = compile_api(config, around, await _source(config, around, tell).find(), tell)
    live_plans(config, around, api)
    return api


def compile_api(config: EdgeConfig, around: Surroundings, found: Found, tell: Tell) -> Api:
    """Check and compile what was found.

    Raises:
        ContractError: it cannot be served.
    """
    try:
        contracts = Contracts(found.file_set)
    except ContractError as error:
        raise ContractError(f"{found.origin}: {error}" if found.origin else error) from error
    services = found.services
    methods = [m for m in contracts.methods() if services is None or m.service in services]
    if around.signer is not None:
        return replace(own_api(contracts, methods, config), digest=found.digest)
    served = opened(methods, allow_anonymous=config.allow_anonymous)
    require_upstreams(served.methods, around.upstreams)
    for sentence in served.left_out:
        tell(f"not served: {sentence}")
    return replace(foreign_api(contracts, served.methods, config), digest=found.digest)


def _source(config: EdgeConfig, around: Surroundings, tell: Tell) -> Source:
    if config.reflect:
        return ServerSource(around.upstreams, around.tls, wait_s=config.reflect_wait_s, tell=tell)
    return FileSource(Path(config.descriptors)) if config.descriptors else FileSource.own()


@asynccontextmanager
async def open_edge(
    config: EdgeConfig,
    around: Surroundings,
    api: Api | None = None,
    *,
    tell: Tell = _log.info,
) -> AsyncIterator[EdgeApp]:
    """The app with everything it needs, running; leaving closes it.

    Args:
        config: limits, quotas and times.
        around: what is there.
        api: from `load_api`; None loads it now.
        tell: takes a sentence about contracts that change.

    Raises:
        ContractError: it is loaded now, and cannot be served.
    """
    if api is None:
        api = await load_api(config, around, tell)
    async with AsyncExitStack() as stack:
        policies = {method.full_name: method.policy for method in api.methods}
        channels = Channels(
            around.upstreams,
            around.signer,
            policies=policies,
            checks_health=around.signer is not None,
            tls=around.tls,
            metrics=around.metrics,
        )
        stack.push_async_callback(channels.close)
        plans = live_plans(config, around, api)
        standing = await _stand(stack, config, around, channels, plans)
        app = EdgeApp(_parts(api, config, around, standing))

        def compile_found(found: Found) -> Api:
            new = compile_api(config, around, found, tell)
            require_payable(new.prices, plans.current)
            return new

        def serve(new: Api) -> None:
            # Those of methods that are gone stay: calls to them may be under way.
            policies.update({method.full_name: method.policy for method in new.methods})
            app.change(_parts(new, config, around, standing))

        reloader = Reloader(
            _source(replace(config, reflect_wait_s=0), around, _hush),
            api,
            compile_found,
            serve,
            poll_s=config.reload_s,
            allows_breaking=config.reload_breaking,
            tell=tell,
        )
        app.ask_reload = reloader.ask
        await stack.enter_async_context(following(reloader))
        yield app


def _hush(_: object) -> None:
    """A server that restarts is away for a moment; nothing is wrong."""


@dataclass(frozen=True)
class _Standing:
    """What stays when contracts change."""

    channels: Channels
    guards: Guards
    open_streams: OpenStreams
    store: QuotaStore
    slots: SlotStore
    accounts: Accounts
    authenticator: Authenticator | None
    addresses: LocalQuotaStore


async def _stand(
    stack: AsyncExitStack,
    config: EdgeConfig,
    around: Surroundings,
    channels: Channels,
    plans: LivePlans,
) -> _Standing:
    open_streams = OpenStreams(config.streams_per_caller_max)
    accounts = Accounts(_limits(config, around, plans))
    plans.on_change = accounts.forget
    guards = Guards(
        channels,
        around.upstreams.target_of,
        calls_max=math.ceil(config.upstream_calls_max / config.workers),
        method_share=config.method_calls_share,
        metrics=around.metrics,
    )
    store, slots = await _quota_stores(stack, config, around, plans, accounts)
    return _Standing(
        channels=channels,
        guards=guards,
        open_streams=open_streams,
        store=store,
        slots=slots,
        accounts=accounts,
        authenticator=await _authenticator(stack, config, around, channels, open_streams),
        addresses=LocalQuotaStore(around.clock),
    )


def _parts(api: Api, config: EdgeConfig, around: Surroundings, standing: _Standing) -> Parts:
    """What serves one set of contracts."""
    tell = google_error_of if config.error_format == ERROR_GOOGLE else problem_of
    upstream = Upstream(standing.channels, around.signer, standing.guards)
    limits = _call_limits(config)
    calls = Calls(
        upstream,
        standing.open_streams,
        limits,
        api.forwarding,
        authenticator=standing.authenticator,
        public_url=config.public_url.rstrip("/"),
        tell=tell,
    )
    return Parts(
        routes=api.routes,
        upstream=upstream,
        calls=calls,
        connect_calls=ConnectCalls(upstream, calls, limits, api.forwarding),
        charges=Charges(standing.store, api.prices, standing.accounts),
        slots=Slots(standing.slots),
        addresses=standing.addresses,
        limits=Limits(math.ceil(config.requests_max / config.workers), config.address_quota()),
        cors=Cors(config.origins, api.routes, api.forwarding),
        readiness=_readiness(around, api, standing.channels, standing.authenticator),
        open_streams=standing.open_streams,
        documents=api.documents,
        authenticator=standing.authenticator,
        tell=tell,
        trusted_hops=config.trusted_hops,
        metrics=around.metrics,
    )


def live_plans(config: EdgeConfig, around: Surroundings, api: Api) -> LivePlans:
    """The limits that the calls of an API meet.

    Raises:
        ConfigError: the file of plans is wrong: it names the key.
        ContractError: a full bucket could not pay for some method.
    """
    buckets = frozenset(price.bucket for price in api.prices.values())
    plans = LivePlans(config.plans(), buckets, around.quota_plans)
    require_payable(api.prices, plans.current)
    return plans


def _limits(
    config: EdgeConfig, around: Surroundings, plans: LivePlans
) -> Callable[[str, str, Level], Quota | None]:
    """What an account may spend here; workers that count by themselves share each quota."""
    if around.signer is not None or config.workers == 1:
        return plans.limit

    def share(bucket: str, tenant: str, level: Level) -> Quota | None:
        quota = plans.limit(bucket, tenant, level)
        return None if quota is None else quota.share(1 / config.workers)

    return share


async def _quota_stores(
    stack: AsyncExitStack,
    config: EdgeConfig,
    around: Surroundings,
    plans: LivePlans,
    accounts: Accounts,
) -> tuple[QuotaStore, SlotStore]:
    if around.signer is None:
        return LocalQuotas(around.clock), LocalSlots(part=1 / config.workers)
    from edge.mesh import open_quotas

    opened = open_quotas(
        around.valkey_url,
        plans,
        accounts,
        edges_min=config.edge_count * config.workers,
        timeout_s=config.quota_timeout_s,
        clock=around.clock,
    )
    quotas, slots = await stack.enter_async_context(opened)
    away = around.metrics.gauge(
        "tenfold_quota_store_away", "Whether this edge decides alone: Valkey does not answer."
    )
    edges = around.metrics.gauge("tenfold_quota_edges", "How many edges share each bucket.")
    around.metrics.watch(away, lambda: quotas.is_away)
    around.metrics.watch(edges, lambda: quotas.edge_count)
    return quotas, slots


async def _authenticator(
    stack: AsyncExitStack,
    config: EdgeConfig,
    around: Surroundings,
    channels: Channels,
    open_streams: OpenStreams,
) -> Authenticator | None:
    if around.signer is None:
        return None
    from edge.mesh import open_authenticator

    stale_s = config.revocations_stale_s
    return await stack.enter_async_context(
        open_authenticator(channels, open_streams, revocations_stale_s=stale_s, clock=around.clock)
    )


def _call_limits(config: EdgeConfig) -> CallLimits:
    return CallLimits(
        body_bytes_max=config.body_bytes_max,
        body_timeout_s=config.body_timeout_s,
        line_bytes_max=config.line_bytes_max,
        stream_bytes_max=config.stream_bytes_max,
        heartbeat_s=config.heartbeat_s,
    )


def _readiness(
    around: Surroundings, api: Api, channels: Channels, authenticator: Authenticator | None
) -> Readiness:
    services = {method.service for method in api.methods}
    if authenticator is None:
        by_target = {around.upstreams.target_of(name): name for name in sorted(services)}
        return Readiness(channels, by_target.values(), asks_servers=True)
    own = {"edge (revocations, signing keys)": lambda: authenticator.is_ready}
    return Readiness(channels, services, own)
