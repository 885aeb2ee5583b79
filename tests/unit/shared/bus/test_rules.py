from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold.ledger.v1.ledger_events_pb2 import TransactionPosted
from tenfold.ledger.v1.ledger_pb2 import Account

from shared.bus import rules
from shared.bus.rules import Verdict
from shared.db.ids import bucket_of


@pytest.mark.parametrize(
    ("seen", "event_no", "verdict"),
    [
        (None, 1, Verdict.APPLY),
        (None, 2, Verdict.GAP),
        (1, 1, Verdict.STALE),
        (1, 2, Verdict.APPLY),
        (1, 3, Verdict.GAP),
        (7, 3, Verdict.STALE),
    ],
)
def test_only_the_next_number_of_an_aggregate_is_applied(seen, event_no, verdict):
    assert rules.verdict_of(seen, event_no) is verdict


@given(st.data(), st.integers(1, 12))
def test_in_whatever_order_and_however_often_events_arrive_each_is_applied_once(data, count):
    """A gap is put back; what is left over at the end is applied by going round again."""
    waiting = data.draw(st.permutations([*range(1, count + 1)] * 2))
    seen, applied = None, []
    while waiting:
        put_back = []
        for event_no in waiting:
            verdict = rules.verdict_of(seen, event_no)
            if verdict is Verdict.APPLY:
                applied.append(event_no)
                seen = event_no
            elif verdict is Verdict.GAP:
                put_back.append(event_no)
        assert len(put_back) < len(waiting), "no progress"
        waiting = put_back
    assert applied == [*range(1, count + 1)]


@given(st.integers(1, 10**6), st.floats(-1, 1))
def test_a_pause_doubles_up_to_a_minute_and_strays_a_fifth(deliveries, spread):
    pause_s = rules.backoff_s(deliveries, spread=spread)
    middle_s = rules.backoff_s(deliveries, spread=0)
    assert 0.4 <= pause_s <= 72
    assert abs(pause_s - middle_s) <= middle_s * 0.2 + 1e-9
    assert middle_s == min(60, 0.5 * 2 ** min(deliveries - 1, 20))


@given(st.integers(0, 4095), st.text(max_size=20), st.uuids())
def test_a_dead_letter_has_one_id_for_every_try_and_it_carries_the_bucket(bucket, name, message_id):
    letter = rules.dead_letter_id(bucket, name, message_id)
    assert letter == rules.dead_letter_id(bucket, name, message_id)
    assert bucket_of(letter) == bucket
    assert letter.version == 8


def test_consumers_of_one_message_have_dead_letters_of_their_own():
    message_id = uuid4()
    letters = {rules.dead_letter_id(1, name, message_id) for name in ("a", "b")}
    assert len(letters) == 2
    assert isinstance(letters.pop(), UUID)


def test_a_subject_names_service_type_and_bucket():
    subject = rules.event_subject("payment", "tenfold.ledger.v1.TransactionPosted", 77)
    assert subject == "evt.payment.TransactionPosted.77"
    assert rules.bucket_of_subject(subject) == 77
    assert rules.work_subject("media", "transcode", 5) == "wrk.media.transcode.5"


def test_a_message_tells_which_service_emits_it():
    assert rules.source_of(TransactionPosted) == "payment"


def test_a_message_that_is_no_event_is_refused_at_once():
    with pytest.raises(ValueError, match="declares no event option"):
        rules.source_of(Account)
