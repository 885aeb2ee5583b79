"""The only place that chooses the edge's implementations."""

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
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
from edge.contracts import load_contracts
from edge.cors import Cors
from edge.foreign import Tell, contracts_of_file, contracts_of_servers, opened, require_upstreams
from edge.guards import Guards
from edge.health import Readiness
from edge.live_plans import LivePlans
from edge.problem import problem_of
from edge.quota_store import LocalQuotas, LocalQuotaStore, QuotaStore
from edge.slots import LocalSlots, Slots, SlotStore
from edge.streams import OpenStreams
from edge.upstream import Upstream
from shared import log
from shared.clock import Clock
from shared.identity import IdentitySigner
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
    """
    services: frozenset[str] | None = None  # all
    if config.reflect:
        contracts, services = await contracts_of_servers(
            around.upstreams, around.tls, wait_s=config.reflect_wait_s, tell=tell
        )
    elif config.descriptors:
        contracts = contracts_of_file(Path(config.descriptors))
    else:
        contracts = load_contracts()
    methods = [m for m in contracts.methods() if services is None or m.service in services]
    if around.signer is not None:
        api = own_api(contracts, methods, config)
        live_plans(config, around, api)
        return api
    served = opened(methods, allow_anonymous=config.allow_anonymous)
    require_upstreams(served.methods, around.upstreams)
    for sentence in served.left_out:
        tell(f"not served: {sentence}")
    api = foreign_api(contracts, served.methods, config)
    live_plans(config, around, api)
    return api


@asynccontextmanager
async def open_edge(
    config: EdgeConfig, around: Surroundings, api: Api | None = None
) -> AsyncIterator[EdgeApp]:
    """The app with everything it needs, running; leaving closes it.

    Args:
        config: limits, quotas and times.
        around: what is there.
        api: from `load_api`; None loads it now.

    Raises:
        ContractError: it is loaded now, and cannot be served.
    """
    if api is None:
        api = await load_api(config, around, _log.info)
    tell = google_error_of if config.error_format == ERROR_GOOGLE else problem_of
    open_streams = OpenStreams(config.streams_per_caller_max)
    async with AsyncExitStack() as stack:
        channels = Channels(
            around.upstreams,
            around.signer,
            policies={method.full_name: method.policy for method in api.methods},
            checks_health=around.signer is not None,
            tls=around.tls,
            metrics=around.metrics,
        )
        stack.push_async_callback(channels.close)
        plans = live_plans(config, around, api)
        accounts = Accounts(plans.limit)
        plans.on_change = accounts.forget
        store, slots = await _quota_stores(stack, config, around, plans, accounts)
        authenticator = await _authenticator(stack, config, around, channels, open_streams)
        guards = Guards(
            channels,
            around.upstreams.target_of,
            calls_max=config.upstream_calls_max,
            method_share=config.method_calls_share,
            metrics=around.metrics,
        )
        upstream, limits = Upstream(channels, around.signer, guards), _call_limits(config)
        calls = Calls(
            upstream,
            open_streams,
            limits,
            api.forwarding,
            authenticator=authenticator,
            public_url=config.public_url.rstrip("/"),
            tell=tell,
        )
        yield EdgeApp(
            Parts(
                routes=api.routes,
                upstream=upstream,
                calls=calls,
                connect_calls=ConnectCalls(upstream, calls, limits, api.forwarding),
                charges=Charges(store, api.prices, accounts),
                slots=Slots(slots),
                addresses=LocalQuotaStore(around.clock),
                limits=Limits(
                    math.ceil(config.requests_max / config.workers), config.address_quota()
                ),
                cors=Cors(config.origins, api.routes, api.forwarding),
                readiness=_readiness(around, api, channels, authenticator),
                open_streams=open_streams,
                documents=api.documents,
                authenticator=authenticator,
                tell=tell,
                trusted_hops=config.trusted_hops,
                metrics=around.metrics,
            )
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


async def _quota_stores(
    stack: AsyncExitStack,
    config: EdgeConfig,
    around: Surroundings,
    plans: LivePlans,
    accounts: Accounts,
) -> tuple[QuotaStore, SlotStore]:
    if around.signer is None:
        part = 1 / config.workers
        return LocalQuotas(around.clock, part=part), LocalSlots(part=part)
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
