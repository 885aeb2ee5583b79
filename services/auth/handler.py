"""Comes in by RPC: message -> domain -> message."""

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from uuid import UUID

from google.protobuf.empty_pb2 import Empty
from tenfold.auth.v1 import auth_pb2 as resources
from tenfold.auth.v1 import auth_service_pb2 as auth

from services.auth.domain import (
    API_KEY_LIFE_MAX,
    ApiKey,
    ApiKeyNotFound,
    ApiKeySecret,
    CredentialsRejected,
    EmailAddress,
    KeyKind,
    RefreshTokens,
    Session,
    SessionNotFound,
    SessionState,
    User,
    UserNotFound,
    require_uncommon,
)
from services.auth.events import timestamp_of
from services.auth.passwords import PasswordPool, common_passwords
from services.auth.revocations import CaughtUp, RevocationHub
from services.auth.roles import Roles
from services.auth.store import LAST_ID, AuthStore, NewUser
from services.auth.throttle import LoginThrottle
from services.auth.tokens import SigningKey, access_expires_at, access_token
from shared.clock import Clock
from shared.db.ids import bucket_of, new_id
from shared.db.paging import PageScope, open_page_token, page_size_of, seal_page_token
from shared.errors import InvalidRequest
from shared.identity import PrincipalKind
from shared.rpc.context import Context, once_of

OWN_USER, OWN_SESSION = "me", "current"


class IdentityHandler:
    """tenfold.auth.v1.IdentityService."""

    def __init__(self, *, store: AuthStore, passwords: PasswordPool) -> None:
        self._store = store
        self._passwords = passwords

    async def SignUp(self, request: auth.SignUpRequest, context: Context) -> auth.SignUpReceipt:
        """See the contract."""
        email = EmailAddress.parse(request.email)
        require_uncommon(request.password, email, common_passwords())
        password_hash = await self._passwords.hash(request.password)
        new = NewUser(email, password_hash, request.display_name, request.locale)
        await self._store.sign_up(new, once=once_of(context, request))
        return auth.SignUpReceipt()

    async def GetUser(self, request: auth.GetUserRequest, context: Context) -> resources.User:
        """See the contract."""
        text = request.name.removeprefix("users/")
        if text == OWN_USER:
            text = context.principal.subject
        user_id = _id_or(text, UserNotFound("there is no such user"))
        return user_to_proto(await self._store.get_user(user_id, context.principal))


class SessionHandler:
    """tenfold.auth.v1.SessionService."""

    def __init__(
        self,
        *,
        store: AuthStore,
        passwords: PasswordPool,
        throttle: LoginThrottle,
        revocations: RevocationHub,
        key: SigningKey,
        refresh_tokens: RefreshTokens,
        roles: Roles,
        clock: Clock,
        secret: bytes,
        session_life: timedelta,
    ) -> None:
        self._store = store
        self._passwords = passwords
        self._throttle = throttle
        self._revocations = revocations
        self._key = key
        self._refresh_tokens = refresh_tokens
        self._roles = roles
        self._clock = clock
        self._secret = secret
        self._session_life = session_life

    async def CreateSession(
        self, request: auth.CreateSessionRequest, context: Context
    ) -> auth.CreateSessionResponse:
        """See the contract."""
        tenant, email = context.principal.tenant, EmailAddress.parse(request.email)
        self._throttle.take(tenant, email)
        found = await self._store.find_credentials(tenant, email)
        # Hashed also when there is no such user: the answers look and take alike.
        password_hash = found.password_hash if found else None
        if not await self._passwords.verify(password_hash, request.password) or found is None:
            raise CredentialsRejected
        self._throttle.forget(tenant, email)
        session = await self._store.insert_session(found.user, life=self._session_life)
        return auth.CreateSessionResponse(
            session=self._session_to_proto(session), tokens=self._tokens(session)
        )

    async def RefreshSession(
        self, request: auth.RefreshSessionRequest, context: Context
    ) -> auth.Tokens:
        """See the contract."""
        session_id, counter = self._refresh_tokens.open(request.refresh_token)
        tenant = context.principal.tenant
        return self._tokens(await self._store.refresh_session(session_id, counter, tenant))

    async def ListSessions(
        self, request: auth.ListSessionsRequest, context: Context
    ) -> auth.ListSessionsResponse:
        """See the contract."""
        scope = PageScope.of(context.method, context.principal)
        before = _position(self._secret, scope, request.page_token)
        size = page_size_of(request.page_size)
        sessions = await self._store.list_sessions(context.principal, before=before, limit=size + 1)
        page = sessions[:size]
        return auth.ListSessionsResponse(
            sessions=[self._session_to_proto(session) for session in page],
            next_page_token=_next_token(self._secret, scope, [s.id for s in sessions], size),
        )

    async def RevokeSession(self, request: auth.RevokeSessionRequest, context: Context) -> Empty:
        """See the contract."""
        text = request.name.removeprefix("sessions/")
        if text == OWN_SESSION:
            text = context.principal.credential
        session_id = _id_or(text, SessionNotFound("there is no such session"))
        await self._store.revoke_session(session_id, context.principal)
        return Empty()

    async def WatchRevocations(
        self, _request: auth.WatchRevocationsRequest, _context: Context
    ) -> AsyncIterator[auth.WatchRevocationsResponse]:
        """See the contract."""
        async for item in self._revocations.watch(self._store.list_revocations):
            if isinstance(item, CaughtUp):
                yield auth.WatchRevocationsResponse(caught_up=True)
            else:
                yield auth.WatchRevocationsResponse(
                    credential=str(item.credential), forget_time=timestamp_of(item.forget_at)
                )

    def _tokens(self, session: Session) -> auth.Tokens:
        return auth.Tokens(
            access_token=access_token(self._key, session, self._roles.user),
            access_expire_time=timestamp_of(access_expires_at(session)),
            refresh_token=self._refresh_tokens.seal(session.id, session.counter),
        )

    def _session_to_proto(self, session: Session) -> resources.Session:
        state = resources.Session.STATE_ACTIVE
        if session.state is SessionState.REVOKED:
            state = resources.Session.STATE_REVOKED
        elif not session.is_live(self._clock.now()):
            state = resources.Session.STATE_EXPIRED
        return resources.Session(
            name=f"sessions/{session.id}",
            user=f"users/{session.user_id}",
            state=state,
            create_time=timestamp_of(session.created_at),
            last_refresh_time=timestamp_of(session.rotated_at) if session.counter else None,
            expire_time=timestamp_of(session.expires_at),
        )


class TokenHandler:
    """tenfold.auth.v1.TokenService."""

    def __init__(self, *, key: SigningKey) -> None:
        self._jwks = auth.Jwks(keys=[auth.Jwk(**key.jwk)])

    async def GetJwks(self, _request: auth.GetJwksRequest, _context: Context) -> auth.Jwks:
        """See the contract."""
        return self._jwks


class ApiKeyHandler:
    """tenfold.auth.v1.ApiKeyService."""

    def __init__(self, *, store: AuthStore, roles: Roles, clock: Clock, secret: bytes) -> None:
        self._store = store
        self._roles = roles
        self._clock = clock
        self._secret = secret

    async def CreateApiKey(
        self, request: auth.CreateApiKeyRequest, context: Context
    ) -> auth.CreateApiKeyResponse:
        """See the contract."""
        principal, now = context.principal, self._clock.now()
        expires_at = request.expire_time.ToDatetime(tzinfo=now.tzinfo)
        if not now < expires_at <= now + API_KEY_LIFE_MAX:
            raise InvalidRequest.of_field("expire_time", "must be within a year from now")
        for index, scope in enumerate(request.scopes):
            if not principal.may(scope):
                raise InvalidRequest.of_field(
                    f"scopes[{index}]", "is not among the scopes that you hold"
                )
        kind = KeyKind.ADMIN if principal.kind is PrincipalKind.ADMIN else KeyKind.USER
        secret = ApiKeySecret.make(kind, bucket_of(principal.owner))
        wanted = ApiKey(
            id=new_id(secret.bucket),
            tenant=principal.tenant,
            owner=principal.owner,
            kind=kind,
            display_name=request.display_name,
            scopes=frozenset(request.scopes),
            prefix=secret.prefix,
            last_four=secret.last_four,
            is_revoked=False,
            created_at=now,
            expires_at=expires_at,
        )
        key, is_repeat = await self._store.insert_key(
            wanted, secret, once=once_of(context, request)
        )
        return auth.CreateApiKeyResponse(
            api_key=self._key_to_proto(key),
            secret="" if is_repeat else secret.text,
            secret_unavailable=is_repeat,
        )

    async def ListApiKeys(
        self, request: auth.ListApiKeysRequest, context: Context
    ) -> auth.ListApiKeysResponse:
        """See the contract."""
        scope = PageScope.of(context.method, context.principal)
        before = _position(self._secret, scope, request.page_token)
        size = page_size_of(request.page_size)
        keys = await self._store.list_keys(context.principal, before=before, limit=size + 1)
        return auth.ListApiKeysResponse(
            api_keys=[self._key_to_proto(key) for key in keys[:size]],
            next_page_token=_next_token(self._secret, scope, [key.id for key in keys], size),
        )

    async def RevokeApiKey(
        self, request: auth.RevokeApiKeyRequest, context: Context
    ) -> resources.ApiKey:
        """See the contract."""
        text = request.name.removeprefix("apiKeys/")
        key_id = _id_or(text, ApiKeyNotFound("there is no such key"))
        return self._key_to_proto(await self._store.revoke_key(key_id, context.principal))

    async def ResolveApiKey(
        self, request: auth.ResolveApiKeyRequest, _context: Context
    ) -> auth.ResolveApiKeyResponse:
        """See the contract."""
        key = await self._store.find_key(ApiKeySecret.parse(request.secret))
        if key is None or not key.is_live(self._clock.now()):
            raise CredentialsRejected
        # Cut at each use: an owner who may do less today has keys that may do less today.
        scopes = key.scopes & self._roles.of_key(key.kind)
        return auth.ResolveApiKeyResponse(
            principal_kind=key.kind.value,
            subject=str(key.owner),
            tenant=key.tenant,
            scopes=sorted(scopes),
            credential=str(key.id),
            expire_time=timestamp_of(key.expires_at),
        )

    def _key_to_proto(self, key: ApiKey) -> resources.ApiKey:
        state = resources.ApiKey.STATE_ACTIVE
        if key.is_revoked:
            state = resources.ApiKey.STATE_REVOKED
        elif not key.is_live(self._clock.now()):
            state = resources.ApiKey.STATE_EXPIRED
        return resources.ApiKey(
            name=f"apiKeys/{key.id}",
            display_name=key.display_name,
            scopes=sorted(key.scopes),
            prefix=key.prefix,
            last_four=key.last_four,
            state=state,
            create_time=timestamp_of(key.created_at),
            expire_time=timestamp_of(key.expires_at),
        )


def user_to_proto(user: User) -> resources.User:
    """A user on the wire."""
    active, disabled = resources.User.STATE_ACTIVE, resources.User.STATE_DISABLED
    return resources.User(
        name=f"users/{user.id}",
        email=user.email,
        display_name=user.display_name,
        locale=user.locale,
        state=active if user.is_active else disabled,
        create_time=timestamp_of(user.created_at),
    )


def _id_or(text: str, error: Exception) -> UUID:
    """The id, in its one canonical spelling; anything else names nothing."""
    try:
        parsed = UUID(text)
    except ValueError:
        raise error from None
    if str(parsed) != text:
        raise error
    return parsed


def _position(secret: bytes, scope: PageScope, token: str) -> UUID:
    position = open_page_token(secret, scope, token)
    return UUID(str(position[0])) if position else LAST_ID


def _next_token(secret: bytes, scope: PageScope, ids: Sequence[UUID], size: int) -> str:
    return seal_page_token(secret, scope, ids[size - 1]) if len(ids) > size else ""
