"""Whose turn it is among workers."""

import pytest

from edge.board import ABSENT, Board, Turn


@pytest.mark.parametrize(
    ("counts", "is_others"),
    [
        ([0, 0], False),
        ([1, 0], False),
        ([2, 0], True),
        ([100, 90], False),
        ([110, 90], True),
        ([50, ABSENT], False),
        ([50, ABSENT, 10], True),
    ],
    ids=["even", "slack", "ahead", "an eighth", "more", "alone", "one of two"],
)
def test_who_is_ahead_leaves_the_next_connection_to_another(counts, is_others):
    board = Board.make()
    for worker, count in enumerate(counts):
        Turn(board, worker).hold(count)
    assert Turn(board, 0).is_others() == is_others
    board.close()


def test_a_page_is_seen_by_all_who_have_it():
    board = Board.make()
    other = Board(board.descriptor)
    Turn(board, 3).hold(7)
    assert other.counts() == [7]
    Turn(board, 3).leave()
    assert other.counts() == []
