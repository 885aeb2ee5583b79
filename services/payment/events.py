"""What the ledger says on the wire: its values as messages, its events as outbox rows."""

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from tenfold.common.v1.money_pb2 import Money
from tenfold.ledger.v1.ledger_events_pb2 import AccountOpened, TransactionPosted
from tenfold.ledger.v1.ledger_pb2 import Account as AccountMessage
from tenfold.ledger.v1.ledger_pb2 import Entry as EntryMessage
from tenfold.ledger.v1.ledger_pb2 import Side as SideMessage
from tenfold.ledger.v1.ledger_pb2 import Transaction as TransactionMessage

from services.payment.domain import (
    Account,
    AccountState,
    Entry,
    Side,
    Transaction,
    account_name,
    transaction_name,
)
from services.payment.posting import Record
from shared.clock import to_us
from shared.db.port import OutboxRow

ACCOUNT_OPENED = AccountOpened.DESCRIPTOR.full_name
TRANSACTION_POSTED = TransactionPosted.DESCRIPTOR.full_name

_SIDES = {Side.DEBIT: SideMessage.SIDE_DEBIT, Side.CREDIT: SideMessage.SIDE_CREDIT}
_STATES = {
    AccountState.OPEN: AccountMessage.STATE_OPEN,
    AccountState.CLOSED: AccountMessage.STATE_CLOSED,
}


def timestamp_of(moment: datetime) -> Timestamp:
    """A moment, UTC, to the microsecond."""
    seconds, microseconds = divmod(to_us(moment.astimezone(UTC)), 1_000_000)
    return Timestamp(seconds=seconds, nanos=microseconds * 1000)


def account_to_proto(account: Account) -> AccountMessage:
    """An account as the contract shows it; its sums are the Balance."""
    return AccountMessage(
        name=account_name(account.account_id),
        owner=str(account.owner),
        currency_code=account.currency_code,
        exponent=account.exponent,
        normal_side=_SIDES[account.normal_side],
        may_overdraw=account.may_overdraw,
        display_name=account.display_name,
        state=_STATES[account.state],
        create_time=timestamp_of(account.created_at),
    )


def transaction_to_proto(transaction: Transaction) -> TransactionMessage:
    """A transaction as the contract shows it."""
    return TransactionMessage(
        name=transaction_name(transaction.transaction_id),
        reference=transaction.reference,
        description=transaction.description,
        entries=[_entry_to_proto(entry) for entry in transaction.entries],
        recorded_time=timestamp_of(transaction.recorded_at),
        owner=str(transaction.owner),
    )


def _entry_to_proto(entry: Entry) -> EntryMessage:
    return EntryMessage(
        account=account_name(entry.account_id),
        side=_SIDES[entry.side],
        amount=Money(currency_code=entry.currency_code, minor_units=entry.minor_units),
        account_sequence=entry.account_sequence,
    )


def encode_opened(account: Account) -> OutboxRow:
    """AccountOpened, of the account's aggregate."""
    message = AccountOpened(account=account_to_proto(account))
    return OutboxRow(
        ACCOUNT_OPENED,
        account_name(account.account_id),
        message.SerializeToString(),
        account.tenant,
    )


def payload_of_record(record: Record, name: str) -> bytes:
    """TransactionPosted, of the transaction of that name."""
    seconds, microseconds = divmod(record.recorded_at_us, 1_000_000)
    message = TransactionPosted(
        transaction=name,
        reference=record.reference,
        description=record.description,
        recorded_time=Timestamp(seconds=seconds, nanos=microseconds * 1000),
    )
    for entry in record.entries:
        message.entries.add(
            account=f"accounts/{entry.account_id}",
            owner=str(entry.owner),
            side=entry.side,  # the numbers are the contract's
            currency_code=entry.currency_code,
            minor_units=entry.minor_units,
        )
    return message.SerializeToString()
