"""What a backup says of itself, and what is not believed."""

import json
from dataclasses import replace

import pytest

from deploy.backup.manifest import BackedUpFile, Manifest
from deploy.backup.tree import is_skipped
from deploy.local.errors import LaunchError

MANIFEST = Manifest(
    cut_at_us=1_795_000_000_123_456,
    applied={"payment": [("framework", 1, "0001_framework", "ab")]},
    files=[BackedUpFile("data/secret", 32, "cd"), BackedUpFile("bus.jsonl", 0, "ef")],
)


def with_path(path: str) -> bytes:
    return replace(MANIFEST, files=[BackedUpFile(path, 1, "cd")]).to_bytes()


def changed(**changes: object) -> bytes:
    return json.dumps(json.loads(MANIFEST.to_bytes()) | changes).encode()


def test_it_is_read_as_it_was_written():
    assert Manifest.of_bytes(MANIFEST.to_bytes()) == MANIFEST
    assert MANIFEST.size_bytes == 32


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "data/../../secret",
        "/etc/passwd",
        "data//secret",
        "data/./secret",
        "data/",
        "data",
        "",
        ".",
        "..",
        "manifest.json",
        "elsewhere/secret",
        "data/a\0b",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(path):
    with pytest.raises(LaunchError, match="does not belong in one"):
        Manifest.of_bytes(with_path(path))


@pytest.mark.parametrize("path", ["data/a b/ü\n.eml", "data/..secret", "data/\udcff"])
def test_odd_names_of_files_are_kept(path):
    [file] = Manifest.of_bytes(with_path(path)).files
    assert file.path == path


def test_a_file_named_twice_is_refused():
    files = [BackedUpFile("data/secret", 1, "a"), BackedUpFile("data/secret", 1, "b")]
    with pytest.raises(LaunchError, match="names a file twice"):
        Manifest.of_bytes(replace(MANIFEST, files=files).to_bytes())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        MANIFEST.to_bytes()[:-20],
        changed(files=[]),
        changed(cut_at_us=1),
        changed(sha256=None),
        changed(format="1"),
    ],
    ids=["empty", "list", "null", "nothing", "no text", "deep", "cut", "fewer files", "other time",
         "unsigned", "odd format"],
)  # fmt: skip
def test_a_damaged_one_is_refused(content):
    with pytest.raises(LaunchError, match=r"manifest.json is damaged"):
        Manifest.of_bytes(content)


def test_a_later_format_is_refused_with_what_to_do():
    with pytest.raises(LaunchError, match=r"has format 2, and this version reads up to 1.*later"):
        Manifest.of_bytes(changed(format=2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logs/edge.log", True),
        ("nats/jetstream/x", True),
        ("valkey/valkey.conf", True),
        ("state.json", True),
        ("lock", True),
        (".backup-1234/0", True),
        ("identity/.edge.pem.12", True),
        ("services/media/work/v.1/360p.ts", True),
        ("services/auth/shards/shard-0.sqlite-wal", True),
        ("services/auth/shards/shard-0.sqlite-shm", True),
        ("services/auth/shards/shard-0.sqlite", False),
        ("services/media/uploads/01", False),
        ("services/media/videos/work/1", False),
        ("mail/logs", False),
        ("secret", False),
    ],
)
def test_what_belongs_into_a_backup(name, expected):
    assert is_skipped(name) is expected
