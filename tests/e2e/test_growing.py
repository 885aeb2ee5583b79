"""A shard is added to a mesh that is used, by the command that operators type."""

import secrets
import time
from uuid import UUID

import pytest

from shared.db.ids import bucket_of
from tests.growing import KILLED, shards, told
from tests.mesh import Mesh

DAY = time.strftime("%Y-%m-%d", time.gmtime())


@pytest.mark.rare
def test_a_mesh_goes_on_with_data_on_a_shard_whose_adding_was_killed_and_repeated(
    mesh: Mesh, sign_in
) -> None:
    bearer = {"Authorization": f"Bearer {sign_in(mesh)}"}

    def run_report() -> str:
        headers = {**bearer, "Idempotency-Key": secrets.token_hex(8)}
        body = {"firstDay": DAY, "lastDay": DAY}
        answered = mesh.post("/v1/reportRuns", json=body, headers=headers)
        assert answered.status_code == 200, answered.text
        return str(answered.json()["name"])

    name = run_report()
    bucket = str(bucket_of(UUID(name.rpartition("/")[2])))
    assert shards(mesh, "add", "reporting", killed_after="add.made").returncode == KILLED
    new = told(shards(mesh, "add", "reporting", "--json"))["shard"]
    told(shards(mesh, "move", "reporting", "--buckets", bucket, "--to", str(new), "--json"))
    assert mesh.get(f"/v1/{name}", headers=bearer).status_code == 200
    assert bucket_of(UUID(run_report().rpartition("/")[2])) == int(bucket)
    assert told(shards(mesh, "rebalance", "reporting", "--max-moves", "2", "--json"))
    assert told(shards(mesh, "verify", "reporting", "--json")) == {
        "ok": True,
        "open_moves": 0,
        "wrong": [],
    }
