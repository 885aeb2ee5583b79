"""Benches are run by hand, long after the code they measure has changed: they must still start."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["edge", "http", "quota"])
def test_a_bench_explains_itself(name: str) -> None:
    command = [sys.executable, "-m", f"tests.bench.bench_{name}", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"usage: make bench-{name}")
    assert "ARGS=--quick" in told
