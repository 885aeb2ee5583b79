"""The data folder: private, locked, with its keys."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from deploy.local.data_folder import open_data_folder
from deploy.local.errors import LaunchError
from deploy.local.processes import mark


def test_everything_in_it_is_for_its_owner_alone(tmp_path: Path) -> None:
    with open_data_folder(tmp_path / "data") as folder:
        folder.make_keys()
        folder.write_state({"ready": False})
    found = [folder.path, *folder.path.rglob("*")]
    assert len(found) > 10
    assert [path for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_keys_are_made_once_and_belong_together(tmp_path: Path) -> None:
    with open_data_folder(tmp_path / "data") as folder:
        folder.make_keys()
        before = {path: path.read_bytes() for path in folder.identity.iterdir()}
        secret = folder.secret.read_bytes()
        folder.make_keys()
    assert before == {path: path.read_bytes() for path in folder.identity.iterdir()}
    assert folder.secret.read_bytes() == secret
    assert len(secret) == 32
    private = load_pem_private_key(before[folder.identity / "edge.pem"], None)
    assert private.public_key() == load_pem_public_key(before[folder.identity / "edge.pub"])
    assert {path.name for path in before} == {
        "edge.pem",
        "edge.pub",
        "services.pem",
        "services.pub",
    }


def test_a_second_mesh_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    with open_data_folder(tmp_path / "data") as folder:
        launcher = mark(os.getpid())
        folder.write_state({"launcher": {"pid": launcher.pid, "started": launcher.started}})
        with (
            pytest.raises(LaunchError, match=rf"in use by another mesh \(process {os.getpid()}\)"),
            open_data_folder(tmp_path / "data"),
        ):
            pass
    with open_data_folder(tmp_path / "data"):
        pass  # it is free again


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    mode = tmp_path.stat().st_mode
    with pytest.raises(LaunchError, match="holds no Tenfold data"), open_data_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert tmp_path.stat().st_mode == mode


def test_a_folder_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LaunchError, match=r"cannot be written \(Not a directory\)"),
        open_data_folder(tmp_path / "file" / "data"),
    ):
        pass


def test_the_next_mesh_waits_for_the_children_of_a_killed_one(tmp_path: Path) -> None:
    with open_data_folder(tmp_path / "data") as folder:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
        child_mark = mark(child.pid)
        entry = {"pid": child_mark.pid, "started": child_mark.started}
        folder.write_state({"children": {"services": entry}})
    with open_data_folder(tmp_path / "data"):
        assert not child_mark.is_alive
    child.wait()


def test_a_torn_state_file_is_no_state(tmp_path: Path) -> None:
    with open_data_folder(tmp_path / "data") as folder:
        (folder.path / "state.json").write_text('{"launcher": ')
        assert folder.read_state() == {}
        folder.write_state({"ready": True})
        assert json.loads((folder.path / "state.json").read_text()) == {"ready": True}
