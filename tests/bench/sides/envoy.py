"""The peer of `bare` and `full`: Envoy with grpc_json_transcoder, configured as its manual says.

One worker (--concurrency 1), HTTP/1.1 in, one HTTP/2 cluster behind, the same descriptor set as
ours. It makes a request id for each request, as ours does, and keeps its defaults otherwise:
statistics are counted, nothing is logged per request, no credential is looked at and no quota.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

_TYPES = "type.googleapis.com/envoy.extensions"


def command(
    folder: Path, binary: Path, *, descriptors: Path, port: int, upstream: int
) -> list[str]:
    """The command of an Envoy that fronts the upstream; its configuration goes into the folder."""
    config = folder / f"envoy-{port}.json"
    config.write_text(json.dumps(_config(descriptors, port, upstream), indent=2))
    arguments = ["-c", str(config), "--concurrency", "1", "--log-level", "error"]
    # Without this it would take part in hot restarts, through memory shared by all Envoys here.
    return [str(binary), *arguments, "--disable-hot-restart"]


def version(binary: Path) -> str:
    """As "1.40.0"."""
    told = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    # "<program>  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL"
    return told.rpartition("version: ")[2].split("/")[1]


def _config(descriptors: Path, port: int, upstream: int) -> dict[str, Any]:
    return {
        "static_resources": {
            "listeners": [{"address": _address(port), "filter_chains": [_chain(descriptors)]}],
            "clusters": [_cluster(upstream)],
        }
    }


def _chain(descriptors: Path) -> dict[str, Any]:
    transcoder = {
        "@type": f"{_TYPES}.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor": str(descriptors),
        "services": ["shop.v1.OrderService"],
        "convert_grpc_status": True,
    }
    router = {"@type": f"{_TYPES}.filters.http.router.v3.Router"}
    manager = {
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "shop",
        "codec_type": "HTTP1",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "shop",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "shop"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.grpc_json_transcoder", "typed_config": transcoder},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {"filters": filters}


def _cluster(upstream: int) -> dict[str, Any]:
    http2 = {
        "@type": f"{_TYPES}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    endpoint = {"endpoint": {"address": _address(upstream)}}
    return {
        "name": "shop",
        "type": "STATIC",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
        },
        "load_assignment": {
            "cluster_name": "shop",
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
