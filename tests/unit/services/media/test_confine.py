"""What a confined program still can do. It runs as a program: the ties cannot be undone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from services.media import confine

CONFINE = Path(confine.__file__)
HAS_LANDLOCK = (
    "import sys; sys.path.insert(0, {!r}); import confine; print(confine.confine_files([], []))"
)
SYSTEM = ["/lib", "/lib64", "/usr", sys.prefix, sys.base_prefix]


def run_confined(code: str, *, readable: list[str], writable: list[str]) -> str:
    ties = json.dumps({"readable": [*SYSTEM, *readable], "writable": writable})
    python = str(Path(sys.executable).resolve())
    argv = [sys.executable, "-I", "-S", str(CONFINE), ties, python, "-I", "-S", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.fixture(scope="module")
def landlock() -> None:
    code = HAS_LANDLOCK.format(str(CONFINE.parent))
    argv = [sys.executable, "-I", "-S", "-c", code]
    if (
        subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
        != "True"
    ):
        pytest.skip("this kernel has no Landlock")


def test_files_that_are_not_listed_cannot_be_read(landlock, tmp_path):
    secret, listed = tmp_path / "secret", tmp_path / "listed"
    secret.write_text("canary")
    listed.write_text("fine")
    for path, expected in ((listed, "fine"), (secret, "PermissionError"), ("/etc/passwd", "Perm")):
        code = f"print(open({str(path)!r}).read())"
        assert run_confined(code, readable=[str(listed)], writable=[]).startswith(expected)


def test_only_the_output_folder_can_be_written(landlock, tmp_path):
    (tmp_path / "out").mkdir()
    for name, expected in (("out/x", "1"), ("x", "PermissionError")):
        code = f"print(open({str(tmp_path / name)!r}, 'w').write('x'))"
        answer = run_confined(code, readable=[], writable=[str(tmp_path / "out")])
        assert answer.startswith(expected)


def test_nothing_can_be_reached_over_the_network(landlock):
    code = "import socket; socket.create_connection(('127.0.0.1', 9), 2)"
    answer = run_confined(code, readable=[], writable=[])
    assert "PermissionError" in answer or "unreachable" in answer
