"""The journal's SQL: what a batch reads, and the rows that it leaves, on either engine.

A batch reads twice and writes once. On Postgres the write is one statement, because its rules are
checked for all rows of a statement at once; SQLite has no DML inside WITH, so it is one statement
per table, entries before the transactions that seal them.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol
from uuid import UUID

import orjson

from services.payment import events
from services.payment.domain import Owner, OwnerKind, transaction_name
from services.payment.posting import JournalEntry, Outcome, Record, Result, Standing, State
from shared.db.ids import bucket_of
from shared.db.port import Bucket, Row, Transaction

# ruff: noqa: S608 - statements are put together from these constants only
STANDING_COLUMNS = """a.id, a.tenant, a.owner, a.owner_kind, a.currency_code, a.normal_side,
    a.may_overdraw, a.state, l.posted_debit, l.posted_credit, l.pending_debit, l.pending_credit,
    l.account_sequence"""
LAST_ENTRY = """LEFT JOIN entry AS l ON l.bucket = a.bucket AND l.account_id = a.id
    AND l.account_sequence = (SELECT max(n.account_sequence) FROM entry AS n
        WHERE n.bucket = a.bucket AND n.account_id = a.id)"""
RECORD_COLUMNS = """t.id, t.tenant, t.owner, t.owner_kind, t.reference, t.description,
    t.recorded_at_us, t.state, t.result, t.fingerprint, t.entries, t.pending_id, t.expires_at_us"""
_SUMS = ("posted_debit", "posted_credit", "pending_debit", "pending_credit", "account_sequence")
_ANY = "/* any tenant: the batch compares it */"
_ENTRY_NAMES = """bucket, tenant, owner, owner_kind, transaction_bucket, transaction_id, account_id,
    account_sequence, side, currency_code, minor_units, recorded_at_us, held_minor_units,
    posted_debit, posted_credit, pending_debit, pending_credit, floor_side"""
_RECORD_NAMES = """bucket, id, tenant, owner, owner_kind, reference, description, entry_count,
    recorded_at_us, state, result, fingerprint, account_id, account_sequence, entries, pending_id,
    expires_at_us"""
_EVENT_NAMES = """bucket, event_id, aggregate, event_no, subject, headers, payload, tenant,
    created_at_us"""


class Journal(Protocol):
    """Reads and writes whole batches within a transaction."""

    async def begin(self, tx: Transaction, buckets: Collection[int]) -> None:
        """Have these buckets' money to itself until the end of the transaction."""
        ...

    async def standings(self, tx: Transaction, ids: Sequence[UUID]) -> dict[UUID, Standing]:
        """Where these accounts stand; one that does not exist is left out."""
        ...

    async def records(self, tx: Transaction, ids: Sequence[UUID]) -> dict[UUID, Record]:
        """What was decided under these ids."""
        ...

    async def accounts_of(self, bucket: Bucket, hold: UUID) -> set[UUID]:
        """The accounts that a hold names; none if there is no such hold."""
        ...

    async def references(
        self, tx: Transaction, wanted: Sequence[tuple[str, UUID, str]]
    ) -> dict[tuple[str, UUID, str], UUID]:
        """Who has these references, by tenant, owner and reference."""
        ...

    async def write(self, tx: Transaction, outcome: Outcome) -> None:
        """Leave a batch's rows: records, entries, ended holds, events."""
        ...


def journal_of(engine: str) -> Journal:
    """The journal as this engine keeps it."""
    return PostgresJournal() if engine == "postgres" else SqliteJournal()


_ENTRIES_OF_HOLD = f"""
SELECT {RECORD_COLUMNS} FROM ledger_transaction AS t WHERE t.bucket = $1 AND t.id = $2 {_ANY}
"""


class _Journal:
    """What both engines do alike."""

    async def accounts_of(self, bucket: Bucket, hold: UUID) -> set[UUID]:
        """See Journal.accounts_of."""
        row = await bucket.fetch_one(_ENTRIES_OF_HOLD, bucket.number, hold)
        return set() if row is None else {one.account_id for one in record_of_row(row).entries}


class PostgresJournal(_Journal):
    """See Journal."""

    async def begin(self, tx: Transaction, buckets: Collection[int]) -> None:
        """See Journal.begin."""
        await tx.execute(
            "SELECT lane_enter($1::int[])", sorted({bucket & 63 for bucket in buckets})
        )

    async def standings(self, tx: Transaction, ids: Sequence[UUID]) -> dict[UUID, Standing]:
        """See Journal.standings."""
        row = await tx.fetch_one(_STANDINGS_OF_POSTGRES, _numbers(map(bucket_of, ids)), _ids(ids))
        assert row is not None
        # One row of arrays: a thousand rows would be a thousand dictionaries.
        found = zip(ids, *row.values(), strict=True)
        return {
            account_id: Standing(account_id, tenant, owner_of(kind, owner), *facts)
            for account_id, tenant, kind, owner, *facts in found
            if tenant is not None
        }

    async def records(self, tx: Transaction, ids: Sequence[UUID]) -> dict[UUID, Record]:
        """See Journal.records."""
        rows = await tx.fetch_all(_RECORDS_OF_POSTGRES, _numbers(map(bucket_of, ids)), _ids(ids))
        return {row["id"]: record_of_row(row) for row in rows}

    async def references(
        self, tx: Transaction, wanted: Sequence[tuple[str, UUID, str]]
    ) -> dict[tuple[str, UUID, str], UUID]:
        """See Journal.references."""
        tenants, owners, references = map(list, zip(*wanted, strict=True))
        rows = await tx.fetch_all(_REFERENCES_OF_POSTGRES, tenants, owners, references)
        return {(row["tenant"], row["owner"], row["reference"]): row["id"] for row in rows}

    async def write(self, tx: Transaction, outcome: Outcome) -> None:
        """See Journal.write."""
        records = [_row_of_record(record) for record in outcome.records]
        entries = [
            _row_of_entry(record, entry) for record in outcome.records for entry in record.entries
        ]
        told = [_row_of_event(record) for record in outcome.records if is_told(record)]
        ended = [(bucket_of(key), key, state) for key, state in outcome.ended.items()]
        await tx.execute(
            _WRITE_OF_POSTGRES,
            *_columns(records, _RECORD_KINDS),
            *_columns(entries, _ENTRY_KINDS),
            *_columns(told, _EVENT_KINDS),
            *_columns(ended, _ENDED_KINDS),
        )
        if told:
            tx.wake_relay()


# Arrays of numbers and ids travel as Postgres writes them: the driver looks at each item of an
# array several times before it encodes it, save at texts and bytes.
_RECORD_KINDS = (
    "smallint uuid text uuid smallint text text bigint bigint smallint smallint bytea uuid bigint "
    "text uuid bigint"
)
_ENTRY_KINDS = (
    "smallint text uuid smallint smallint uuid uuid bigint smallint text bigint bigint bigint "
    "bigint bigint bigint bigint smallint"
)
_EVENT_KINDS = "smallint uuid text bigint text text bytea text bigint"
_ENDED_KINDS = "smallint uuid smallint"
_NATIVE_KINDS = frozenset({"text", "bytea"})


def _columns(rows: Sequence[tuple[Any, ...]], kinds: str) -> list[object]:
    columns = zip(*rows, strict=True) if rows else ((),) * len(kinds.split())
    return [_column(column, kind) for column, kind in zip(columns, kinds.split(), strict=True)]


def _column(values: Sequence[Any], kind: str) -> object:
    if kind in _NATIVE_KINDS:
        return values
    return _ids(values) if kind == "uuid" else _numbers(values)


def _numbers(values: Iterable[int | None]) -> str:
    return f"{{{','.join(['NULL' if value is None else str(value) for value in values])}}}"


def _ids(values: Iterable[UUID | None]) -> str:
    return f"{{{','.join(['NULL' if value is None else value.hex for value in values])}}}"


def _unnest(first: int, kinds: str) -> str:
    """The arguments of unnest, from $first on; see _column."""
    return ", ".join(
        f"${at}::{kind}[]" if kind in _NATIVE_KINDS else f"(${at}::text)::{kind}[]"
        for at, kind in enumerate(kinds.split(), start=first)
    )


_STANDINGS_OF_POSTGRES = f"""
SELECT {
    ", ".join(
        f"array_agg({column} ORDER BY q.n) AS c{at}"
        for at, column in enumerate(
            (
                "a.tenant",
                "a.owner_kind",
                "uuid_send(a.owner)",
                "a.currency_code",
                "a.normal_side",
                "a.may_overdraw",
                "a.state = 1",
                *(f"coalesce(l.{name}, 0)" for name in _SUMS),
            )
        )
    )
}
FROM unnest({_unnest(1, "smallint uuid")}) WITH ORDINALITY AS q (bucket, id, n)
LEFT JOIN account AS a ON a.bucket = q.bucket AND a.id = q.id {LAST_ENTRY} {_ANY}
"""
_RECORDS_OF_POSTGRES = f"""
SELECT {RECORD_COLUMNS} FROM unnest({_unnest(1, "smallint uuid")}) AS q (bucket, id)
JOIN ledger_transaction AS t ON t.bucket = q.bucket AND t.id = q.id {_ANY}
"""
_REFERENCES_OF_POSTGRES = """
SELECT t.id, t.tenant, t.owner, t.reference
FROM unnest($1::text[], $2::uuid[], $3::text[]) AS q (tenant, owner, reference)
JOIN ledger_transaction AS t ON t.tenant = q.tenant AND t.owner = q.owner
    AND t.reference = q.reference
"""


_WRITE_OF_POSTGRES = f"""
WITH decided AS (
    INSERT INTO ledger_transaction ({_RECORD_NAMES})
    SELECT * FROM unnest({_unnest(1, _RECORD_KINDS)})
), written AS (
    INSERT INTO entry ({_ENTRY_NAMES}) SELECT * FROM unnest({_unnest(18, _ENTRY_KINDS)})
), told AS (
    INSERT INTO outbox ({_EVENT_NAMES}) SELECT * FROM unnest({_unnest(36, _EVENT_KINDS)})
)
UPDATE ledger_transaction AS t SET state = q.state
FROM unnest({_unnest(45, _ENDED_KINDS)}) AS q (bucket, id, state)
WHERE t.bucket = q.bucket AND t.id = q.id {_ANY}
"""


class SqliteJournal(_Journal):
    """See Journal. Ids travel side by side in one blob; JSON cannot hold them."""

    async def begin(self, tx: Transaction, buckets: Collection[int]) -> None:
        """See Journal.begin: the writer is alone anyway."""

    async def standings(self, tx: Transaction, ids: Sequence[UUID]) -> dict[UUID, Standing]:
        """See Journal.standings."""
        buckets = orjson.dumps([bucket_of(id_) for id_ in ids]).decode()
        rows = await tx.fetch_all(_STANDINGS_OF_SQLITE, buckets, _blob(ids))
        return {row["id"]: standing_of_row(row) for row in rows}

    async def records(self, tx: Transaction, ids: Sequence[UUID]) -> dict[UUID, Record]:
        """See Journal.records."""
        buckets = orjson.dumps([bucket_of(id_) for id_ in ids]).decode()
        rows = await tx.fetch_all(_RECORDS_OF_SQLITE, buckets, _blob(ids))
        return {row["id"]: record_of_row(row) for row in rows}

    async def references(
        self, tx: Transaction, wanted: Sequence[tuple[str, UUID, str]]
    ) -> dict[tuple[str, UUID, str], UUID]:
        """See Journal.references."""
        keys = orjson.dumps([(tenant, reference) for tenant, _, reference in wanted]).decode()
        owners = _blob([owner for _, owner, _ in wanted])
        rows = await tx.fetch_all(_REFERENCES_OF_SQLITE, keys, owners)
        return {(row["tenant"], row["owner"], row["reference"]): row["id"] for row in rows}

    async def write(self, tx: Transaction, outcome: Outcome) -> None:
        """See Journal.write."""
        records = [_row_of_record(record) for record in outcome.records]
        entries = [
            _row_of_entry(record, entry) for record in outcome.records for entry in record.entries
        ]
        told = [_row_of_event(record) for record in outcome.records if is_told(record)]
        ended = [(bucket_of(key), key, state) for key, state in outcome.ended.items()]
        for statement, rows in (
            (_ENTRIES_OF_SQLITE, entries),
            (_TRANSACTIONS_OF_SQLITE, records),
            (_ENDED_OF_SQLITE, ended),
            (_NUMBERS_OF_SQLITE, told),
            (_EVENTS_OF_SQLITE, told),
        ):
            if rows:
                await tx.execute(statement, *_packed(rows))
        if told:
            tx.wake_relay()


def _blob(ids: Sequence[UUID]) -> bytes:
    return b"".join(id_.bytes for id_ in ids)


def _packed(rows: Sequence[tuple[object, ...]]) -> tuple[str, bytes]:
    """Rows as JSON, and the bytes that JSON cannot hold: [offset, length] says which."""
    parts: list[bytes] = []
    length = 0

    def pack(value: object) -> object:
        nonlocal length
        content = value.bytes if isinstance(value, UUID) else value
        if not isinstance(content, bytes):
            return content
        parts.append(content)
        length += len(content)
        return [length - len(content) + 1, len(content)]

    packed = [[pack(value) for value in row] for row in rows]
    return orjson.dumps(packed).decode(), b"".join(parts)


def _plain(at: int) -> str:
    return f"json_extract(q.value, '$[{at}]')"


def _bytes(at: int) -> str:
    offset, length = (f"json_extract(q.value, '$[{at}][{part}]')" for part in (0, 1))
    return f"CASE WHEN {offset} IS NOT NULL THEN substr($2, {offset}, {length}) END"


def _unpack(kinds: str) -> str:
    """SELECT the columns of a packed row; b is for bytes, p for all else."""
    chosen = [_bytes(at) if kind == "b" else _plain(at) for at, kind in enumerate(kinds.split())]
    return f"SELECT {', '.join(chosen)} FROM json_each($1) AS q"


_ID_OF_SQLITE = "substr($2, q.key * 16 + 1, 16)"
_STANDINGS_OF_SQLITE = f"""
SELECT {STANDING_COLUMNS} FROM json_each($1) AS q
CROSS JOIN account AS a ON a.bucket = q.value AND a.id = {_ID_OF_SQLITE} {LAST_ENTRY} {_ANY}
"""
_RECORDS_OF_SQLITE = f"""
SELECT {RECORD_COLUMNS} FROM json_each($1) AS q
CROSS JOIN ledger_transaction AS t ON t.bucket = q.value AND t.id = {_ID_OF_SQLITE} {_ANY}
"""
_REFERENCES_OF_SQLITE = f"""
SELECT t.id, t.tenant, t.owner, t.reference FROM json_each($1) AS q
CROSS JOIN ledger_transaction AS t ON t.tenant = {_plain(0)} AND t.owner = {_ID_OF_SQLITE}
    AND t.reference = {_plain(1)}
"""
_TRANSACTIONS_OF_SQLITE = f"""
INSERT INTO ledger_transaction ({_RECORD_NAMES}) {_unpack("p b p b p p p p p p p b b p p b p")}
"""
_ENTRIES_OF_SQLITE = f"""
INSERT INTO entry ({_ENTRY_NAMES}) {_unpack("p p b p p b b p p p p p p p p p p p")}
"""
_EVENTS_OF_SQLITE = f"""
INSERT INTO outbox ({_EVENT_NAMES}) {_unpack("p b p p p p b p p")}
"""
_NUMBERS_OF_SQLITE = f"""
INSERT INTO event_counter (bucket, aggregate, event_no)
SELECT {_plain(0)}, {_plain(2)}, {_plain(3)} FROM json_each($1) AS q WHERE length($2) >= 0
"""
_ENDED_OF_SQLITE = f"""
UPDATE ledger_transaction AS t SET state = {_plain(2)} FROM json_each($1) AS q
WHERE t.bucket = {_plain(0)} AND t.id = {_bytes(1)} {_ANY}
"""


# Rows ------------------------------------------------------------------------------------

OWNERS_CACHED_MAX = 65_536


@lru_cache(OWNERS_CACHED_MAX)
def owner_of(kind: int, content: bytes) -> Owner:
    """An owner from its columns; accounts of one owner share it."""
    return Owner(OwnerKind(kind), UUID(bytes=content))


def is_told(record: Record) -> bool:
    """Whether it is an event: money has moved."""
    return record.state is State.POSTED and any(entry.minor_units for entry in record.entries)


def _row_of_record(record: Record) -> tuple[object, ...]:
    bucket = bucket_of(record.order_id)
    anchor = next(
        (entry for entry in record.entries if bucket_of(entry.account_id) == bucket), None
    )
    return (
        bucket,
        record.order_id,
        record.tenant,
        record.owner.id,
        record.owner.kind.value,
        record.reference or None,
        record.description,
        len(record.entries),
        record.recorded_at_us,
        record.state.value,
        record.result.value,
        record.fingerprint,
        anchor and anchor.account_id,
        anchor and anchor.sequence,
        entries_to_text(record),
        record.pending_id,
        record.expires_at_us,
    )


def _row_of_entry(record: Record, entry: JournalEntry) -> tuple[object, ...]:
    return (
        bucket_of(entry.account_id),
        record.tenant,
        entry.owner.id,
        entry.owner.kind.value,
        bucket_of(record.order_id),
        record.order_id,
        entry.account_id,
        entry.sequence,
        int(entry.side),
        entry.currency_code,
        entry.minor_units,
        record.recorded_at_us,
        entry.held_minor_units,
        entry.posted_debit,
        entry.posted_credit,
        entry.pending_debit,
        entry.pending_credit,
        int(entry.floor_side),
    )


def _row_of_event(record: Record) -> tuple[object, ...]:
    """Its transaction's first and only event: so it has the number 1, and the transaction's id."""
    bucket, aggregate = bucket_of(record.order_id), transaction_name(record.order_id)
    return (
        bucket,
        record.order_id,
        aggregate,
        1,
        f"evt.payment.TransactionPosted.{bucket}",
        f'{{"tenfold-type":"{events.TRANSACTION_POSTED}","tenfold-aggregate":"{aggregate}"}}',
        events.payload_of_record(record, aggregate),
        record.tenant,
        record.recorded_at_us,
    )


def entries_to_text(record: Record) -> str:
    """A record's own entries; of a refused one, the account that it was refused for."""
    if record.state is State.REFUSED:
        return orjson.dumps([record.concerns] if record.concerns else []).decode()
    return orjson.dumps(
        [
            (
                entry.account_id,
                int(entry.side),
                entry.currency_code,
                entry.minor_units,
                entry.sequence,
                entry.held_minor_units,
                entry.owner.kind.value,
                entry.owner.id,
            )
            for entry in record.entries
        ]
    ).decode()


def record_of_row(row: Row) -> Record:
    """A record from RECORD_COLUMNS; its entries without their accounts' sums."""
    state, stored = State(row["state"]), orjson.loads(row["entries"])
    is_refused = state is State.REFUSED
    return Record(
        order_id=row["id"],
        tenant=row["tenant"],
        owner=Owner(OwnerKind(row["owner_kind"]), row["owner"]),
        state=state,
        fingerprint=row["fingerprint"],
        recorded_at_us=row["recorded_at_us"],
        reference=row["reference"] or "",
        description=row["description"],
        entries=() if is_refused else tuple(_entry_of(one) for one in stored),
        result=Result(row["result"]),
        concerns=UUID(stored[0]) if is_refused and stored else None,
        pending_id=row["pending_id"],
        expires_at_us=row["expires_at_us"],
    )


def _entry_of(stored: Sequence[str | int]) -> JournalEntry:
    account, side, code, minor_units, sequence, held, kind, owner = stored
    return JournalEntry(
        UUID(str(account)),
        Owner(OwnerKind(int(kind)), UUID(str(owner))),
        int(side),
        str(code),
        int(minor_units),
        int(sequence),
        int(held),
    )


def standing_of_row(row: Row) -> Standing:
    """Where an account stands, from STANDING_COLUMNS."""
    return Standing(
        row["id"],
        row["tenant"],
        Owner(OwnerKind(row["owner_kind"]), row["owner"]),
        row["currency_code"],
        row["normal_side"],
        bool(row["may_overdraw"]),
        row["state"] == 1,
        row["posted_debit"] or 0,
        row["posted_credit"] or 0,
        row["pending_debit"] or 0,
        row["pending_credit"] or 0,
        row["account_sequence"] or 0,
    )
