"""Lets shards that were copied go on from the moment of their copy, whenever that was.

The broker of then is gone. So every outbox row that is still there is unsent again, and what only
the broker knew (shared/bus/owed.py) is a row again: the relay publishes all of it, into streams
that are new, and consumers drop what their inbox has. An inbox forgets by age, so for the rows in
it no time has passed either: otherwise a copy that is a week old would forget first and be told
afterwards.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

import orjson

from shared.bus import rules
from shared.bus.owed import OwedMessage
from shared.clock import to_us
from shared.db.migrate import sqlite_file
from shared.db.outbox_rows import numbered_as
from shared.db.port import OutboxRow
from shared.db.sql import OWNED_STATES

# Subjects of jobs and of jobs that were given up; see rules.py.
_QUEUE_KINDS = ("wrk", "dlq")
_COLUMNS = "bucket, event_id, aggregate, event_no, subject, headers, payload, tenant, created_at_us"
# A number that was not given out belongs to a transaction that the copy does not have.
_IS_KNOWN = "SELECT 1 FROM event_counter WHERE bucket = ? AND aggregate = ? AND event_no >= ?"
_HOLDERS = f"""
SELECT bucket, state FROM tenfold_bucket WHERE state IN {OWNED_STATES} OR state = 'IMPORTING'
"""  # noqa: S608
_GUARDS = r"""
SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name IN ('outbox', 'inbox')
    AND name LIKE 'tenfold\_guard\_%' ESCAPE '\'
"""
_TAKE_OUT = f"CREATE TABLE again AS SELECT {_COLUMNS} FROM outbox"  # noqa: S608
_ADD = f"""
INSERT INTO again ({_COLUMNS}) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9
WHERE NOT EXISTS (SELECT 1 FROM again WHERE event_id = ?2)
    AND NOT EXISTS (SELECT 1 FROM again WHERE bucket = ?1 AND aggregate = ?3 AND event_no = ?4)
"""  # noqa: S608
# Numbered anew, so that what is older of an aggregate is published first.
_PUT_BACK = f"""
INSERT INTO outbox ({_COLUMNS}) SELECT {_COLUMNS} FROM again ORDER BY bucket, aggregate, event_no
"""  # noqa: S608


@dataclass
class Resumed:
    """What came of it.

    Attributes:
        returned: messages that are outbox rows again.
        later: messages of transactions after the copy's moment: they never happened.
        foreign: messages without our headers, or of no bucket here; an operator's, perhaps.
    """

    returned: int = 0
    later: int = 0
    foreign: int = 0


def resume(paths: Sequence[Path], owed: Iterable[OwedMessage], *, stood_us: int) -> Resumed:
    """Prepare one service's shards. Blocking; each file changes as a whole, or not at all.

    Args:
        paths: every shard file, with nobody else's connection.
        owed: messages whose source is this service.
        stood_us: since the moment of the copy, 0 or more.

    Raises:
        DatabaseRefused: a file is damaged or cannot be written.
    """
    resumed = Resumed()
    with ExitStack() as stack:
        shards = [stack.enter_context(_opened(path)) for path in paths]
        holders = _holders(shards)
        for message in owed:
            _return(message, holders, resumed)
        for shard in shards:
            shard.execute("DELETE FROM outbox")
            shard.execute(_PUT_BACK)
            shard.execute("DROP TABLE again")
            shard.execute("UPDATE inbox SET at_us = at_us + ?", (stood_us,))
    return resumed


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """In a transaction, without the guards: they refuse the rows of a bucket on its way."""
    with sqlite_file(path, is_checked=True) as shard:
        shard.execute("BEGIN IMMEDIATE")
        guards = shard.execute(_GUARDS).fetchall()
        for name, _ in guards:
            shard.execute(f'DROP TRIGGER "{name}"')
        shard.execute(_TAKE_OUT)
        yield shard
        for _, sql in guards:
            shard.execute(sql)
        shard.execute("COMMIT")


def _holders(shards: Sequence[sqlite3.Connection]) -> Mapping[int, sqlite3.Connection]:
    """Who has a bucket: its owner; between two owners, the one that it is going to."""
    found: dict[int, sqlite3.Connection] = {}
    importing: dict[int, sqlite3.Connection] = {}
    for shard in shards:
        for bucket, state in shard.execute(_HOLDERS):
            (importing if state == "IMPORTING" else found)[bucket] = shard
    return importing | found


def _return(
    message: OwedMessage, holders: Mapping[int, sqlite3.Connection], resumed: Resumed
) -> None:
    try:
        row = _row_of(message)
        shard = holders[int(str(row[0]))]
    except (KeyError, ValueError):
        resumed.foreign += 1
        return
    bucket, _, aggregate, event_no, *_ = row
    if shard.execute(_IS_KNOWN, (bucket, aggregate, event_no)).fetchone() is None:
        resumed.later += 1
        return
    resumed.returned += shard.execute(_ADD, row).rowcount


def _row_of(message: OwedMessage) -> tuple[object, ...]:
    """The outbox row that a message was made from: what headers_of in outbox.py wrote, read back.

    Raises:
        KeyError, ValueError: it was made from none.
    """
    headers = dict(message.headers)
    event_id = UUID(headers.pop(rules.MESSAGE_ID))
    event_no = int(headers.pop(rules.EVENT_NO))
    bucket = int(headers.pop(rules.SOURCE_BUCKET))
    tenant = headers.pop(rules.TENANT)
    created_at = datetime.fromisoformat(headers.pop(rules.TIME))
    kind, _, queue, target = message.subject.split(".")
    row = OutboxRow(
        headers[rules.TYPE],
        headers[rules.AGGREGATE],
        message.payload,
        tenant,
        int(target),
        queue=queue if kind in _QUEUE_KINDS else "",
    )
    aggregate = numbered_as(row, bucket=bucket)
    return (
        *(bucket, event_id.bytes, aggregate, event_no, message.subject),
        *(orjson.dumps(headers).decode(), message.payload, tenant, to_us(created_at)),
    )
