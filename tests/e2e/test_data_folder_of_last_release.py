"""A data folder that the last release wrote opens in this one, with everything in it."""

import json
import tarfile
from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
# One archive per release that must still open; make the next with tests/fixtures/make.py.
RELEASES = sorted(FIXTURES.glob("data-*.tar.xz"))


@pytest.mark.parametrize("archive", RELEASES, ids=lambda path: path.name)
def test_a_data_folder_of_an_earlier_release_opens(archive: Path, tmp_path: Path, start_mesh):
    with tarfile.open(archive) as tar:
        # Python 3.11.0 to 3.11.3 know no filters; later ones want one named.
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    told = json.loads((tmp_path / "told.json").read_text())
    with start_mesh(data=tmp_path / "data") as mesh:
        login = mesh.post(
            "/v1/sessions", json={"email": told["email"], "password": told["password"]}
        )
        assert login.status_code == 200, login.text
        headers = {"Authorization": f"Bearer {login.json()['tokens']['accessToken']}"}
        balance = mesh.get(f"/v1/{told['account']}/balance", headers=headers).json()
        assert balance["availableMinorUnits"] == told["available_minor_units"]
        videos = mesh.get("/v1/videos", headers=headers).json()["videos"]
        assert [video["name"] for video in videos] == [told["video"]]
        playlist = mesh.get(f"/v1/{told['video']}/files/master.m3u8", headers=headers)
        assert playlist.text.startswith("#EXTM3U")
        items = mesh.get("/v1/inbox/items", headers=headers).json()["items"]
        assert "video.ready" in {item["category"] for item in items}
        operator = {"Authorization": f"Bearer {mesh.admin_key}"}
        totals = mesh.get("/v1/trialBalance", headers=operator).json()["totals"]
        assert totals == told["totals"]


def test_there_is_an_archive_to_open() -> None:
    assert RELEASES
