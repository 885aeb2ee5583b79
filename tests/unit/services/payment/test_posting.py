"""Batches are decided as a simple ledger would, one order after the other."""

from dataclasses import dataclass, field, replace
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.payment.domain import INT64_MAX, NewEntry, Owner, OwnerKind, Side
from services.payment.posting import (
    Kind,
    Order,
    Outcome,
    Record,
    Result,
    Standing,
    State,
    apply,
)
from shared.db.ids import new_id

ADA, BOB = (Owner(OwnerKind.USER, new_id(1)) for _ in range(2))
NOW_US, LATER_US = 1_000, 2_000


def standing(**but) -> Standing:
    values = {
        "account_id": new_id(1),
        "tenant": "default",
        "owner": ADA,
        "currency_code": "EUR",
        "normal_side": Side.CREDIT,
        "may_overdraw": False,
        "is_open": True,
        **but,
    }
    return Standing(**values)


def pair(payer: UUID, payee: UUID, units: int, code: str = "EUR") -> tuple[NewEntry, NewEntry]:
    return (
        NewEntry(payer, Side.DEBIT, code, units, "account", "amount"),
        NewEntry(payee, Side.CREDIT, code, units, "to_account", "amount"),
    )


def order(debited: Standing, credited: Standing, units: int, **but) -> Order:
    values = {
        "order_id": new_id(1),
        "tenant": "default",
        "owner": ADA,
        "entries": pair(debited.account_id, credited.account_id, units),
        "fingerprint": b"asked",
        **but,
    }
    return Order(**values)


def ending(hold: Order, kind: Kind, **but) -> Order:
    return replace(hold, order_id=new_id(1), entries=(), kind=kind, pending_id=hold.order_id, **but)


@dataclass
class Books:
    """A database in memory: what a batch leaves is there for the next."""

    accounts: dict[UUID, Standing]
    known: dict[UUID, Record] = field(default_factory=dict)
    references: dict[tuple[str, UUID, str], UUID] = field(default_factory=dict)

    @classmethod
    def of(cls, *standings: Standing) -> "Books":
        return cls({one.account_id: one for one in standings})

    def run(self, *orders: Order, now_us: int = NOW_US) -> list[Result]:
        outcome = apply(
            self.accounts, self.known, orders, now_us=now_us, references=self.references
        )
        self.keep(outcome)
        return [answer.result for answer in outcome.answers]

    def keep(self, outcome: Outcome) -> None:
        for record in outcome.records:
            assert record.order_id not in self.known, "a primary key"
            self.known[record.order_id] = record
            if record.reference:
                self.references[record.tenant, record.owner.id, record.reference] = record.order_id
            for entry in record.entries:
                before = self.accounts[entry.account_id]
                assert entry.sequence == before.sequence + 1, "numbers without a gap"
                self.accounts[entry.account_id] = replace(
                    before,
                    sequence=entry.sequence,
                    posted_debit=entry.posted_debit,
                    posted_credit=entry.posted_credit,
                    pending_debit=entry.pending_debit,
                    pending_credit=entry.pending_credit,
                )
        for hold_id, state in outcome.ended.items():
            assert self.known[hold_id].state is State.HELD, "a hold ends once"
            self.known[hold_id] = replace(self.known[hold_id], state=state)

    def available(self, account_id: UUID) -> int:
        one = self.accounts[account_id]
        return one.posted_credit - one.posted_debit - one.pending_debit


@pytest.fixture
def books() -> Books:
    """Cash that may be overdrawn, and two accounts with 100 each."""
    cash = standing(normal_side=Side.DEBIT, may_overdraw=True)
    first, second = (standing() for _ in range(2))
    made = Books.of(cash, first, second)
    assert made.run(order(cash, first, 100), order(cash, second, 100)) == [Result.OK] * 2
    return made


def three(books: Books) -> list[Standing]:
    return list(books.accounts.values())


def test_a_repeat_is_told_that_it_exists_also_within_one_batch(books):
    _, first, second = three(books)
    asked = order(first, second, 30)
    assert books.run(asked, asked) == [Result.OK, Result.EXISTS]
    assert books.run(asked) == [Result.EXISTS]
    assert books.available(first.account_id) == 70


def test_another_order_under_the_same_id_is_refused(books):
    _, first, second = three(books)
    asked = order(first, second, 30)
    books.run(asked)
    assert books.run(replace(asked, fingerprint=b"other")) == [Result.EXISTS_WITH_DIFFERENT_FIELDS]
    assert books.run(replace(asked, tenant="other")) == [Result.EXISTS_WITH_DIFFERENT_FIELDS]


def test_what_was_refused_for_want_of_money_stays_refused_when_there_is_some(books):
    cash, first, second = three(books)
    asked = order(first, second, 500)
    assert books.run(asked) == [Result.EXCEEDS_CREDITS]
    assert books.run(order(cash, first, 1_000), asked) == [Result.OK, Result.ID_ALREADY_FAILED]
    assert books.run(replace(asked, order_id=new_id(1))) == [Result.OK]


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ({"is_open": False}, Result.ACCOUNT_ALREADY_CLOSED),
        ({"currency_code": "USD"}, Result.CURRENCY_MISMATCH),
        ({"tenant": "other"}, Result.ACCOUNT_NOT_FOUND),
        ({"posted_credit": INT64_MAX}, Result.OVERFLOWS),
        ({"pending_credit": INT64_MAX - 100}, Result.OVERFLOWS),
    ],
    ids=["closed", "currency", "tenant", "overflow", "overflow of what is held"],
)
def test_an_account_that_does_not_take_an_entry_says_why_and_nothing_moves(books, change, result):
    _, first, second = three(books)
    books.accounts[second.account_id] = replace(second, **change)
    before = dict(books.accounts)
    assert books.run(order(first, second, 30)) == [result]
    assert books.accounts == before


def test_an_account_that_is_not_there_is_named(books):
    _, first, _ = three(books)
    missing = standing()
    outcome = apply(books.accounts, {}, [order(first, missing, 1)], now_us=NOW_US)
    assert outcome.answers[0].result is Result.ACCOUNT_NOT_FOUND
    assert outcome.answers[0].concerns == missing.account_id


def test_transfers_leave_the_operators_cash_and_others_accounts_alone(books):
    cash, first, second = three(books)
    asked = {"is_transfer": True, "payer": ADA}
    assert books.run(order(first, cash, 1, **asked)) == [Result.ACCOUNT_NOT_FOUND]
    assert books.run(order(cash, first, 1, **asked)) == [Result.ACCOUNT_NOT_TRANSFERABLE]
    foreign = order(first, second, 1, is_transfer=True, payer=BOB)
    assert books.run(foreign) == [Result.ACCOUNT_NOT_FOUND]


def test_a_reference_belongs_to_one_order_for_ever_also_within_one_batch(books):
    _, first, second = three(books)
    asked = [order(first, second, 1, reference="invoice 1") for _ in range(3)]
    assert books.run(*asked[:2]) == [Result.OK, Result.REFERENCE_TAKEN]
    assert books.run(asked[2]) == [Result.REFERENCE_TAKEN]


def test_a_chain_passes_or_fails_as_a_whole(books):
    _, first, second = three(books)
    chain = [
        order(first, second, 60, is_linked=True),
        order(first, second, 60, is_linked=True),
        order(second, first, 1),
    ]
    refused = [Result.LINKED_EVENT_FAILED, Result.EXCEEDS_CREDITS, Result.LINKED_EVENT_FAILED]
    after = order(first, second, 100)
    assert books.run(*chain, after) == [*refused, Result.OK]
    assert books.run(*chain) == [Result.ID_ALREADY_FAILED] * 3


def test_a_chain_that_has_passed_exists_as_a_whole(books):
    _, first, second = three(books)
    chain = [order(first, second, 30, is_linked=True), order(second, first, 10)]
    assert books.run(*chain) == [Result.OK] * 2
    assert books.run(*chain) == [Result.EXISTS] * 2


def test_a_chain_without_an_end_is_refused_and_may_come_again(books):
    _, first, second = three(books)
    opened = [order(first, second, 1, is_linked=True) for _ in range(2)]
    refused = [Result.LINKED_EVENT_FAILED, Result.LINKED_EVENT_CHAIN_OPEN]
    assert books.run(*opened) == refused
    assert books.run(opened[0], replace(opened[1], is_linked=False)) == [Result.OK] * 2


def test_what_is_held_cannot_be_spent_twice(books):
    _, first, second = three(books)
    hold = order(first, second, 80, kind=Kind.HOLD)
    assert books.run(hold, order(first, second, 30)) == [Result.OK, Result.EXCEEDS_CREDITS]
    assert books.available(second.account_id) == 100  # held, not received


def test_a_hold_is_posted_in_part_and_the_rest_is_free(books):
    _, first, second = three(books)
    hold = order(first, second, 80, kind=Kind.HOLD)
    assert books.run(hold, ending(hold, Kind.POST_HOLD, minor_units=50)) == [Result.OK] * 2
    assert books.available(first.account_id) == 50
    assert books.available(second.account_id) == 150
    again = [ending(hold, Kind.POST_HOLD), ending(hold, Kind.VOID_HOLD)]
    assert books.run(*again) == [Result.PENDING_TRANSFER_ALREADY_POSTED] * 2


def test_a_hold_that_is_voided_or_over_pays_nothing(books):
    _, first, second = three(books)
    holds = [order(first, second, 40, kind=Kind.HOLD, expires_at_us=LATER_US) for _ in range(2)]
    assert books.run(*holds, ending(holds[0], Kind.VOID_HOLD)) == [Result.OK] * 3
    late = ending(holds[1], Kind.POST_HOLD)
    assert books.run(late, now_us=LATER_US) == [Result.PENDING_TRANSFER_EXPIRED]
    assert books.run(ending(holds[1], Kind.EXPIRE_HOLD), now_us=LATER_US) == [Result.OK]
    assert books.available(first.account_id) == 100
    voided = ending(holds[0], Kind.POST_HOLD)
    assert books.run(voided) == [Result.PENDING_TRANSFER_ALREADY_VOIDED]


def test_a_hold_is_its_owners_and_no_more_than_it_is(books):
    _, first, second = three(books)
    hold = order(first, second, 40, kind=Kind.HOLD)
    books.run(hold)
    for other, result in (
        (ending(hold, Kind.POST_HOLD, payer=BOB), Result.PENDING_TRANSFER_NOT_FOUND),
        (ending(hold, Kind.POST_HOLD, tenant="other"), Result.PENDING_TRANSFER_NOT_FOUND),
        (ending(hold, Kind.POST_HOLD, minor_units=41), Result.EXCEEDS_PENDING_TRANSFER_AMOUNT),
    ):
        assert books.run(other) == [result]


class SimpleLedger:
    """The same rules in the slowest and plainest way: lists that are added up each time."""

    def __init__(self, ids: list[UUID]) -> None:
        self.cash, *_ = ids
        self.posted: list[tuple[UUID, UUID, int]] = []
        self.holds: dict[UUID, tuple[UUID, UUID, int] | None] = {}
        self.told: dict[UUID, bool] = {}

    def available(self, account: UUID) -> int:
        moves = [*self.posted]
        money = sum(units for _, to, units in moves if to == account)
        money -= sum(units for out, _, units in moves if out == account)
        return money - sum(hold[2] for hold in self.holds.values() if hold and hold[0] == account)

    def passes(self, asked: Order) -> bool:
        """Take an order, if it can be."""
        if asked.pending_id is not None:
            return self._end(asked, self.holds.get(asked.pending_id))
        payer, payee = (entry.account_id for entry in asked.entries)
        units = asked.entries[0].minor_units
        if payer != self.cash and self.available(payer) < units:
            return False
        if asked.kind is Kind.HOLD:
            self.holds[asked.order_id] = (payer, payee, units)
        else:
            self.posted.append((payer, payee, units))
        return True

    def _end(self, asked: Order, hold: tuple[UUID, UUID, int] | None) -> bool:
        if hold is None:
            return False
        self.holds[asked.pending_id] = None
        if asked.kind is Kind.POST_HOLD:
            self.posted.append((hold[0], hold[1], asked.minor_units or hold[2]))
        return True

    def run(self, batch: list[Order]) -> list[bool]:
        results, chain = [], []
        for asked in batch:
            chain.append(asked)
            if asked.is_linked:
                continue
            results += self._run_chain(chain)
            chain = []
        return results

    def _run_chain(self, chain: list[Order]) -> list[bool]:
        if all(asked.order_id in self.told for asked in chain):
            return [self.told[asked.order_id] for asked in chain]
        before = list(self.posted), dict(self.holds)
        for asked in chain:
            earlier = self.told.get(asked.order_id)
            if earlier is None and self.passes(asked):
                continue
            self.posted, self.holds = before
            return self._tell(chain, has_passed=False, is_kept=not earlier)
        return self._tell(chain, has_passed=True, is_kept=True)

    def _tell(self, chain: list[Order], *, has_passed: bool, is_kept: bool) -> list[bool]:
        for asked in chain if is_kept else ():
            self.told.setdefault(asked.order_id, has_passed)
        return [self.told.get(asked.order_id, has_passed) for asked in chain]


class BatchesAgree(RuleBasedStateMachine):
    """Batches of anything, beside the simple ledger."""

    def __init__(self) -> None:
        super().__init__()
        cash = standing(normal_side=Side.DEBIT, may_overdraw=True)
        self.books = Books.of(cash, *(standing() for _ in range(3)))
        self.ids = list(self.books.accounts)
        self.simple = SimpleLedger(self.ids)
        self.asked: list[Order] = []
        self.holds: list[Order] = []

    @rule(data=st.data(), size=st.integers(1, 6))
    def run_a_batch(self, data, size):
        batch = [self._draw(data, is_last=at == size - 1) for at in range(size)]
        expected = self.simple.run(batch)
        results = self.books.run(*batch)
        for one, has_passed, result in zip(batch, expected, results, strict=True):
            assert has_passed == (result in (Result.OK, Result.EXISTS)), (one, result)
        self.asked += batch

    def _draw(self, data, *, is_last: bool) -> Order:
        if self.asked and data.draw(st.integers(0, 9)) == 0:
            return replace(data.draw(st.sampled_from(self.asked)), is_linked=False)
        is_linked = not is_last and data.draw(st.integers(0, 3)) == 0
        if self.holds and data.draw(st.integers(0, 3)) == 0:
            kind = data.draw(st.sampled_from([Kind.POST_HOLD, Kind.VOID_HOLD]))
            hold = data.draw(st.sampled_from(self.holds))
            parts = st.none() | st.integers(1, hold.entries[0].minor_units)
            part = data.draw(parts) if kind is Kind.POST_HOLD else None
            return ending(hold, kind, minor_units=part, is_linked=is_linked)
        payer, payee = data.draw(st.permutations(self.ids))[:2]
        if payee == self.ids[0]:
            payer, payee = payee, payer
        kind = data.draw(st.sampled_from([Kind.POST, Kind.POST, Kind.HOLD]))
        made = order(
            self.books.accounts[payer],
            self.books.accounts[payee],
            data.draw(st.integers(1, 60)),
            kind=kind,
            is_linked=is_linked,
        )
        if kind is Kind.HOLD:
            self.holds.append(made)
        return made

    @invariant()
    def balances_agree_and_money_is_conserved(self):
        cash, *others = self.books.accounts.values()
        for one in others:
            available = self.books.available(one.account_id)
            assert available == self.simple.available(one.account_id) >= 0
        entries = [entry for record in self.books.known.values() for entry in record.entries]
        signed = [one.minor_units * (1 if one.side == Side.DEBIT else -1) for one in entries]
        held = [one.held_minor_units * (1 if one.side == Side.DEBIT else -1) for one in entries]
        assert sum(signed) == sum(held) == 0
        assert cash.posted_debit - cash.posted_credit == sum(
            one.posted_credit - one.posted_debit for one in others
        )


BatchesAgree.TestCase.settings = settings(max_examples=40, stateful_step_count=10, deadline=None)
TestBatchesAgree = BatchesAgree.TestCase
