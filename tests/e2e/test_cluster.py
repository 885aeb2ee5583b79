"""`tenfold up --profile cluster`: the same calls, on sharded Postgres behind two edges."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import httpx
import pytest

from deploy.local.data_folder import ClusterShape, DataFolder
from tests.backups import begin_story, flowing
from tests.failover import hit, primaries, until_redundant, wrongs
from tests.mesh import ROOT, Mesh, poll_until, running_mesh

SIZE = ["--shards", "2", "--replicas", "1"]
NAMES = {
    *("auth", "media", "notification", "payment-1", "payment-2", "reporting", "edge-1", "edge-2"),
    *("nats-1", "nats-2", "nats-3", "valkey", "mail"),
    *("postgres-0-node_1", "postgres-0-node_2", "postgres-1-node_1", "postgres-1-node_2"),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two shards with a replica each, the smallest that has all of it."""
    data = tmp_path_factory.mktemp("cluster") / "data"
    places: list[str] = []
    try:
        with running_mesh(data, options=["--profile", "cluster", *SIZE]) as mesh:
            places += mesh.state["databases"]
            yield mesh
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def tenfold(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "deploy.cli", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def databases_of(mesh: Mesh, service: str) -> list[str]:
    settings = json.loads((mesh.data / "databases.json").read_text())
    dsns: list[str] = settings[f"TENFOLD_{service.upper()}_DATABASE"].split(",postgresql")
    return [dsns[0], *(f"postgresql{dsn}" for dsn in dsns[1:])]


def test_every_part_is_a_process_of_its_own(cluster: Mesh) -> None:
    assert set(cluster.state["children"]) == NAMES
    assert not list((cluster.data / "services").rglob("*.sqlite"))


def test_the_demo_passes_on_it_unchanged(cluster: Mesh) -> None:
    told = tenfold("demo", "--data", str(cluster.data))
    assert told.returncode == 0, told.stdout + told.stderr


def test_both_edges_are_told_and_know_what_the_other_wrote(cluster: Mesh) -> None:
    first, second = cluster.state["edges"]
    token = cluster.sign_up_and_in()
    answers = [
        httpx.get(f"{edge}/v1/sessions", headers={"Authorization": f"Bearer {token}"})
        for edge in (first, second)
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert first in cluster.output
    assert second in cluster.output


async def test_the_replicas_follow_every_shard(cluster: Mesh) -> None:
    for dsn in databases_of(cluster, "auth"):
        hosts = dsn.rpartition("@")[2].partition("/")[0].split(",")
        roles = []
        for host in hosts:
            one = await asyncpg.connect(dsn.replace(",".join(hosts), host))
            roles.append(await one.fetchval("SELECT pg_is_in_recovery()"))
            await one.close()
        assert roles == [False, True]


def test_the_shards_commands_find_the_running_cluster(cluster: Mesh) -> None:
    told = tenfold("shards", "list", "auth", "--json", "--data", str(cluster.data))
    assert told.returncode == 0, told.stderr
    rows = json.loads(told.stdout)
    assert [row["buckets"] for row in rows] == [2048, 2048]
    assert tenfold("shards", "verify", "auth", "--data", str(cluster.data)).returncode == 0


def test_events_are_kept_on_three_servers(cluster: Mesh) -> None:
    cluster.sign_up_and_in()
    kept = [cluster.data / "nats" / f"nats-{number}" for number in (1, 2, 3)]

    def all_have_it() -> bool:
        return all(list(folder.rglob("streams/EVT_auth*")) for folder in kept)

    poll_until(all_have_it, timeout_s=30, what="a copy of auth's events on each server")


def test_the_status_names_primaries_and_standbys(cluster: Mesh) -> None:
    until_redundant(cluster)
    told = tenfold("status", "--data", str(cluster.data)).stdout
    assert told.count("  primary\n") == 2, told
    assert told.count(" bytes  standby, may be promoted\n") == 2
    for name in NAMES:
        assert name in told


def test_a_dead_primary_is_replaced_while_money_moves_and_is_then_a_standby(cluster: Mesh) -> None:
    until_redundant(cluster)
    with flowing(begin_story(cluster)) as traffic:
        before = primaries(cluster)
        for name in before:
            hit(cluster, name, signal.SIGKILL)
        traffic.wait_for(20)  # nobody has to do anything
        until_redundant(cluster)
        after = primaries(cluster)
        assert not set(before) & set(after)
        for name in after:  # back to those that had died
            hit(cluster, name, signal.SIGKILL)
        traffic.wait_for(20)
        poll_until(lambda: primaries(cluster) == before, timeout_s=30, what="the first primaries")
    assert not traffic.failures
    assert wrongs(traffic) == []


def test_nobody_promotes_behind_the_launchers_back(cluster: Mesh) -> None:
    told = tenfold("shards", "promote", "auth/1", "--data", str(cluster.data))
    assert told.returncode == 1
    assert "promotes by itself" in told.stderr


def test_a_restart_finds_everything_and_leaves_nothing_behind(cluster: Mesh) -> None:
    token = cluster.sign_up_and_in()
    before = primaries(cluster)
    cluster.launcher.send_signal(signal.SIGINT)
    assert cluster.launcher.wait(60) == 0
    assert cluster.stop() == 0
    assert not (cluster.data / "databases.json").exists()
    cluster.start()
    assert primaries(cluster) == before
    found = cluster.get("/v1/sessions", headers={"Authorization": f"Bearer {token}"})
    assert found.status_code == 200


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--profile", "cluster", "--shards", "1"], "--shards is 1, and the cluster in"),
        (["--profile", "cluster", "--replicas", "0"], "--replicas is 0, and the cluster in"),
        (["--profile", "embedded"], "holds the data of the profile 'cluster'"),
        (["--shards", "2"], "of use only with --profile cluster"),
        (["--asynchronous"], "of use only with --profile cluster"),
        (["--profile", "moon"], "There is no profile 'moon'"),
    ],
)
def test_a_start_that_would_lose_sight_of_data_is_refused(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "lock").touch()
    DataFolder(tmp_path).write_cluster(ClusterShape("x", shards=2, replicas=1))
    told = tenfold("up", "--data", str(tmp_path), "--edge", "127.0.0.1:0", *arguments)
    assert told.returncode == 1
    assert sentence in told.stderr
