"""`make check` refuses a bad or breaking contract, and judges our contracts alone."""

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "proto" / "gen" / "tenfold" / "contracts.binpb"
BASELINE = Path(__file__).with_name("baseline.binpb")
BUF = Path(sysconfig.get_path("scripts")) / "buf"
LEDGER = "tenfold/ledger/v1/ledger_service.proto"
FOREIGN = "google/api/http.proto"

Change = Callable[[FileDescriptorProto], None]


def misname_a_field(file: FileDescriptorProto) -> None:
    file.message_type[0].field[0].name = "BadName"


def remove_a_field(file: FileDescriptorProto) -> None:
    del file.message_type[0].field[0]


def remove_a_method(file: FileDescriptorProto) -> None:
    del file.service[0].method[0]


def changed_image(folder: Path, name: str, change: Change) -> Path:
    descriptors = FileDescriptorSet.FromString(IMAGE.read_bytes())
    [file] = [file for file in descriptors.file if file.name == name]
    change(file)
    image = folder / "changed.binpb"
    image.write_bytes(descriptors.SerializeToString())
    return image


def run_buf(command: str, image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = ["--config", str(ROOT / "buf.yaml")]
    whole = [str(BUF), command, str(image), *config, *arguments]
    return subprocess.run(whole, capture_output=True, text=True, check=False, timeout=60)


def lint(image: Path) -> subprocess.CompletedProcess[str]:
    return run_buf("lint", image)


def breaking(image: Path, against: Path = IMAGE) -> subprocess.CompletedProcess[str]:
    return run_buf("breaking", image, "--against", str(against))


def test_the_contracts_pass_lint_and_break_nothing() -> None:
    for run in (lint(IMAGE), breaking(IMAGE, BASELINE)):
        assert (run.returncode, run.stdout) == (0, "")


def test_a_badly_named_field_fails_the_lint_and_is_named(tmp_path: Path) -> None:
    run = lint(changed_image(tmp_path, LEDGER, misname_a_field))
    assert run.returncode != 0
    assert LEDGER in run.stdout
    assert "BadName" in run.stdout


@pytest.mark.parametrize("change", [remove_a_field, remove_a_method, misname_a_field])
def test_a_change_that_breaks_the_last_release_is_refused(tmp_path: Path, change: Change) -> None:
    run = breaking(changed_image(tmp_path, LEDGER, change))
    assert run.returncode != 0
    assert LEDGER in run.stdout


def test_contracts_of_others_are_not_ours_to_judge(tmp_path: Path) -> None:
    assert lint(changed_image(tmp_path, FOREIGN, misname_a_field)).returncode == 0
    assert breaking(changed_image(tmp_path, FOREIGN, remove_a_field)).returncode == 0


def test_generated_code_is_fresh() -> None:
    command = [sys.executable, "proto/generate.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
