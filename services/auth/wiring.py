"""The only place that chooses implementations."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from tenfold.auth.v1 import auth_service_pb2_grpc as auth_grpc

from services.auth.config import AuthConfig
from services.auth.domain import ApiKey, ApiKeySecret, CredentialsRejected, KeyKind, RefreshTokens
from services.auth.handler import ApiKeyHandler, IdentityHandler, SessionHandler, TokenHandler
from services.auth.passwords import PasswordPool
from services.auth.revocations import RevocationHub
from services.auth.roles import Roles
from services.auth.store import SqlAuthStore
from services.auth.throttle import LoginThrottle
from services.auth.tokens import SigningKey, write_private_once
from shared.bus.outbox import run_relay
from shared.config import ConfigError, load
from shared.db.engines import ShardSettings, open_shards
from shared.db.housekeeping import run_housekeeping
from shared.db.ids import new_id, random_bucket
from shared.identity import DEFAULT_TENANT
from shared.lifecycle import Registration, Service
from shared.runtime import Runtime

NAME = "auth"
MIGRATIONS = Path(__file__).with_name("migrations")
SHARD_COUNT = 4
ADMIN_KEY_FILE = "admin.key"
ADMIN_KEY_LIFE = timedelta(days=100 * 365)


def shard_settings(folder: Path, environ: Mapping[str, str]) -> ShardSettings:
    """What its shards are made of; SQLite keeps them in the service's folder.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
    """
    config = load(AuthConfig, "TENFOLD_AUTH_", environ)
    return ShardSettings(
        NAME,
        config.database,
        folder / "shards",
        MIGRATIONS,
        shard_count=SHARD_COUNT,
    )


@asynccontextmanager
async def open_service(runtime: Runtime) -> AsyncIterator[Service]:
    """Open the auth service.

    Raises:
        ConfigError: a setting or a key file is wrong.
        DatabaseRefused: a database file cannot be used.
    """
    config = load(AuthConfig, "TENFOLD_AUTH_", runtime.environ)
    folder, clock = runtime.folder_of(NAME), runtime.clock
    key = await asyncio.to_thread(_signing_key, folder / "signing_key.pem")
    roles = Roles.of_contracts()
    hub = RevocationHub(clock, runtime.revocations)
    passwords = await asyncio.to_thread(
        partial(
            PasswordPool, threads=config.hashing_threads, waiting_max=config.hashing_waiting_max
        )
    )
    try:
        settings = shard_settings(folder, runtime.environ)
        async with open_shards(settings, secret=runtime.secret, clock=clock) as shards:
            store = SqlAuthStore(shards, clock, runtime.secret, hub)
            await _ensure_admin_key(runtime, store, roles)
            sessions = SessionHandler(
                store=store,
                passwords=passwords,
                throttle=LoginThrottle(clock),
                revocations=hub,
                key=key,
                refresh_tokens=RefreshTokens.of_secret(runtime.secret),
                roles=roles,
                clock=clock,
                secret=runtime.secret,
                session_life=timedelta(seconds=config.session_life_s),
            )
            identities = IdentityHandler(store=store, passwords=passwords)
            keys = ApiKeyHandler(store=store, roles=roles, clock=clock, secret=runtime.secret)
            yield Service(
                NAME,
                registrations=[
                    Registration(auth_grpc.add_IdentityServiceServicer_to_server, identities),
                    Registration(auth_grpc.add_SessionServiceServicer_to_server, sessions),
                    Registration(
                        auth_grpc.add_TokenServiceServicer_to_server, TokenHandler(key=key)
                    ),
                    Registration(auth_grpc.add_ApiKeyServiceServicer_to_server, keys),
                ],
                loops=[
                    partial(run_relay, shards, runtime.bus, service=NAME, clock=clock),
                    partial(run_housekeeping, shards, clock=clock),
                    partial(hub.run, store.poll_revocations),
                    store.run_confirmations,
                    store.run_forgetting,
                ],
            )
    finally:
        passwords.close()


def _signing_key(path: Path) -> SigningKey:
    try:
        return SigningKey.load(path)
    except ValueError as error:
        raise ConfigError(f"The signing key cannot be used: {error}.") from error


async def _ensure_admin_key(runtime: Runtime, store: SqlAuthStore, roles: Roles) -> None:
    """The file first, then the database, at every start: no crash can part the two."""
    path = runtime.config.data / ADMIN_KEY_FILE
    fresh = ApiKeySecret.make(KeyKind.ADMIN, random_bucket())
    written = await asyncio.to_thread(write_private_once, path, f"{fresh.text}\n".encode())
    try:
        secret = ApiKeySecret.parse(written.decode().strip())
    except (CredentialsRejected, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} holds no admin key; remove it to get a new one.") from error
    now = runtime.clock.now()
    key = ApiKey(
        id=new_id(secret.bucket),
        tenant=DEFAULT_TENANT,
        owner=new_id(secret.bucket),
        kind=secret.kind,
        display_name="The operator's key of the first start",
        scopes=roles.admin,
        prefix=secret.prefix,
        last_four=secret.last_four,
        is_revoked=False,
        created_at=now,
        expires_at=now + ADMIN_KEY_LIFE,
    )
    await store.ensure_admin_key(secret, key)
