"""What runs beside the requests outlives a database that is down or busy for a while."""

import asyncio
from datetime import timedelta

import pytest

from services.auth import revocations, store
from services.auth.domain import ApiKey, ApiKeySecret, KeyKind
from services.auth.revocations import RevocationHub
from services.auth.store import SqlAuthStore
from services.auth.wiring import MIGRATIONS
from shared.db import limits, sqlite_writer
from shared.db.ids import new_id
from shared.errors import DeadlineExceeded, Overloaded, Unavailable
from shared.identity import RevocationList
from tests.fakes import ManualClock

SECRET = b"a secret of thirty-two bytes....."
TROUBLES = [Unavailable("down"), Overloaded("full"), DeadlineExceeded("slow")]


class Troubled:
    """Stands before a shard; each use fails with the next trouble, then all is well."""

    def __init__(self, shard):
        self._shard = shard
        self.troubles = list(TROUBLES)
        self.is_used_again = asyncio.Event()

    def __getattr__(self, name):
        if name not in {"transaction", "fetch_all"}:
            return getattr(self._shard, name)
        if self.troubles:
            raise self.troubles.pop(0)
        self.is_used_again.set()
        return getattr(self._shard, name)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
async def shards(places, clock):
    place = await places.make(MIGRATIONS, shard_count=1)
    async with place.open(clock=clock) as opened:
        yield opened


@pytest.mark.parametrize("loop", ["run_confirmations", "run_forgetting", "poll"])
async def test_a_loop_outlives_a_shard_that_is_down_or_busy(shards, clock, monkeypatch, loop):
    for module, name in (
        (store, "SWEEP_PERIOD_S"),
        (store, "REVOCATION_SWEEP_PERIOD_S"),
        (revocations, "POLL_PERIOD_S"),
    ):
        monkeypatch.setattr(module, name, 0.001)
    troubled = Troubled(shards.all()[0])
    monkeypatch.setattr(shards, "all", lambda: [troubled])
    hub = RevocationHub(clock, RevocationList(clock=clock))
    auth = SqlAuthStore(shards, clock, SECRET, hub)
    work = hub.run(auth.poll_revocations) if loop == "poll" else getattr(auth, loop)()
    running = asyncio.create_task(work)
    used_again = asyncio.create_task(troubled.is_used_again.wait())
    await asyncio.wait([running, used_again], timeout=5, return_when=asyncio.FIRST_COMPLETED)
    assert not running.done(), running.exception()
    assert used_again.done()
    running.cancel()
    await asyncio.wait([running])


async def test_a_revocation_that_waited_for_the_writer_is_not_overlooked(clock, monkeypatch):
    monkeypatch.setattr(revocations, "POLL_PERIOD_S", 0.001)
    looks, has_looked_twice = [], asyncio.Event()

    async def look(since):
        looks.append((since, clock.now()))
        if len(looks) == 2:
            has_looked_twice.set()
        return []

    running = asyncio.create_task(RevocationHub(clock, RevocationList(clock=clock)).run(look))
    async with asyncio.timeout(5):
        await has_looked_twice.wait()
    running.cancel()
    await asyncio.wait([running])
    late_s = sqlite_writer.WAIT_S_MAX + 1.5 * limits.TURN_S_MAX
    assert all((now - since).total_seconds() > late_s for since, now in looks)


async def test_processes_that_start_at_once_agree_on_the_admin_key(shards, clock):
    auth = SqlAuthStore(shards, clock, SECRET, RevocationHub(clock, RevocationList(clock=clock)))
    secret = ApiKeySecret.make(KeyKind.ADMIN, 77)

    def key() -> ApiKey:
        return ApiKey(
            id=new_id(77),
            tenant="default",
            owner=new_id(77),
            kind=KeyKind.ADMIN,
            display_name="The operator's key",
            scopes=frozenset({"ledger.post"}),
            prefix=secret.prefix,
            last_four=secret.last_four,
            is_revoked=False,
            created_at=clock.now(),
            expires_at=clock.now() + timedelta(days=1),
        )

    await asyncio.gather(*(auth.ensure_admin_key(secret, key()) for _ in range(4)))
    found = await auth.find_key(secret)
    assert found is not None
    counted = "SELECT count(*) AS n FROM service_account /* any tenant: a test counts */"
    assert await shards.bucket(77).fetch_one(counted) == {"n": 1}
