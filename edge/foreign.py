"""A server that is not ours: where its contracts come from, and what of them is served.

Such a server knows nothing of our identities, so nobody can show here who he is. Served are the
methods that by our policy anybody may call and, if the operator allows it, those that say
nothing of who may.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from edge.contracts import ContractError, MethodInfo
from shared.errors import TenfoldError
from shared.rpc.client import Channels, Upstreams
from shared.rpc.policy import Access
from shared.rpc.tls import ClientTls

ALLOW_ANONYMOUS = "--allow-anonymous (TENFOLD_EDGE_ALLOW_ANONYMOUS=true)"
# How many methods a sentence names.
NAMED_MAX = 3
# Public contracts that every language's library brings along, in the version of its release.
_COMMON_FOLDER = "google/"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """What is served of somebody's methods.

    Attributes:
        methods: those that anybody may call.
        left_out: a sentence on each kind of method that is not served; none is usual.
    """

    methods: tuple[MethodInfo, ...]
    left_out: tuple[str, ...]


async def files_of_servers(
    upstreams: Upstreams, tls: ClientTls | None, *, wait_s: float, tell: Tell
) -> tuple[FileDescriptorSet, frozenset[str]]:
    """The contracts that the servers themselves tell.

    Args:
        upstreams: each is asked, and believed only for the packages that go to it.
        tls: how to speak to them; None for plaintext.
        wait_s: how long each may be away.
        tell: takes a sentence about one that is.

    Returns:
        The files, and the full names of the services that are served.

    Raises:
        ContractError: one stays away or does not tell everything, or two disagree.
    """
    files: dict[str, tuple[str, FileDescriptorProto]] = {}
    services: set[str] = set()
    for target in sorted(set(upstreams.targets.values())):
        file_set, told = await _ask(target, tls, wait_s, tell)
        services |= {name for name in told if _target_of(upstreams, name) == target}
        for file in file_set.file:
            first, known = files.setdefault(file.name, (target, file))
            if known != file and not file.name.startswith(_COMMON_FOLDER):
                raise ContractError(f"{first} and {target} tell of two different {file.name}")
    return FileDescriptorSet(file=[file for _, file in files.values()]), frozenset(services)


def opened(methods: Iterable[MethodInfo], *, allow_anonymous: bool) -> Opened:
    """Choose what is served: deny by default.

    Args:
        methods: of the contracts.
        allow_anonymous: whether a method with an http rule and no word on who may call it may
            be called by anybody.

    Raises:
        ContractError: there is no http rule, or nothing is left to serve.
    """
    methods = [method for method in methods if method.is_reachable]
    if not any(method.is_bound for method in methods):
        raise ContractError("no method has a google.api.http rule, so there is nothing to serve")
    served, silent, guarded = [], [], []
    for method in methods:
        if method.policy.access is Access.PUBLIC:
            served.append(method)
        elif method.policy.access is not Access.NOBODY:
            guarded.append(method)
        elif method.is_bound and allow_anonymous:
            policy = replace(method.policy, access=Access.PUBLIC)
            served.append(replace(method, policy=policy))
        elif method.is_bound:
            silent.append(method)
    left_out = []
    if silent:
        what = f"{_count(silent)} without a word on who may call: {ALLOW_ANONYMOUS} lets anybody"
        left_out.append(f"{what} ({_names(silent)})")
    if guarded:
        what = f"{_count(guarded)} that need a credential, which only a mesh can check"
        left_out.append(f"{what} ({_names(guarded)})")
    if not any(method.is_bound for method in served):
        raise ContractError(f"nothing can be served; left out: {'; '.join(left_out)}")
    return Opened(tuple(served), tuple(left_out))


def require_upstreams(methods: Iterable[MethodInfo], upstreams: Upstreams) -> None:
    """Refuse contracts whose server nobody has named.

    Raises:
        ContractError: naming the service.
    """
    for service in sorted({method.service for method in methods}):
        if _target_of(upstreams, service) is None:
            raise ContractError(f"no --upstream (TENFOLD_UPSTREAMS) is given for {service}")


async def _ask(
    target: str, tls: ClientTls | None, wait_s: float, tell: Tell
) -> tuple[FileDescriptorSet, frozenset[str]]:
    # Not needed, and so not loaded, where a file tells.
    from edge.reflection import told_contracts

    def is_away(reason: str) -> None:
        tell(f"{target} does not answer yet ({reason}): asking again for {wait_s:g} s")

    channels = Channels(Upstreams({"*": target}), policies={}, checks_health=False, tls=tls)
    try:
        return await told_contracts(channels.channel(""), wait_s=wait_s, is_away=is_away)
    except ContractError as error:
        raise ContractError(f"{target}: {error}") from error
    finally:
        await channels.close()


def _target_of(upstreams: Upstreams, service: str) -> str | None:
    try:
        return upstreams.target_of(service)
    except TenfoldError:
        return None


def _count(methods: list[MethodInfo]) -> str:
    return f"{len(methods)} method{'s' if len(methods) > 1 else ''}"


def _names(methods: list[MethodInfo]) -> str:
    names = [method.full_name[1:] for method in methods[:NAMED_MAX]]
    return ", ".join(names) + (", …" if len(methods) > NAMED_MAX else "")
