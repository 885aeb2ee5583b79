"""The only place that chooses the edge's implementations."""

import importlib.metadata
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
from google.protobuf.message import DecodeError

from edge.aip193 import google_error_of
from edge.answer import answers_of
from edge.app import HEALTH_PATHS, Document, EdgeApp, Limits, Parts
from edge.auth import Authenticator
from edge.calls import CallLimits, Calls
from edge.charges import Charges, prices_of
from edge.config import ERROR_GOOGLE, EdgeConfig
from edge.connect_calls import ConnectCalls
from edge.contracts import ContractError, Contracts, load_contracts
from edge.cors import Cors
from edge.docs import docs_files
from edge.health import Readiness
from edge.openapi import openapi_document
from edge.problem import problem_of
from edge.quota_store import LocalQuotaStore, QuotaStore
from edge.reachable import require_reachable
from edge.routes import RouteTable
from edge.streams import OpenStreams
from edge.transcode import plan_of
from edge.upstream import Upstream
from shared.clock import Clock
from shared.identity import IdentitySigner
from shared.rpc.client import Channels, Upstreams

OPENAPI_PATH = b"/openapi.json"


@dataclass(frozen=True)
class Surroundings:
    """What the edge finds around it.

    Attributes:
        upstreams: where each service is.
        signer: signs identities as "edge"; None fronts a server that knows no identities, so
            that the edge takes no credentials and lets every method be called.
        valkey_url: where quotas are counted for all edges.
        clock: where time comes from.
    """

    upstreams: Upstreams
    signer: IdentitySigner | None
    valkey_url: str
    clock: Clock


@asynccontextmanager
async def open_edge(config: EdgeConfig, around: Surroundings) -> AsyncIterator[EdgeApp]:
    """The app with everything it needs, running; leaving closes it.

    Raises:
        ContractError: the contracts cannot be served.
    """
    contracts = _contracts(config)
    routes = RouteTable.of_contracts(contracts, serves_connect=config.connect, json=config.json)
    for route in routes.all_routes:  # compiled now, so that no request pays
        plan_of(route)
    for route in routes.routes:
        answers_of(route)
    documents = _documents(routes, contracts, config)
    require_reachable(routes, {*documents, *HEALTH_PATHS})
    prices = prices_of(routes.all_routes, config.quotas())
    tell = google_error_of if config.error_format == ERROR_GOOGLE else problem_of
    open_streams = OpenStreams(config.streams_per_caller_max)
    methods = tuple(contracts.methods())
    async with AsyncExitStack() as stack:
        channels = Channels(
            around.upstreams,
            around.signer,
            policies={method.full_name: method.policy for method in methods},
            checks_health=around.signer is not None,
        )
        stack.push_async_callback(channels.close)
        store = await _quota_store(stack, config, around)
        authenticator = await _authenticator(stack, config, around, channels, open_streams)
        upstream, limits = Upstream(channels, around.signer), _call_limits(config)
        calls = Calls(
            upstream,
            open_streams,
            limits,
            authenticator=authenticator,
            public_url=config.public_url.rstrip("/"),
            tell=tell,
        )
        yield EdgeApp(
            Parts(
                routes=routes,
                calls=calls,
                connect_calls=ConnectCalls(upstream, calls, limits),
                charges=Charges(store, prices),
                addresses=LocalQuotaStore(around.clock),
                limits=Limits(config.requests_max, config.address_quota()),
                cors=Cors(config.origins, routes),
                readiness=Readiness(
                    channels,
                    {method.service for method in methods} if around.signer else (),
                    _own_conditions(authenticator),
                ),
                open_streams=open_streams,
                documents=documents,
                authenticator=authenticator,
                tell=tell,
                trusted_hops=config.trusted_hops,
            )
        )


async def _quota_store(
    stack: AsyncExitStack, config: EdgeConfig, around: Surroundings
) -> QuotaStore:
    if around.signer is None:
        return LocalQuotaStore(around.clock)
    from edge.mesh import open_quota_store

    return await stack.enter_async_context(
        open_quota_store(around.valkey_url, edge_count=config.edge_count, clock=around.clock)
    )


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


def _contracts(config: EdgeConfig) -> Contracts:
    if not config.descriptors:
        return load_contracts()
    path = Path(config.descriptors)
    try:
        return Contracts.of_bytes(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise ContractError(f"TENFOLD_EDGE_DESCRIPTORS={path} cannot be read: {error}") from error


def _call_limits(config: EdgeConfig) -> CallLimits:
    return CallLimits(
        body_bytes_max=config.body_bytes_max,
        body_timeout_s=config.body_timeout_s,
        heartbeat_s=config.heartbeat_s,
    )


def _own_conditions(authenticator: Authenticator | None) -> dict[str, Callable[[], bool]]:
    if authenticator is None:
        return {}
    return {"edge (revocations, signing keys)": lambda: authenticator.is_ready}


def _documents(
    routes: RouteTable, contracts: Contracts, config: EdgeConfig
) -> dict[bytes, Document]:
    """The OpenAPI document and the reference, made once."""
    version = importlib.metadata.version("tenfold")
    openapi = openapi_document(
        routes,
        contracts,
        title="Tenfold",
        version=version,
        json=config.json,
        is_google=config.error_format == ERROR_GOOGLE,
    )
    headers = ((b"content-type", b"application/json"), (b"cache-control", b"no-cache"))
    documents = {OPENAPI_PATH: Document(headers, orjson.dumps(openapi))}
    for path, file in docs_files().items():
        pairs = tuple((name.encode(), value.encode()) for name, value in file.headers.items())
        documents[path.encode()] = Document(pairs, file.body)
    return documents
