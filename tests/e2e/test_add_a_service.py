"""The README's "Add a service in ten minutes", followed to the letter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_BLOCK = re.compile(r"^```\w+ file=(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def written_files() -> dict[str, str]:
    """Path -> content of every file that the README tells the reader to write."""
    text = (ROOT / "README.md").read_text()
    section = text.split("## Add a service in ten minutes", 1)[1].split("\n## ", 1)[0]
    return dict(FILE_BLOCK.findall(section))


@pytest.fixture(scope="module")
def followed_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout in which the steps were followed."""
    tree = tmp_path_factory.mktemp("clone") / "tenfold"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".tenfold", "__pycache__", ".*_cache", "*.egg-info"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    for name, content in written_files().items():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    subprocess.run([sys.executable, "proto/generate.py"], cwd=tree, check=True, capture_output=True)
    return tree


def test_the_steps_touch_nothing_in_the_edge() -> None:
    assert written_files()
    assert not [name for name in written_files() if name.startswith("edge/")]


def test_the_new_service_answers_over_rest(followed_tree: Path, start_mesh, sign_in) -> None:
    environ = {**os.environ, "PYTHONPATH": f"{followed_tree}:{followed_tree / 'proto' / 'gen'}"}
    with start_mesh(tree=followed_tree, environ=environ) as mesh:
        token = sign_in(mesh)
        headers = {"Authorization": f"Bearer {token}"}
        assert mesh.get("/v1/greetings/Ada", headers=headers).json() == {"text": "Hello, Ada!"}
        assert mesh.get("/v1/greetings/Ada").status_code == 401
        refused = mesh.get("/v1/greetings/" + "A" * 21, headers=headers)
        assert refused.status_code == 400
        assert "person" in refused.text
        assert "/v1/greetings/{person}" in mesh.get("/openapi.json").json()["paths"]
