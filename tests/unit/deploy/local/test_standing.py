"""Who may be promoted, who is waited for, and who is the primary: decided without a server."""

import pytest

from deploy.local.errors import LaunchError
from deploy.local.standing import (
    AWAY_S_MAX,
    Role,
    Standing,
    heir_of,
    primary_of,
    read_standing,
    to_wait_for,
    write_standing,
)
from shared.db.postgres_connection import Server
from shared.db.postgres_promotion import Host

ABSENT, STANDBY, PRIMARY, FENCED = Role.ABSENT, Role.STANDBY, Role.PRIMARY, Role.FENCED


def host(lsn: int, *, has_received: bool = True) -> Host:
    server = Server("postgresql://x@127.0.0.1:1/x", "shard 0", "test")
    return Host(server, is_replica=True, lsn=lsn, has_received=has_received)


@pytest.mark.parametrize(
    ("roles", "last", "primary"),
    [
        ([ABSENT, ABSENT], "", "node_1"),
        ([PRIMARY, STANDBY], "", "node_1"),
        ([STANDBY, PRIMARY], "node_1", "node_2"),
        ([PRIMARY, ABSENT], "", "node_1"),
        ([FENCED, STANDBY], "node_1", "node_1"),
        ([FENCED, STANDBY], "", "node_1"),
        ([FENCED, PRIMARY], "node_1", "node_2"),
        ([FENCED, FENCED, STANDBY], "node_2", "node_2"),
    ],
    ids=[
        "a new shard's first node",
        "the one that is no standby",
        "the one that was promoted before this was written down",
        "the only one there is",
        "the fenced one, for nobody was promoted",
        "and so where nothing was written down",
        "the promoted one, which the fenced one is to follow",
        "of two that were fenced, the later",
    ],
)
def test_the_folders_tell_who_is_the_primary(roles: list[Role], last: str, primary: str) -> None:
    named = {f"node_{number}": role for number, role in enumerate(roles, 1)}
    assert primary_of(named, last) == primary


@pytest.mark.parametrize(
    ("roles", "sentence"),
    [
        ([PRIMARY, PRIMARY], r"node_1 \(primary\), node_2 \(primary\)"),
        ([ABSENT, STANDBY], r"node_1 \(absent\), node_2 \(standby\)"),
        ([FENCED, FENCED, STANDBY], r"node_1 \(fenced\), node_2 \(fenced\)"),
    ],
    ids=["two primaries", "the primary's folder has gone", "two fenced, and nothing written down"],
)
def test_what_only_an_operator_can_know_is_not_guessed(roles: list[Role], sentence: str) -> None:
    named = {f"node_{number}": role for number, role in enumerate(roles, 1)}
    with pytest.raises(LaunchError, match=sentence):
        primary_of(named, "")


A, B = "node_2", "node_3"


@pytest.mark.parametrize(
    ("promotable", "told", "heir"),
    [
        ({A}, {A: host(5)}, A),
        ({A}, {A: host(5, has_received=False)}, A),
        ({A}, {A: host(5), B: host(9)}, A),
        ({A, B}, {A: host(5), B: host(9)}, B),
        ({A, B}, {A: host(9), B: host(9)}, A),
        ({A, B}, {A: host(9)}, None),
        ({A, B}, {A: host(9), B: host(5, has_received=False)}, None),
        ({A}, {}, None),
        ({A}, {B: host(9)}, None),
        (set(), {A: host(9)}, None),
    ],
    ids=[
        "the only standby",
        "alone, it need not say how much it has",
        "no standby that commits did not wait for, whatever it has",
        "of two, the one that has more",
        "of two alike, the first",
        "nobody while one is silent: it may be the one that has all",
        "nobody while one may have more than it says",
        "nobody if none answers",
        "nobody if the wrong one answers",
        "nobody where commits wait for none",
    ],
)
def test_a_standby_is_promoted_only_if_it_surely_has_all(
    promotable: set[str], told: dict[str, Host], heir: str | None
) -> None:
    assert heir_of(frozenset(promotable), told) == heir


@pytest.mark.parametrize(
    ("promotable", "away_s", "waited_for"),
    [
        (set(), {A: 0, B: 0}, {A, B}),
        (set(), {A: 0.1, B: 0}, {B}),
        ({A}, {A: AWAY_S_MAX - 0.1, B: 9}, {A}),
        ({A}, {A: AWAY_S_MAX, B: 9}, set()),
        ({A, B}, {A: AWAY_S_MAX, B: 0}, {B}),
    ],
    ids=[
        "those that follow",
        "not one that does not yet",
        "one that has just gone, for a moment",
        "nobody, rather than for ever",
        "the other one",
    ],
)
def test_commits_wait_for_standbys_that_follow_or_were_there_a_moment_ago(
    promotable: set[str], away_s: dict[str, float], waited_for: set[str]
) -> None:
    assert to_wait_for(frozenset(promotable), away_s) == waited_for


@pytest.mark.parametrize("text", [None, "", "{}", '{"primary": 1', '{"primary": "node_1"}'])
def test_a_file_that_cannot_be_read_lets_nobody_be_promoted(tmp_path, text) -> None:
    path = tmp_path / "standing.json"
    write_standing(path, standing := Standing("node_1", frozenset({A})))
    assert read_standing(path) == standing
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert read_standing(path) == Standing("")
