"""The contract's policy options, read once from descriptors.

A method that the contracts do not name does not exist; one without a policy may be called by
nobody.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.resources import files

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorSet
from google.protobuf.duration_pb2 import Duration
from tenfold.options.v1 import policy_pb2

# Deadlines where the contract says nothing (spec 0.6).
UNARY_DEADLINE_DEFAULT_S, UNARY_DEADLINE_MAX_S = 10.0, 60.0
STREAM_DEADLINE_DEFAULT_S = STREAM_DEADLINE_MAX_S = 3600.0

REQUEST_ID_FIELD = "request_id"
_ONE_STRING = (
    (FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.LABEL_OPTIONAL),
    (FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.LABEL_REQUIRED),
)


class Access(IntEnum):
    """Who may call; see tenfold.options.v1.Access."""

    NOBODY = policy_pb2.ACCESS_UNSPECIFIED
    PUBLIC = policy_pb2.ACCESS_PUBLIC
    USER = policy_pb2.ACCESS_USER
    SERVICE = policy_pb2.ACCESS_SERVICE
    ADMIN = policy_pb2.ACCESS_ADMIN


class Idempotency(IntEnum):
    """What repeating a request does; see tenfold.options.v1.Idempotency."""

    UNSPECIFIED = policy_pb2.IDEMPOTENCY_UNSPECIFIED
    SAFE = policy_pb2.IDEMPOTENCY_SAFE
    REPEATABLE = policy_pb2.IDEMPOTENCY_REPEATABLE
    OPTIONAL = policy_pb2.IDEMPOTENCY_OPTIONAL
    KEYED = policy_pb2.IDEMPOTENCY_KEYED
    ONCE = policy_pb2.IDEMPOTENCY_ONCE


@dataclass(frozen=True)
class MethodPolicy:
    """What the contract says of one method.

    Attributes:
        path: "/tenfold.ledger.v1.LedgerService/GetAccount".
        access: who may call.
        scopes: all are needed.
        idempotency: what repeating does.
        deadline_default_s, deadline_max_s: seconds, above 0.
        retry_safe: a client may retry on UNAVAILABLE.
        audit: each call leaves an audit entry.
        causal_reads: replicas may answer its reads; of SAFE methods alone.
        client_streaming, server_streaming: the method's shape.
        has_request_id: the request message has a string field request_id.
        principal_fields: request field -> the scope that frees it from naming the caller.
    """

    path: str
    access: Access = Access.NOBODY
    scopes: frozenset[str] = frozenset()
    idempotency: Idempotency = Idempotency.UNSPECIFIED
    deadline_default_s: float = UNARY_DEADLINE_DEFAULT_S
    deadline_max_s: float = UNARY_DEADLINE_MAX_S
    retry_safe: bool = False
    audit: bool = False
    causal_reads: bool = False
    client_streaming: bool = False
    server_streaming: bool = False
    has_request_id: bool = False
    principal_fields: tuple[tuple[str, str], ...] = ()

    @property
    def service(self) -> str:
        """The full name of its service: "tenfold.ledger.v1.LedgerService"."""
        return self.path[1:].partition("/")[0]

    @property
    def is_stream(self) -> bool:
        """Whether either side is a stream."""
        return self.client_streaming or self.server_streaming


@cache
def contracts() -> FileDescriptorSet:
    """The descriptors of all our contracts."""
    return FileDescriptorSet.FromString(files("tenfold").joinpath("contracts.binpb").read_bytes())


@cache
def contract_policies() -> Mapping[str, MethodPolicy]:
    """The policies of all our contracts, by path."""
    return load_policies(contracts())


def load_policies(file_set: FileDescriptorSet) -> Mapping[str, MethodPolicy]:
    """The policy of every method, by path."""
    messages = dict(_messages(file_set))
    policies = {}
    for file in file_set.file:
        for service in file.service:
            full_name = f"{file.package}.{service.name}" if file.package else service.name
            for method in service.method:
                path = f"/{full_name}/{method.name}"
                shape = method.client_streaming, method.server_streaming
                options = method.options.Extensions[policy_pb2.method]
                policies[path] = _policy(path, shape, options, messages.get(method.input_type))
    return policies


def _messages(file_set: FileDescriptorSet) -> Iterator[tuple[str, DescriptorProto]]:
    for file in file_set.file:
        prefix = f".{file.package}" if file.package else ""
        for message in file.message_type:
            yield f"{prefix}.{message.name}", message


def _policy(
    path: str,
    shape: tuple[bool, bool],
    options: policy_pb2.MethodPolicy,
    request: DescriptorProto | None,
) -> MethodPolicy:
    is_stream = any(shape)
    default_s = STREAM_DEADLINE_DEFAULT_S if is_stream else UNARY_DEADLINE_DEFAULT_S
    max_s = STREAM_DEADLINE_MAX_S if is_stream else UNARY_DEADLINE_MAX_S
    longest_s = _seconds(options.deadline_max) or max_s
    idempotency = Idempotency(options.idempotency)
    if options.causal_reads and idempotency is not Idempotency.SAFE:
        raise ValueError(f"{path}: causal_reads is for methods that are SAFE: it changes data")
    return MethodPolicy(
        path=path,
        access=Access(options.access),
        scopes=frozenset(options.scopes),
        idempotency=idempotency,
        deadline_default_s=min(_seconds(options.deadline_default) or default_s, longest_s),
        deadline_max_s=longest_s,
        retry_safe=options.retry_safe,
        audit=options.audit,
        causal_reads=options.causal_reads,
        client_streaming=shape[0],
        server_streaming=shape[1],
        has_request_id=_has_request_id(request),
        principal_fields=_principal_fields(request),
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _has_request_id(request: DescriptorProto | None) -> bool:
    if request is None:
        return False
    named = [field for field in request.field if field.name == REQUEST_ID_FIELD]
    shapes = [(field.type, field.label) for field in named]
    return bool(shapes) and shapes[0] in _ONE_STRING


def _principal_fields(request: DescriptorProto | None) -> tuple[tuple[str, str], ...]:
    if request is None:
        return ()
    named = ((f.name, f.options.Extensions[policy_pb2.field]) for f in request.field)
    return tuple(
        (name, policy.principal_unless_scope)
        for name, policy in named
        if policy.principal_unless_scope
    )
