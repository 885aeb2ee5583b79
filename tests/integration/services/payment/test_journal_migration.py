"""Books of before the journal are carried over whole, on both engines."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime

from services.payment.domain import Owner, OwnerKind
from services.payment.lane import open_lanes
from services.payment.store import Caller, SqlLedgerStore
from services.payment.wiring import MIGRATIONS
from shared.db.ids import bucket_of, new_id
from tests.databases import SECRET

OPEN = """
INSERT INTO account (bucket, id, tenant, owner, owner_kind, currency_code, exponent, normal_side,
                     may_overdraw, display_name, state, created_at_us)
VALUES ($1, $2, 'default', $3, 1, 'EUR', 2, $4, $5, '', 1, 0)
"""
ENTRY = """
INSERT INTO entry (bucket, id, tenant, owner, owner_kind, transaction_bucket, transaction_id,
                   position, account_id, account_sequence, side, currency_code, minor_units,
                   recorded_at_us)
VALUES ($1, $2, 'default', $3, 1, $4, $5, $6, $7, $8, $6, 'EUR', $9, 7)
"""
SEAL = """
INSERT INTO ledger_transaction (bucket, id, tenant, owner, owner_kind, reference, description,
                                entry_count, recorded_at_us)
VALUES ($1, $2, 'default', $3, 1, 'old', 'before', 2, 7)
"""


async def test_old_accounts_keep_their_sums_and_old_transactions_their_entries(
    places, clock, tmp_path
):
    for old in sorted(MIGRATIONS.glob("000[12]_*.sql")):
        shutil.copy(old, tmp_path)
    place = await places.make(tmp_path, service="payment", shard_count=1)
    owner, cash, user = new_id(1), new_id(9), new_id(3000)
    posted = [new_id(9) for _ in range(2)]
    async with (
        place.open(clock=clock) as shards,
        shards.bucket(9).transaction(also={3000}) as tx,
    ):
        await tx.execute(OPEN, 9, cash, owner, 1, True)
        await tx.execute(OPEN, 3000, user, owner, 2, False)
        for number, made in enumerate(posted, start=1):
            for side, account in ((1, cash), (2, user)):
                bucket = bucket_of(account)
                values = (bucket, new_id(bucket), owner, 9, made, side, account, number)
                await tx.execute(ENTRY, *values, 40 + number)
            await tx.execute(SEAL.replace("'old'", f"'old {number}'"), 9, made, owner)
    contents = replace(place.contents, migrations=MIGRATIONS)
    newer = replace(place, contents=contents)
    async with newer.open(clock=clock) as shards, open_lanes(shards, clock) as lanes:
        store = SqlLedgerStore(shards, lanes, secret=SECRET)
        await store.verify(entries_max=100)
        caller = Caller("default", Owner(OwnerKind.USER, owner), is_operator=False)
        account = await store.get_account(user, caller)
        assert (account.available_minor_units, account.entry_count) == (83, 2)
        listed = await store.list_transactions(user, caller, before=2**62, limit=10)
        assert [one.transaction_id for _, one in listed] == posted[::-1]
        transaction = await store.get_transaction(posted[0], caller)
        assert transaction.reference == "old 1"
        assert transaction.recorded_at == datetime(1970, 1, 1, 0, 0, 0, 7, tzinfo=UTC)
        entries = [(one.account_id, one.minor_units) for one in transaction.entries]
        assert entries == [(cash, 41), (user, 41)]
