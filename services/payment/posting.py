"""Decides a batch of orders, strictly in order: pure, no await.

An order posts entries, holds them, or ends a hold; it is named by an id that it has for ever.
What is decided under an id stays decided: a repeat is told the same, and an order that was
refused for the state of the books is refused for good, however the books look later.

The results are named as TigerBeetle names them (docs.tigerbeetle.com, "CreateTransferResult").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple
from uuid import UUID

from services.payment.domain import INT64_MAX, NewEntry, Owner, Side


class Kind(IntEnum):
    """What an order asks for."""

    POST = 1
    HOLD = 2
    POST_HOLD = 3
    VOID_HOLD = 4
    EXPIRE_HOLD = 5


class State(IntEnum):
    """What has become of an order; the numbers are the table's."""

    POSTED = 1
    HELD = 2
    HOLD_POSTED = 3
    VOIDED = 4
    EXPIRED = 5
    REFUSED = 6


class Result(IntEnum):
    """What an order is answered; the numbers are the table's, and the contract's."""

    OK = 0
    EXISTS = 1
    EXISTS_WITH_DIFFERENT_FIELDS = 2
    ID_ALREADY_FAILED = 3
    LINKED_EVENT_FAILED = 4
    LINKED_EVENT_CHAIN_OPEN = 5
    ACCOUNT_NOT_FOUND = 6
    ACCOUNT_ALREADY_CLOSED = 7
    CURRENCY_MISMATCH = 8
    EXCEEDS_CREDITS = 9
    EXCEEDS_DEBITS = 10
    OVERFLOWS = 11
    REFERENCE_TAKEN = 12
    PENDING_TRANSFER_NOT_FOUND = 13
    PENDING_TRANSFER_ALREADY_POSTED = 14
    PENDING_TRANSFER_ALREADY_VOIDED = 15
    PENDING_TRANSFER_EXPIRED = 16
    EXCEEDS_PENDING_TRANSFER_AMOUNT = 17
    ACCOUNT_NOT_TRANSFERABLE = 18


# What another state of the books would have let pass, and therefore is kept under the id.
KEPT = frozenset(
    {
        Result.ACCOUNT_NOT_FOUND,
        Result.ACCOUNT_ALREADY_CLOSED,
        Result.EXCEEDS_CREDITS,
        Result.EXCEEDS_DEBITS,
        Result.OVERFLOWS,
        Result.PENDING_TRANSFER_NOT_FOUND,
        Result.PENDING_TRANSFER_ALREADY_POSTED,
        Result.PENDING_TRANSFER_ALREADY_VOIDED,
        Result.PENDING_TRANSFER_EXPIRED,
    }
)
# What a chain fails for that is kept for all of it.
_CAUSES_KEPT = KEPT | {Result.ID_ALREADY_FAILED}
_ENDED = {
    State.HOLD_POSTED: Result.PENDING_TRANSFER_ALREADY_POSTED,
    State.VOIDED: Result.PENDING_TRANSFER_ALREADY_VOIDED,
    State.EXPIRED: Result.PENDING_TRANSFER_EXPIRED,
}
_STATE_OF_KIND = {Kind.POST: State.POSTED, Kind.HOLD: State.HELD}
_STATE_OF_HOLD = {
    Kind.POST_HOLD: State.HOLD_POSTED,
    Kind.VOID_HOLD: State.VOIDED,
    Kind.EXPIRE_HOLD: State.EXPIRED,
}


@dataclass(slots=True)
class Standing:
    """Where an account stands: its sums after its last entry.

    Attributes:
        sequence: the number of that entry; 0 if there is none.
    """

    account_id: UUID
    tenant: str
    owner: Owner
    currency_code: str
    normal_side: int
    may_overdraw: bool
    is_open: bool
    posted_debit: int = 0
    posted_credit: int = 0
    pending_debit: int = 0
    pending_credit: int = 0
    sequence: int = 0

    @property
    def floor_side(self) -> int:
        """The side that must not be outweighed; 0 if either may."""
        return 0 if self.may_overdraw else self.normal_side

    def copy(self) -> "Standing":
        """Another one that stands alike; made for each account of a batch."""
        return Standing(
            self.account_id,
            self.tenant,
            self.owner,
            self.currency_code,
            self.normal_side,
            self.may_overdraw,
            self.is_open,
            self.posted_debit,
            self.posted_credit,
            self.pending_debit,
            self.pending_credit,
            self.sequence,
        )


@dataclass(frozen=True, slots=True)
class Order:
    """One thing that is asked for.

    Attributes:
        order_id: a UUIDv7 in the bucket of the first debited account.
        owner: who asks.
        entries: balanced, each account once (require_balanced); none if it ends a hold.
        fingerprint: of what is asked; another under the same id is refused.
        is_linked: it and the next pass or fail together.
        payer: whose the debited accounts must be; None for an operator.
        is_transfer: every account is a CREDIT account.
        pending_id: of the hold that it ends.
        minor_units: how much of a hold of two entries is posted; None for all.
        expires_at_us: from when on a hold cannot be posted; None for never.
    """

    order_id: UUID
    tenant: str
    owner: Owner
    entries: tuple[NewEntry, ...]
    fingerprint: bytes
    kind: Kind = Kind.POST
    reference: str = ""
    description: str = ""
    is_linked: bool = False
    payer: Owner | None = None
    is_transfer: bool = False
    pending_id: UUID | None = None
    minor_units: int | None = None
    expires_at_us: int | None = None


class JournalEntry(NamedTuple):
    """One row of an account's journal, with the account's sums after it.

    Attributes:
        held_minor_units: what it adds to what is held; negative if it ends a hold.
    """

    account_id: UUID
    owner: Owner
    side: int
    currency_code: str
    minor_units: int
    sequence: int
    held_minor_units: int = 0
    posted_debit: int = 0
    posted_credit: int = 0
    pending_debit: int = 0
    pending_credit: int = 0
    floor_side: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What was decided under an id, for ever; only a hold's state changes, once.

    Attributes:
        result: why it was refused, OK if it was not.
        concerns: the account that it was refused for, if it was one.
    """

    order_id: UUID
    tenant: str
    owner: Owner
    state: State
    fingerprint: bytes
    recorded_at_us: int
    reference: str = ""
    description: str = ""
    entries: tuple[JournalEntry, ...] = ()
    result: Result = Result.OK
    concerns: UUID | None = None
    pending_id: UUID | None = None
    expires_at_us: int | None = None


class Answer(NamedTuple):
    """What one order is told.

    Attributes:
        record: what its id stands for; None if nothing was kept.
        concerns: the account that it was refused for, if it was one.
    """

    result: Result
    record: Record | None = None
    concerns: UUID | None = None


@dataclass(slots=True)
class Outcome:
    """What is to be written, and what is to be told.

    Attributes:
        answers: in the order of the orders.
        records: new, each with its entries.
        ended: the holds that end, with their new state.
    """

    answers: list[Answer] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    ended: dict[UUID, State] = field(default_factory=dict)


def apply(
    accounts: Mapping[UUID, Standing],
    known: Mapping[UUID, Record],
    orders: Sequence[Order],
    *,
    now_us: int,
    references: Mapping[tuple[str, UUID, str], UUID] | None = None,
) -> Outcome:
    """Decide every order, in order, and say what is to be written.

    Args:
        accounts: where each account stood before; not changed. One that is missing does not exist.
        known: what was decided before under the orders' ids, and the holds that they end.
        orders: any number; linked ones with all of their chain.
        now_us: what is recorded, and what ends holds.
        references: the ids that have the orders' references, by tenant, owner and reference.

    Source: the batch semantics of TigerBeetle's create_transfers.
    """
    batch = _Batch(accounts, known, now_us, dict(references or {}))
    chain: list[Order] = []
    for order in orders:
        if not order.is_linked and not chain:
            batch.outcome.answers.append(batch.decide(order))
            continue
        chain.append(order)
        if not order.is_linked:
            batch.outcome.answers += batch.decide_chain(chain)
            chain = []
    if chain:
        batch.outcome.answers += batch.refuse_open_chain(chain)
    return batch.outcome


class _Batch:
    """The books as they are between two orders."""

    def __init__(
        self,
        accounts: Mapping[UUID, Standing],
        known: Mapping[UUID, Record],
        now_us: int,
        references: dict[tuple[str, UUID, str], UUID],
    ) -> None:
        self._accounts = accounts
        self._known = known
        self._now_us = now_us
        self._references = references
        self._touched: dict[UUID, Standing] = {}
        self._new: dict[UUID, Record] = {}
        self.outcome = Outcome()

    def decide(self, order: Order) -> Answer:
        """One order on its own."""
        return self._recall(order) or self._keep_refusal(order, self._try(order))

    def decide_chain(self, chain: Sequence[Order]) -> list[Answer]:
        """Orders that pass or fail together."""
        recalled = [self._recall(order) for order in chain]
        if all(recalled):
            return [answer for answer in recalled if answer is not None]
        before = self._mark()
        answers: list[Answer] = []
        for order in chain:
            answer = self._recall(order) or self._try(order)
            answers.append(answer)
            if answer.result is not Result.OK:
                break
        else:
            return answers
        self._undo(before)
        return self._refuse_chain(chain, len(answers) - 1, answers[-1])

    def refuse_open_chain(self, chain: Sequence[Order]) -> list[Answer]:
        """A chain whose last order is linked to nothing; nothing is kept of it."""
        refused = [Answer(Result.LINKED_EVENT_FAILED) for _ in chain[:-1]]
        return [*refused, Answer(Result.LINKED_EVENT_CHAIN_OPEN)]

    def _refuse_chain(self, chain: Sequence[Order], at: int, cause: Answer) -> list[Answer]:
        answers = []
        for index, order in enumerate(chain):
            if index == at:
                answers.append(self._keep_refusal(order, cause))
                continue
            linked = self._recall(order) or Answer(Result.LINKED_EVENT_FAILED)
            if linked.record is None and cause.result in _CAUSES_KEPT:
                linked = self._refused(order, linked)
            answers.append(linked)
        return answers

    # What is known of an id ------------------------------------------------------------

    def _record_of(self, order_id: UUID) -> Record | None:
        return self._new.get(order_id) or self._known.get(order_id)

    def _recall(self, order: Order) -> Answer | None:
        record = self._record_of(order.order_id)
        if record is None:
            return None
        if record.tenant != order.tenant or record.fingerprint != order.fingerprint:
            return Answer(Result.EXISTS_WITH_DIFFERENT_FIELDS)
        if record.state is State.REFUSED:
            return Answer(Result.ID_ALREADY_FAILED, record, record.concerns)
        return Answer(Result.EXISTS, record)

    def _keep_refusal(self, order: Order, answer: Answer) -> Answer:
        if answer.result in KEPT:
            return self._refused(order, answer)
        return answer

    def _refused(self, order: Order, answer: Answer) -> Answer:
        record = Record(
            order.order_id,
            order.tenant,
            order.owner,
            State.REFUSED,
            order.fingerprint,
            self._now_us,
            result=answer.result,
            concerns=answer.concerns,
        )
        self._add(record)
        return Answer(answer.result, record, answer.concerns)

    def _add(self, record: Record) -> None:
        self._new[record.order_id] = record
        self.outcome.records.append(record)

    # Deciding --------------------------------------------------------------------------

    def _try(self, order: Order) -> Answer:
        if order.pending_id is not None:
            return self._try_end_of_hold(order, order.pending_id)
        if order.reference:
            key = (order.tenant, order.owner.id, order.reference)
            if key in self._references:
                return Answer(Result.REFERENCE_TAKEN)
        is_hold = order.kind is Kind.HOLD
        standings = []
        for entry in order.entries:
            standing = self._touched.get(entry.account_id) or self._accounts.get(entry.account_id)
            if standing is None or standing.tenant != order.tenant:
                return Answer(Result.ACCOUNT_NOT_FOUND, concerns=entry.account_id)
            result = _refusal(standing, entry, order, is_hold=is_hold)
            if result is not Result.OK:
                return Answer(result, concerns=entry.account_id)
            standings.append(standing)
        entries = tuple(
            self._move(standing, entry.side, entry.minor_units, is_hold=is_hold)
            for standing, entry in zip(standings, order.entries, strict=True)
        )
        if order.reference:
            self._references[key] = order.order_id
        return self._passed(order, _STATE_OF_KIND[order.kind], entries)

    def _try_end_of_hold(self, order: Order, pending_id: UUID) -> Answer:
        hold = self._record_of(pending_id)
        if (
            hold is None
            or hold.tenant != order.tenant
            or hold.state in (State.POSTED, State.REFUSED)
        ):
            return Answer(Result.PENDING_TRANSFER_NOT_FOUND)
        if order.payer is not None and hold.owner != order.payer:
            return Answer(Result.PENDING_TRANSFER_NOT_FOUND)
        state = self.outcome.ended.get(pending_id, hold.state)
        if state is not State.HELD:
            return Answer(_ENDED[state])
        is_over = hold.expires_at_us is not None and hold.expires_at_us <= self._now_us
        if order.kind is Kind.POST_HOLD and is_over:
            return Answer(Result.PENDING_TRANSFER_EXPIRED)
        held = [entry.held_minor_units for entry in hold.entries]
        part = order.minor_units
        if part is not None and (len(held) != 2 or not 0 < part <= held[0]):
            return Answer(Result.EXCEEDS_PENDING_TRANSFER_AMOUNT)
        entries = tuple(
            self._release(entry, 0 if order.kind is not Kind.POST_HOLD else (part or units))
            for entry, units in zip(hold.entries, held, strict=True)
        )
        self.outcome.ended[pending_id] = _STATE_OF_HOLD[order.kind]
        return self._passed(order, State.POSTED, entries)

    def _passed(self, order: Order, state: State, entries: tuple[JournalEntry, ...]) -> Answer:
        record = Record(
            order.order_id,
            order.tenant,
            order.owner,
            state,
            order.fingerprint,
            self._now_us,
            order.reference,
            order.description,
            entries,
            pending_id=order.pending_id,
            expires_at_us=order.expires_at_us,
        )
        self._add(record)
        return Answer(Result.OK, record)

    # Moving ----------------------------------------------------------------------------

    def _move(
        self, standing: Standing, side: int, minor_units: int, *, is_hold: bool
    ) -> JournalEntry:
        if is_hold:
            return self._write(standing, side, 0, minor_units)
        return self._write(standing, side, minor_units, 0)

    def _release(self, held: JournalEntry, minor_units: int) -> JournalEntry:
        standing = self._touched.get(held.account_id) or self._accounts[held.account_id]
        return self._write(standing, held.side, minor_units, -held.held_minor_units)

    def _write(self, standing: Standing, side: int, minor_units: int, held: int) -> JournalEntry:
        account_id = standing.account_id
        if account_id not in self._touched:
            standing = self._touched[account_id] = standing.copy()
        standing.sequence += 1
        if side == Side.DEBIT:
            standing.posted_debit += minor_units
            standing.pending_debit += held
        else:
            standing.posted_credit += minor_units
            standing.pending_credit += held
        return JournalEntry(
            account_id,
            standing.owner,
            side,
            standing.currency_code,
            minor_units,
            standing.sequence,
            held,
            standing.posted_debit,
            standing.posted_credit,
            standing.pending_debit,
            standing.pending_credit,
            standing.floor_side,
        )

    # Undoing a chain -------------------------------------------------------------------

    def _mark(
        self,
    ) -> tuple[int, dict[UUID, Standing], dict[UUID, State], dict[tuple[str, UUID, str], UUID]]:
        standings = {key: standing.copy() for key, standing in self._touched.items()}
        return (
            len(self.outcome.records),
            standings,
            dict(self.outcome.ended),
            dict(self._references),
        )

    def _undo(
        self,
        mark: tuple[
            int, dict[UUID, Standing], dict[UUID, State], dict[tuple[str, UUID, str], UUID]
        ],
    ) -> None:
        count, self._touched, self.outcome.ended, references = mark
        self._references = references
        for record in self.outcome.records[count:]:
            del self._new[record.order_id]
        del self.outcome.records[count:]


def _refusal(standing: Standing, entry: NewEntry, order: Order, *, is_hold: bool) -> Result:
    """Why an account does not take an entry; OK if it does."""
    # A table: each rule, those of who may before those of how much.
    is_debit = entry.side == Side.DEBIT
    is_foreign = is_debit and order.payer is not None and standing.owner != order.payer
    is_cash = order.is_transfer and standing.normal_side != Side.CREDIT
    if is_foreign or (is_cash and not is_debit):
        result = Result.ACCOUNT_NOT_FOUND  # whether it exists is nobody's business
    elif is_cash:
        result = Result.ACCOUNT_NOT_TRANSFERABLE
    elif not standing.is_open:
        result = Result.ACCOUNT_ALREADY_CLOSED
    elif standing.currency_code != entry.currency_code:
        result = Result.CURRENCY_MISMATCH
    else:
        result = _excess(standing, entry.minor_units, is_debit=is_debit)
    return result


def _excess(standing: Standing, minor_units: int, *, is_debit: bool) -> Result:
    """Whether one side would outweigh the other; what is held pays for nothing."""
    debit = standing.posted_debit + standing.pending_debit
    credit = standing.posted_credit + standing.pending_credit
    if (debit if is_debit else credit) + minor_units > INT64_MAX:
        return Result.OVERFLOWS
    if standing.may_overdraw or is_debit is not (standing.normal_side == Side.CREDIT):
        return Result.OK
    if is_debit:
        return Result.EXCEEDS_CREDITS if debit + minor_units > standing.posted_credit else Result.OK
    return Result.EXCEEDS_DEBITS if credit + minor_units > standing.posted_debit else Result.OK
