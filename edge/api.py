"""What one edge serves: checked, compiled and described before it listens."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import orjson

from edge.answer import answers_of
from edge.app import HEALTH_PATHS, Document
from edge.charges import Price, prices_of
from edge.config import ERROR_GOOGLE, EdgeConfig
from edge.contracts import Contracts, MethodInfo
from edge.docs import OPENAPI_PATH, docs_files
from edge.forwarding import Forwarding
from edge.openapi import openapi_document
from edge.reachable import require_reachable
from edge.routes import RouteTable
from edge.shapes import shape_of
from edge.slots import SlotLimit
from edge.transcode import plan_of

# How many packages a title names.
TITLE_PACKAGES_MAX = 3
_VERSION = re.compile(r"v[0-9]+[a-z0-9]*")


@dataclass(frozen=True)
class Api:
    """What one edge serves.

    Attributes:
        methods: all that its routes call, or that its own parts do.
        routes: their paths.
        prices: what each costs, by RPC path.
        forwarding: which headers cross with each.
        documents: by path: the OpenAPI document, the reference and its files.
        digest: of the contracts, see edge.sources.
    """

    methods: tuple[MethodInfo, ...]
    routes: RouteTable
    prices: Mapping[str, Price]
    forwarding: Forwarding
    documents: Mapping[bytes, Document]
    digest: str = ""

    @classmethod
    def of(
        cls,
        contracts: Contracts,
        methods: Iterable[MethodInfo],
        config: EdgeConfig,
        *,
        title: str,
        version: str,
        takes_credentials: bool,
    ) -> "Api":
        """Compile contracts.

        Args:
            contracts: where the methods come from.
            methods: those that are served.
            config: with the quotas.
            title: of the API, as its reference shows it.
            version: of the API, likewise.
            takes_credentials: whether the edge itself reads Authorization.

        Raises:
            ContractError: they cannot be served.
        """
        methods = tuple(methods)
        routes = RouteTable.of_contracts(
            contracts, methods, serves_connect=config.connect, json=config.json
        )
        compile_routes(routes)
        forwarding = Forwarding(
            methods,
            request_headers=config.request_headers,
            response_headers=config.response_headers,
            takes_credentials=takes_credentials,
        )
        openapi = openapi_document(
            routes,
            contracts,
            title=title,
            version=version,
            json=config.json,
            is_google=config.error_format == ERROR_GOOGLE,
            forwarding=forwarding,
        )
        documents = _documents(openapi, title)
        require_reachable(routes, {*documents, *HEALTH_PATHS})
        prices = prices_of(
            routes.all_routes,
            streams=SlotLimit("streams", config.streams_per_caller_max),
            uploads=SlotLimit("uploads", config.uploads_per_caller_max),
        )
        return cls(methods, routes, prices, forwarding, documents)

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages of what its paths call, in order."""
        return _packages(route.method for route in self.routes.all_routes)


def compile_routes(routes: RouteTable) -> None:
    """Compile all that requests will need, so that none of them pays."""
    for route in routes.all_routes:
        plan_of(route)
        shape_of(route)
    for route in routes.routes:
        answers_of(route)


def own_api(contracts: Contracts, methods: Iterable[MethodInfo], config: EdgeConfig) -> Api:
    """The contracts of a mesh, served to whom they say."""
    import importlib.metadata

    version = importlib.metadata.version("tenfold")
    return Api.of(
        contracts, methods, config, title="Tenfold", version=version, takes_credentials=True
    )


def foreign_api(contracts: Contracts, methods: Iterable[MethodInfo], config: EdgeConfig) -> Api:
    """Another's contracts, under their own name: "acme.shop.v1", version "v1"."""
    methods = tuple(methods)
    packages = _packages(method for method in methods if method.is_bound)
    title = ", ".join(packages[:TITLE_PACKAGES_MAX])
    title += ", …" if len(packages) > TITLE_PACKAGES_MAX else ""
    last = packages[0].rpartition(".")[2]
    has_version = len(packages) == 1 and _VERSION.fullmatch(last)
    version = last if has_version else "1"
    return Api.of(contracts, methods, config, title=title, version=version, takes_credentials=False)


def _packages(methods: Iterable[MethodInfo]) -> tuple[str, ...]:
    """The package of each; a service without one stands for itself."""
    names = {method.service.rpartition(".")[0] or method.service for method in methods}
    return tuple(sorted(names))


def _documents(openapi: dict[str, object], title: str) -> dict[bytes, Document]:
    """The OpenAPI document and the reference, made once."""
    headers = ((b"content-type", b"application/json"), (b"cache-control", b"no-cache"))
    documents = {OPENAPI_PATH.encode(): Document(headers, orjson.dumps(openapi))}
    for path, file in docs_files(title).items():
        pairs = tuple((name.encode(), value.encode()) for name, value in file.headers.items())
        documents[path.encode()] = Document(pairs, file.body)
    return documents
