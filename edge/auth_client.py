"""What the edge asks of auth, as the service "edge", and what it hears from it."""

from collections.abc import Callable
from typing import Any

from google.protobuf.json_format import MessageToDict
from tenfold.auth.v1 import auth_service_pb2, auth_service_pb2_grpc

from edge.auth import ResolvedKey
from edge.upstream import ChannelSource
from shared.clock import Clock
from shared.identity import Principal, PrincipalKind, RevocationList

# Inside the mesh; a request that needs an answer from auth must not wait longer for it.
CALL_TIMEOUT_S = 2.0

TOKEN_SERVICE = "tenfold.auth.v1.TokenService"  # noqa: S105 - a name, not a secret
KEY_SERVICE = "tenfold.auth.v1.ApiKeyService"


class RpcAuthClient:
    """See auth.AuthClient.

    Args:
        channels: where auth is; they sign who we are.
    """

    def __init__(self, channels: ChannelSource) -> None:
        self._channels = channels

    async def jwks(self) -> list[dict[str, Any]]:
        """See AuthClient.jwks."""
        stub = auth_service_pb2_grpc.TokenServiceStub(self._channels.channel(TOKEN_SERVICE))
        answer = await stub.GetJwks(auth_service_pb2.GetJwksRequest(), timeout=CALL_TIMEOUT_S)
        return [MessageToDict(key) for key in answer.keys]

    async def resolve_api_key(self, secret: str) -> ResolvedKey:
        """See AuthClient.resolve_api_key."""
        stub = auth_service_pb2_grpc.ApiKeyServiceStub(self._channels.channel(KEY_SERVICE))
        request = auth_service_pb2.ResolveApiKeyRequest(secret=secret)
        answer = await stub.ResolveApiKey(request, timeout=CALL_TIMEOUT_S)
        principal = Principal(
            PrincipalKind(answer.principal_kind),
            answer.subject,
            answer.tenant,
            frozenset(answer.scopes),
            answer.credential,
        )
        return ResolvedKey(principal, answer.expire_time.ToMicroseconds() / 1e6)


class EndingRevocations(RevocationList):
    """A RevocationList that also ends what a revoked credential has open.

    Args:
        on_revoked: told each credential.
        clock: where time comes from.
    """

    def __init__(self, on_revoked: Callable[[str], None], *, clock: Clock) -> None:
        super().__init__(clock=clock)
        self._on_revoked = on_revoked

    def revoke(self, credential: str, forget_at_s: float) -> None:
        """See RevocationList.revoke."""
        super().revoke(credential, forget_at_s)
        self._on_revoked(credential)
