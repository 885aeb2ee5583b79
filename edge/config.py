"""EdgeConfig: every setting of the edge, its unit, its default. Read from TENFOLD_EDGE_*."""

from dataclasses import dataclass, field

from edge.board import WORKERS_MAX
from edge.codec import CodecOptions
from shared.quota.gcra import Quota
from shared.quota.keys import Level
from shared.quota.plans import DEFAULT_PLAN, Plans

ERROR_PROBLEM, ERROR_GOOGLE = "problem", "google"


@dataclass(frozen=True)
class EdgeConfig:
    """How the edge listens, what it lets in, and how long it waits."""

    listen: str = field(
        default="127.0.0.1:8080",
        metadata={"help": "host and port for REST; port 0 picks a free one"},
    )
    workers: int = field(
        default=1,
        metadata={"help": "processes that serve that address", "min": 1, "max": WORKERS_MAX},
    )
    descriptors: str = field(
        default="",
        metadata={"help": "a FileDescriptorSet to serve instead of Tenfold's own contracts"},
    )
    reflect: bool = field(
        default=False,
        metadata={"help": "whether the upstreams are asked for the contracts to serve"},
    )
    reflect_wait_s: float = field(
        default=30.0,
        metadata={"help": "how long an upstream that is asked may be away", "unit": "s", "min": 0},
    )
    reload_s: float = field(
        default=2.0,
        metadata={
            "help": "how often contracts are looked at for a change, 0 for on SIGHUP only",
            "unit": "s",
            "min": 0,
        },
    )
    reload_breaking: bool = field(
        default=False,
        metadata={"help": "whether changed contracts are served that break clients of the old"},
    )
    allow_anonymous: bool = field(
        default=False,
        metadata={"help": "whether anybody may call methods that say nothing of who may"},
    )
    upstream_tls: bool = field(
        default=False, metadata={"help": "whether the upstreams are reached over TLS"}
    )
    upstream_ca: str = field(
        default="",
        metadata={"help": "PEM file of authorities that vouch for them; empty for public ones"},
    )
    public_url: str = field(
        default="",
        metadata={"help": "scheme and host that clients use; empty takes them from the request"},
    )
    trusted_hops: int = field(
        default=0, metadata={"help": "proxies in front that append to X-Forwarded-For", "min": 0}
    )
    cors_origins: str = field(
        default="", metadata={"help": "origins of web pages that may call, comma-separated"}
    )
    connect: bool = field(
        default=True,
        metadata={"help": "whether RPC paths are answered, in the Connect protocol"},
    )
    json_emit_defaults: bool = field(
        default=True, metadata={"help": "whether answers hold fields at their default"}
    )
    json_proto_names: bool = field(
        default=False, metadata={"help": "whether answers name fields as the contracts do"}
    )
    json_pretty: bool = field(
        default=False, metadata={"help": "whether answers are indented; streams never are"}
    )
    error_format: str = field(
        default=ERROR_PROBLEM,
        metadata={
            "help": "how errors are told: problem documents (RFC 9457), or google (AIP-193)",
            "choices": (ERROR_PROBLEM, ERROR_GOOGLE),
        },
    )
    body_bytes_max: int = field(
        default=1024 * 1024, metadata={"help": "largest JSON body", "unit": "bytes", "min": 1}
    )
    body_timeout_s: float = field(
        default=30.0,
        metadata={
            "help": "for a JSON body; for an upload, its longest pause",
            "unit": "s",
            "min": 0.1,
        },
    )
    line_bytes_max: int = field(
        default=1024 * 1024,
        metadata={"help": "longest line of a client stream", "unit": "bytes", "min": 1},
    )
    stream_bytes_max: int = field(
        default=1024 * 1024 * 1024,
        metadata={"help": "largest body of a client stream", "unit": "bytes", "min": 1},
    )
    request_headers: str = field(
        default="",
        metadata={"help": "headers that become metadata of every method, comma-separated"},
    )
    response_headers: str = field(
        default="",
        metadata={"help": "metadata of every method that become headers, comma-separated"},
    )
    head_timeout_s: float = field(
        default=10.0, metadata={"help": "for a request's headers", "unit": "s", "min": 0.1}
    )
    keep_alive_s: float = field(
        default=75.0,
        metadata={"help": "how long an idle connection is kept", "unit": "s", "min": 0.1},
    )
    requests_max: int = field(
        default=2000, metadata={"help": "requests in flight, streams included", "min": 1}
    )
    upstream_calls_max: int = field(
        default=1000,
        metadata={
            "help": "unary calls under way at one upstream; fewer while it is slow",
            "min": 1,
        },
    )
    method_calls_share: float = field(
        default=0.5,
        metadata={"help": "what one method may have of an upstream's calls", "min": 0.01},
    )
    connections_per_address_max: int = field(
        default=2048, metadata={"help": "open connections from one address", "min": 1}
    )
    streams_per_caller_max: int = field(
        default=100, metadata={"help": "open streams of one caller, over all edges", "min": 1}
    )
    uploads_per_caller_max: int = field(
        default=20, metadata={"help": "open uploads of one caller, over all edges", "min": 1}
    )
    heartbeat_s: float = field(
        default=15.0, metadata={"help": "longest silence in a stream", "unit": "s", "min": 0.1}
    )
    api_points_per_s: float = field(
        default=600.0, metadata={"help": 'refill of the quota "api", per credential', "min": 0.001}
    )
    api_burst_points: int = field(
        default=1200, metadata={"help": 'what the quota "api" holds', "min": 1}
    )
    tenant_points_per_s: float = field(
        default=20_000.0,
        metadata={"help": 'refill of the quota "api", per tenant', "min": 0.001},
    )
    tenant_burst_points: int = field(
        default=40_000, metadata={"help": 'what the quota "api" of a tenant holds', "min": 1}
    )
    payments_points_per_s: float = field(
        default=600.0,
        metadata={"help": 'refill of the quota "payments", per credential', "min": 0.001},
    )
    payments_burst_points: int = field(
        default=1200, metadata={"help": 'what the quota "payments" holds', "min": 1}
    )
    login_points_per_minute: float = field(
        default=60.0,
        metadata={"help": 'refill of the quota "login", per address block', "min": 0.001},
    )
    login_burst_points: int = field(
        default=60, metadata={"help": 'what the quota "login" holds', "min": 1}
    )
    address_points_per_s: float = field(
        default=5000.0, metadata={"help": "requests of one address block to one edge", "min": 1}
    )
    quota_timeout_s: float = field(
        default=0.1,
        metadata={
            "help": "after this long without Valkey's answer each edge spends its share",
            "unit": "s",
            "min": 0.001,
        },
    )
    edge_count: int = field(
        default=1,
        metadata={"help": "edges, at least, that share each quota while Valkey is away", "min": 1},
    )
    revocations_stale_s: float = field(
        default=60.0,
        metadata={
            "help": "after this long without auth's feed no credential is believed",
            "unit": "s",
            "min": 0.1,
        },
    )
    drain_s: float = field(
        default=10.0,
        metadata={"help": "what requests in flight get at a stop", "unit": "s", "min": 0.1},
    )

    @property
    def origins(self) -> frozenset[str]:
        """cors_origins, one by one."""
        return frozenset(filter(None, (part.strip() for part in self.cors_origins.split(","))))

    @property
    def json(self) -> CodecOptions:
        """How answers are written."""
        return CodecOptions(
            emit_defaults=self.json_emit_defaults,
            proto_names=self.json_proto_names,
            pretty=self.json_pretty,
        )

    def plans(self) -> Plans:
        """The limits of every tenant, where no file and no operator says otherwise."""
        api = Quota("api", self.api_burst_points, 1 / self.api_points_per_s)
        tenant = Quota("api", self.tenant_burst_points, 1 / self.tenant_points_per_s)
        payments = Quota("payments", self.payments_burst_points, 1 / self.payments_points_per_s)
        login = Quota("login", self.login_burst_points, 60 / self.login_points_per_minute)
        limits = {
            ("api", Level.CREDENTIAL): api,
            ("api", Level.TENANT): tenant,
            ("payments", Level.CREDENTIAL): payments,
            ("login", Level.ADDRESS): login,
        }
        return Plans({DEFAULT_PLAN: limits})

    def address_quota(self) -> Quota:
        """What one address block may ask of this process: two seconds' worth at once."""
        burst_points = max(1, round(2 * self.address_points_per_s))
        whole = Quota("address", burst_points, 1 / self.address_points_per_s)
        return whole.share(1 / self.workers)
