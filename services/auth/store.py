"""Users, sessions, keys and revocations in their users' buckets.

Two statements have no owner to filter by, because the owner is what they find: of a session
by its refresh token, and of a key by its secret. Both name a row by a secret that we made.
"""

import asyncio
import hmac
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from services.auth import events
from services.auth.domain import (
    ApiKey,
    ApiKeyNotFound,
    ApiKeySecret,
    CredentialsRejected,
    EmailAddress,
    KeyKind,
    RefreshTokenReused,
    Revocation,
    Rotation,
    Session,
    SessionNotFound,
    SessionState,
    User,
    UserNotFound,
)
from shared.clock import Clock, of_us, to_us
from shared.crashpoints import CrashPoint
from shared.db.errors import UniqueViolation
from shared.db.ids import bucket_of, new_id
from shared.db.once import keyed_id_bucket
from shared.db.port import Once, Row, Shards, Transaction
from shared.db.scatter import scatter
from shared.db.todo import Todo, add_todo, finish_todo, list_due_todos, postpone_todo
from shared.db.uniq import (
    UniqueTaken,
    UniqueValue,
    confirm_unique,
    fill_id_slot,
    find_unique,
    reserve_unique,
)
from shared.errors import TenfoldError, Unavailable
from shared.identity import ACCESS_TOKEN_LIFE_S, LEEWAY_S, Principal, PrincipalKind

EMAIL_CLAIMED = CrashPoint("auth.email_claimed", "the e-mail is reserved, there is no user yet")
USER_CREATED = CrashPoint("auth.user_created", "the user is there, its e-mail not confirmed")

EMAIL_KIND = "email"
CONFIRM_EMAIL = "confirm_email"
CONFIRM_AFTER_US = 2_000_000
SWEEP_PERIOD_S = 1.0
# How long a sign-up waits for another of the same address to be decided.
UNDECIDED_TRIES, UNDECIDED_WAIT_S = 60, 0.05
# A revocation outlives every token of its credential: the access token, and the identity
# token that was made of it in its last second.
REVOCATION_LIFE = timedelta(seconds=ACCESS_TOKEN_LIFE_S + 4 * LEEWAY_S)
REVOCATION_SWEEP_PERIOD_S = 300.0
LAST_ID = UUID(int=2**128 - 1)
NOBODY = UUID(int=0)

INSERT_USER = """
INSERT INTO app_user (bucket, id, tenant, owner, email, password_hash, display_name, locale,
  role, state, created_us)
VALUES ($1, $2, $3, $2, $4, $5, $6, $7, 'user', 'ACTIVE', $8)
"""
USER_COLUMNS = "id, tenant, email, password_hash, display_name, locale, state, created_us"
SELECT_USER = f"""
SELECT {USER_COLUMNS} FROM app_user
WHERE bucket = $1 AND id = $2 AND tenant = $3
"""  # noqa: S608 -- columns of ours
SELECT_CLAIM = """
SELECT claim_id FROM uniq
WHERE bucket = $1 AND tenant = $2 AND kind = $3 AND value = $4 AND state = 'RESERVED'
"""

INSERT_SESSION = """
INSERT INTO session (bucket, id, tenant, owner, state, counter, rotated_us, created_us, expires_us)
VALUES ($1, $2, $3, $4, 'ACTIVE', 0, $5, $5, $6)
"""
SESSION_COLUMNS = "id, tenant, owner, state, counter, rotated_us, created_us, expires_us"
SELECT_SESSION = f"""
SELECT {SESSION_COLUMNS} FROM session
WHERE bucket = $1 AND id = $2 AND tenant = $3
FOR UPDATE
"""  # noqa: S608
UPDATE_SESSION = """
UPDATE session SET state = $4, counter = $5, rotated_us = $6
WHERE bucket = $1 AND id = $2 AND tenant = $3
"""
LIST_SESSIONS = f"""
SELECT {SESSION_COLUMNS} FROM session
WHERE bucket = $1 AND tenant = $2 AND owner = $3 AND id < $4
ORDER BY id DESC LIMIT $5
"""  # noqa: S608

INSERT_REVOCATION = """
INSERT INTO revocation (bucket, id, tenant, owner, created_us, forget_us)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (bucket, id) DO NOTHING
"""
RECENT_REVOCATIONS = """
SELECT id, forget_us FROM revocation
/* any tenant: every service refuses them all */
WHERE created_us >= $1 AND tenfold_owned(bucket)
"""
DELETE_REVOCATIONS = """
DELETE FROM revocation
/* any tenant: the sweeper serves them all */
WHERE forget_us < $1 AND tenfold_writable(bucket)
"""

INSERT_SERVICE_ACCOUNT = """
INSERT INTO service_account (bucket, id, tenant, owner, display_name, created_us)
VALUES ($1, $2, $3, $2, $4, $5)
"""
INSERT_KEY = """
INSERT INTO api_key (bucket, id, tenant, owner, kind, display_name, scopes, prefix, last_four,
  secret_hash, state, created_us, expires_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 'ACTIVE', $11, $12)
"""
KEY_COLUMNS = (
    "id, tenant, owner, kind, display_name, scopes, prefix, last_four, state,"
    " created_us, expires_us"
)
SELECT_KEY = f"""
SELECT {KEY_COLUMNS} FROM api_key
WHERE bucket = $1 AND id = $2 AND tenant = $3 AND owner = $4
FOR UPDATE
"""  # noqa: S608
SELECT_KEY_BY_SECRET = f"""
SELECT {KEY_COLUMNS} FROM api_key
WHERE bucket = $1 AND secret_hash = $2
"""  # noqa: S608
REVOKE_KEY = """
UPDATE api_key SET state = 'REVOKED'
WHERE bucket = $1 AND id = $2 AND tenant = $3 AND owner = $4
"""
UPDATE_KEY_SCOPES = """
UPDATE api_key SET scopes = $5
WHERE bucket = $1 AND id = $2 AND tenant = $3 AND owner = $4 AND scopes <> $5
"""
LIST_KEYS = f"""
SELECT {KEY_COLUMNS} FROM api_key
WHERE bucket = $1 AND tenant = $2 AND owner = $3 AND id < $4
ORDER BY id DESC LIMIT $5
"""  # noqa: S608


@dataclass(frozen=True)
class NewUser:
    """Who signs up.

    Attributes:
        password_hash: never the password.
    """

    email: EmailAddress
    password_hash: str
    display_name: str
    locale: str


@dataclass(frozen=True)
class Credentials:
    """A user and the hash to compare with."""

    user: User
    password_hash: str


class AuthStore(Protocol):
    """What auth keeps."""

    async def sign_up(self, new: NewUser, *, once: Once) -> None:
        """Make a user, unless the e-mail is taken: the caller cannot tell.

        Raises:
            Unavailable: another sign-up of the same address is not decided yet.
        """
        ...

    async def find_credentials(self, tenant: str, email: EmailAddress) -> Credentials | None:
        """The user of an e-mail, or None."""
        ...

    async def get_user(self, user_id: UUID, principal: Principal) -> User:
        """A user that this caller may see.

        Raises:
            UserNotFound: there is none of that id for this caller.
        """
        ...

    async def insert_session(self, user: User, *, life: timedelta) -> Session:
        """Start a session."""
        ...

    async def refresh_session(self, session_id: UUID, counter: int, tenant: str) -> Session:
        """Trade a refresh token; the session's counter names the new one.

        Raises:
            CredentialsRejected: the session has ended, or there is none.
            RefreshTokenReused: the token was used before; its session has ended by this.
        """
        ...

    async def revoke_session(self, session_id: UUID, principal: Principal) -> None:
        """End a session; ending it again is harmless.

        Raises:
            SessionNotFound: the caller has none of that id.
        """
        ...

    async def list_sessions(
        self, principal: Principal, *, before: UUID, limit: int
    ) -> Sequence[Session]:
        """The caller's sessions with an id below `before`, newest first."""
        ...

    async def insert_key(
        self, key: ApiKey, secret: ApiKeySecret, *, once: Once
    ) -> tuple[ApiKey, bool]:
        """Keep a new key; returns the key and whether it is the answer to an earlier request."""
        ...

    async def revoke_key(self, key_id: UUID, principal: Principal) -> ApiKey:
        """End a key; ending it again is harmless.

        Raises:
            ApiKeyNotFound: the caller has none of that id.
        """
        ...

    async def list_keys(
        self, principal: Principal, *, before: UUID, limit: int
    ) -> Sequence[ApiKey]:
        """The caller's keys with an id below `before`, newest first."""
        ...

    async def find_key(self, secret: ApiKeySecret) -> ApiKey | None:
        """The key of a secret whose owner is still active, or None."""
        ...

    async def list_revocations(self, since: datetime) -> Sequence[Revocation]:
        """What has been revoked since then, on every shard: complete, or an error."""
        ...

    async def poll_revocations(self, since: datetime) -> Sequence[Revocation]:
        """As list_revocations, but cheap: a bucket that moves meanwhile may be missing."""
        ...


class RevocationSink(Protocol):
    """Who must hear of a revocation as soon as it is committed."""

    def publish(self, revocation: Revocation) -> None:
        """Tell every watcher."""
        ...


class SqlAuthStore:
    """See AuthStore.

    Args:
        shards: of this service.
        clock: dates what is written.
        secret: keys the ids of keyed sign-ups.
        revocations: hears of what is revoked.
    """

    def __init__(
        self, shards: Shards, clock: Clock, secret: bytes, revocations: RevocationSink
    ) -> None:
        self._shards = shards
        self._clock = clock
        self._secret = secret
        self._revocations = revocations

    async def sign_up(self, new: NewUser, *, once: Once) -> None:
        """See AuthStore.sign_up."""
        tenant = once.principal.tenant
        email = UniqueValue(tenant, EMAIL_KIND, new.email.canonical)
        user_id = await self._id_of_sign_up(email, once)
        is_ours = await self._reserve(email, user_id)
        EMAIL_CLAIMED.visit()
        # A taken address takes the same steps, so that it takes the same time.
        user = User(
            user_id, tenant, new.email.text, new.display_name, new.locale, True, self._clock.now()
        )
        confirm = Todo(bucket_of(user_id), user_id, CONFIRM_EMAIL, _confirm_payload(email))
        async with self._shards.holding(user_id).transaction(once) as tx:
            if not tx.answered:
                if is_ours:
                    await self._create(tx, user, new.password_hash, confirm)
                await tx.answer_with(b"")
        USER_CREATED.visit()
        await self._confirm(email, user_id)

    async def _id_of_sign_up(self, email: UniqueValue, once: Once) -> UUID:
        """A new id; the same one when this request has reserved the address before.

        The key decides the bucket and the id's tail, so a retry recognises its own reservation
        after a crash, and need not wait for it to expire.
        """
        made = new_id(keyed_id_bucket(once, self._secret))
        user_id = UUID(int=made.int >> 62 << 62 | _tail(self._secret, once))
        claim = await self._shards.bucket(email.bucket).fetch_one(SELECT_CLAIM, *email.key)
        if claim is None:
            return user_id
        claimed: UUID = claim["claim_id"]
        is_own = _fixed_bits(claimed) == _fixed_bits(user_id)
        return claimed if is_own else user_id

    async def _reserve(self, email: UniqueValue, user_id: UUID) -> bool:
        """Whether the address is ours; waits for another sign-up to be decided."""
        for _ in range(UNDECIDED_TRIES):
            try:
                await reserve_unique(self._shards, email, user_id, now_us=to_us(self._clock.now()))
            except UniqueTaken as taken:
                if taken.owner_id is not None:
                    return False
                await asyncio.sleep(UNDECIDED_WAIT_S)
            else:
                return True
        raise Unavailable("another request for this address is not decided yet", retry_after_s=30)

    async def _create(self, tx: Transaction, user: User, password_hash: str, confirm: Todo) -> None:
        now_us = to_us(user.created_at)
        await fill_id_slot(tx, user.id)
        await tx.execute(
            INSERT_USER,
            *(tx.bucket, user.id, user.tenant, user.email, password_hash),
            *(user.display_name, user.locale, now_us),
        )
        await add_todo(tx, confirm, next_at_us=now_us + CONFIRM_AFTER_US)
        await tx.append_outbox(events.user_registered(user))

    async def _confirm(self, email: UniqueValue, user_id: UUID) -> None:
        async with self._shards.bucket(email.bucket).transaction() as tx:
            await confirm_unique(tx, email, user_id)

    async def run_confirmations(self) -> None:
        """Finish sign-ups whose process died between create and confirm, until cancelled."""
        while True:
            for shard in self._shards.all():
                # A shard that is down or busy has its turn again; the loop must not end.
                with suppress(TenfoldError):
                    now_us = to_us(self._clock.now())
                    for todo in await list_due_todos(shard, CONFIRM_EMAIL, now_us=now_us):
                        await self._take(todo)
            await asyncio.sleep(SWEEP_PERIOD_S)

    async def _take(self, todo: Todo) -> None:
        tenant, _, value = todo.payload.decode().partition("\0")
        try:
            await self._confirm(UniqueValue(tenant, EMAIL_KIND, value), todo.id)
        except TenfoldError:
            async with self._shards.holding(todo.id).transaction() as tx:
                await postpone_todo(tx, todo, now_us=to_us(self._clock.now()))
            return
        async with self._shards.holding(todo.id).transaction() as tx:
            await finish_todo(tx, todo)

    async def find_credentials(self, tenant: str, email: EmailAddress) -> Credentials | None:
        """See AuthStore.find_credentials."""
        value = UniqueValue(tenant, EMAIL_KIND, email.canonical)
        user_id = await find_unique(self._shards.bucket(value.bucket), value)
        # Looked up also when there is none, so that the answer takes as long.
        row = await self._user_row(user_id or NOBODY, tenant)
        if row is None or row["state"] != "ACTIVE":
            return None
        return Credentials(_user_of_row(row), row["password_hash"])

    async def get_user(self, user_id: UUID, principal: Principal) -> User:
        """See AuthStore.get_user."""
        is_own = principal.subject == str(user_id)
        if not is_own and principal.kind is not PrincipalKind.ADMIN:
            raise UserNotFound("there is no such user")
        row = await self._user_row(user_id, principal.tenant)
        if row is None:
            raise UserNotFound("there is no such user")
        return _user_of_row(row)

    async def _user_row(self, user_id: UUID, tenant: str) -> Row | None:
        bucket = self._shards.holding(user_id)
        return await bucket.fetch_one(SELECT_USER, bucket_of(user_id), user_id, tenant)

    async def insert_session(self, user: User, *, life: timedelta) -> Session:
        """See AuthStore.insert_session."""
        now = self._clock.now()
        session = Session(
            new_id(bucket_of(user.id)),
            user.tenant,
            user.id,
            SessionState.ACTIVE,
            counter=0,
            rotated_at=now,
            created_at=now,
            expires_at=now + life,
        )
        async with self._shards.holding(user.id).transaction() as tx:
            await tx.execute(
                INSERT_SESSION,
                *(tx.bucket, session.id, session.tenant, session.user_id),
                *(to_us(now), to_us(session.expires_at)),
            )
        return session

    async def refresh_session(self, session_id: UUID, counter: int, tenant: str) -> Session:
        """See AuthStore.refresh_session."""
        now = self._clock.now()
        async with self._shards.holding(session_id).transaction() as tx:
            session = await _session(tx, session_id, tenant)
            if session is None or not await _is_active(tx, session):
                raise CredentialsRejected
            rotation, changed = session.refresh(counter, now=now)
            if rotation is Rotation.ROTATED:
                await _update(tx, changed)
            elif rotation is Rotation.REUSED:
                revocation = await _end(tx, changed, now)
        # Raised after the commit: the end of a misused session must last.
        if rotation is Rotation.REUSED:
            self._revocations.publish(revocation)
            raise RefreshTokenReused
        if rotation is Rotation.REFUSED:
            raise CredentialsRejected
        return changed

    async def revoke_session(self, session_id: UUID, principal: Principal) -> None:
        """See AuthStore.revoke_session."""
        now = self._clock.now()
        async with self._shards.holding(session_id).transaction() as tx:
            session = await _session(tx, session_id, principal.tenant)
            if session is None or str(session.user_id) != principal.subject:
                raise SessionNotFound("there is no such session")
            if session.state is SessionState.REVOKED:
                return
            revocation = await _end(tx, session, now)
        self._revocations.publish(revocation)

    async def list_sessions(
        self, principal: Principal, *, before: UUID, limit: int
    ) -> Sequence[Session]:
        """See AuthStore.list_sessions."""
        rows = await self._own_rows(LIST_SESSIONS, principal, before, limit)
        return [_session_of_row(row) for row in rows]

    async def _own_rows(
        self, sql: str, principal: Principal, before: UUID, limit: int
    ) -> Sequence[Row]:
        tenant, owner = principal.scope
        bucket = self._shards.holding(owner)
        return await bucket.fetch_all(sql, bucket_of(owner), tenant, owner, before, limit)

    async def insert_key(
        self, key: ApiKey, secret: ApiKeySecret, *, once: Once
    ) -> tuple[ApiKey, bool]:
        """See AuthStore.insert_key."""
        async with self._shards.holding(key.owner).transaction(once) as tx:
            if tx.answered:
                row = await tx.fetch_one(
                    SELECT_KEY, tx.bucket, UUID(bytes=tx.answer), key.tenant, key.owner
                )
                assert row is not None
                return _key_of_row(row), True
            await _insert_key(tx, key, secret)
            await tx.answer_with(key.id.bytes)
        return key, False

    async def ensure_admin_key(self, secret: ApiKeySecret, key: ApiKey) -> None:
        """Make the operator's key known, with a service account to own it; safe to repeat."""
        try:
            await self._ensure_admin_key(secret, key)
        except UniqueViolation:  # another process that starts just now was faster: it is there
            await self._ensure_admin_key(secret, key)

    async def _ensure_admin_key(self, secret: ApiKeySecret, key: ApiKey) -> None:
        async with self._shards.bucket(secret.bucket).transaction() as tx:
            row = await tx.fetch_one(SELECT_KEY_BY_SECRET, tx.bucket, secret.hash)
            if row is not None:
                # A newer version may know scopes that the first start did not.
                scopes = " ".join(sorted(key.scopes))
                owner = row["tenant"], row["owner"]
                await tx.execute(UPDATE_KEY_SCOPES, tx.bucket, row["id"], *owner, scopes)
                return
            now_us = to_us(key.created_at)
            await tx.execute(
                INSERT_SERVICE_ACCOUNT,
                *(tx.bucket, key.owner, key.tenant, key.display_name, now_us),
            )
            await _insert_key(tx, key, secret)

    async def revoke_key(self, key_id: UUID, principal: Principal) -> ApiKey:
        """See AuthStore.revoke_key."""
        now, (tenant, owner) = self._clock.now(), principal.scope
        async with self._shards.holding(key_id).transaction() as tx:
            row = await tx.fetch_one(SELECT_KEY, tx.bucket, key_id, tenant, owner)
            if row is None:
                raise ApiKeyNotFound("there is no such key")
            if row["state"] == "REVOKED":
                return _key_of_row(row)
            await tx.execute(REVOKE_KEY, tx.bucket, key_id, tenant, owner)
            revocation = await _remember(tx, key_id, tenant, owner, now)
            row = await tx.fetch_one(SELECT_KEY, tx.bucket, key_id, tenant, owner)
        assert row is not None
        self._revocations.publish(revocation)
        return _key_of_row(row)

    async def list_keys(
        self, principal: Principal, *, before: UUID, limit: int
    ) -> Sequence[ApiKey]:
        """See AuthStore.list_keys."""
        rows = await self._own_rows(LIST_KEYS, principal, before, limit)
        return [_key_of_row(row) for row in rows]

    async def find_key(self, secret: ApiKeySecret) -> ApiKey | None:
        """See AuthStore.find_key."""
        bucket = self._shards.bucket(secret.bucket)
        row = await bucket.fetch_one(SELECT_KEY_BY_SECRET, secret.bucket, secret.hash)
        if row is None or row["kind"] != secret.kind:
            return None
        key = _key_of_row(row)
        if key.kind is KeyKind.USER:
            user = await self._user_row(key.owner, key.tenant)
            if user is None or user["state"] != "ACTIVE":
                return None
        return key

    async def list_revocations(self, since: datetime) -> Sequence[Revocation]:
        """See AuthStore.list_revocations."""
        gathered = await scatter(self._shards, RECENT_REVOCATIONS, to_us(since))
        return [Revocation(row["id"], of_us(row["forget_us"])) for row in gathered.rows]

    async def poll_revocations(self, since: datetime) -> Sequence[Revocation]:
        """See AuthStore.poll_revocations."""
        found: list[Revocation] = []
        for shard in self._shards.all():
            rows = await shard.fetch_all(RECENT_REVOCATIONS, to_us(since))
            found += [Revocation(row["id"], of_us(row["forget_us"])) for row in rows]
        return found

    async def run_forgetting(self) -> None:
        """Delete revocations whose tokens have all expired, until cancelled."""
        while True:
            for shard in self._shards.all():
                with suppress(TenfoldError):
                    async with shard.transaction() as tx:
                        await tx.execute(DELETE_REVOCATIONS, to_us(self._clock.now()))
            await asyncio.sleep(REVOCATION_SWEEP_PERIOD_S)


def _tail(secret: bytes, once: Once) -> int:

    content = b"\0".join(
        (b"sign-up id", once.scope.encode(), once.request_id.encode(), once.fingerprint)
    )
    return int.from_bytes(hmac.digest(secret, content, "sha256")[:8]) & ((1 << 62) - 1)


def _fixed_bits(id: UUID) -> tuple[int, int]:  # noqa: A002
    return bucket_of(id), id.int & ((1 << 62) - 1)


def _confirm_payload(email: UniqueValue) -> bytes:
    return f"{email.tenant}\0{email.value}".encode()


async def _session(tx: Transaction, session_id: UUID, tenant: str) -> Session | None:
    row = await tx.fetch_one(SELECT_SESSION, tx.bucket, session_id, tenant)
    return None if row is None else _session_of_row(row)


async def _is_active(tx: Transaction, session: Session) -> bool:
    row = await tx.fetch_one(SELECT_USER, tx.bucket, session.user_id, session.tenant)
    return row is not None and row["state"] == "ACTIVE"


async def _update(tx: Transaction, session: Session) -> None:
    await tx.execute(
        UPDATE_SESSION,
        *(tx.bucket, session.id, session.tenant),
        *(session.state.value, session.counter, to_us(session.rotated_at)),
    )


async def _end(tx: Transaction, session: Session, now: datetime) -> Revocation:

    await _update(tx, replace(session, state=SessionState.REVOKED))
    await tx.append_outbox(events.session_revoked(session, now=now))
    return await _remember(tx, session.id, session.tenant, session.user_id, now)


async def _remember(
    tx: Transaction, credential: UUID, tenant: str, owner: UUID, now: datetime
) -> Revocation:
    forget_at = now + REVOCATION_LIFE
    await tx.execute(
        INSERT_REVOCATION,
        *(tx.bucket, credential, tenant, owner, to_us(now), to_us(forget_at)),
    )
    return Revocation(credential, forget_at)


async def _insert_key(tx: Transaction, key: ApiKey, secret: ApiKeySecret) -> None:
    await tx.execute(
        INSERT_KEY,
        *(tx.bucket, key.id, key.tenant, key.owner, key.kind.value, key.display_name),
        *(" ".join(sorted(key.scopes)), key.prefix, key.last_four, secret.hash),
        *(to_us(key.created_at), to_us(key.expires_at)),
    )


def _user_of_row(row: Row) -> User:
    return User(
        id=row["id"],
        tenant=row["tenant"],
        email=row["email"],
        display_name=row["display_name"],
        locale=row["locale"],
        is_active=row["state"] == "ACTIVE",
        created_at=of_us(row["created_us"]),
    )


def _session_of_row(row: Row) -> Session:
    return Session(
        id=row["id"],
        tenant=row["tenant"],
        user_id=row["owner"],
        state=SessionState(row["state"]),
        counter=row["counter"],
        rotated_at=of_us(row["rotated_us"]),
        created_at=of_us(row["created_us"]),
        expires_at=of_us(row["expires_us"]),
    )


def _key_of_row(row: Row) -> ApiKey:
    return ApiKey(
        id=row["id"],
        tenant=row["tenant"],
        owner=row["owner"],
        kind=KeyKind(row["kind"]),
        display_name=row["display_name"],
        scopes=frozenset(row["scopes"].split()),
        prefix=row["prefix"],
        last_four=row["last_four"],
        is_revoked=row["state"] == "REVOKED",
        created_at=of_us(row["created_us"]),
        expires_at=of_us(row["expires_us"]),
    )
