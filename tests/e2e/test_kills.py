"""Processes are killed while a user's story is told: it can be finished, and nothing is wrong."""

import importlib
import pkgutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import edge
import services
import shared
from deploy.local.address import free_addresses
from shared.crashpoints import CRASH_JOURNAL_VARIABLE, CRASH_POINT_VARIABLE, CrashPoint
from tests.kills import Told, kill_at_random, told_to, violations

SEED = 20261123
ROOT = Path(__file__).resolve().parents[2]


def every_crash_point() -> set[str]:
    """The names of all points declared in the tree."""
    for package in (shared, services, edge):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    return set(CrashPoint.registry)


def make_keys_on_other_shards(told: Told) -> None:
    """Keyed calls of an operator: most keys have their home on another shard than the effect."""
    for number in range(8):
        body = {"displayName": f"{number}", "scopes": ["ledger.read"], "expireTime": in_an_hour()}
        told.story.rest.call(
            "POST", "/v1/apiKeys", body, token=told.mesh.admin_key, key=f"key-{number}"
        )


def in_an_hour() -> str:
    return (datetime.now(UTC) + timedelta(hours=1)).isoformat()


def test_three_random_kills_lose_nothing_and_double_nothing(start_mesh) -> None:
    print(f"seed {SEED}")
    with start_mesh(edge=str(free_addresses(1)[0])) as mesh:
        told = told_to(mesh)
        told.begin()
        victims = kill_at_random(told, seed=SEED, kills=3, pause_s=(0.3, 2.0))
        told.finish()
        print(f"killed: {victims}")
        assert violations(told) == []


def test_a_story_survives_a_kill_at_every_crash_point(start_mesh, tmp_path: Path) -> None:
    points = every_crash_point()
    journal = tmp_path / "crashed"
    environ = {CRASH_POINT_VARIABLE: ",".join(points), CRASH_JOURNAL_VARIABLE: str(journal)}
    with start_mesh(edge=str(free_addresses(1)[0]), environ_of_start=environ) as mesh:
        told = told_to(mesh)
        told.begin()
        told.finish()
        make_keys_on_other_shards(told)
        assert violations(told) == []
    never_reached = points - set(journal.read_text().split())
    assert not never_reached
