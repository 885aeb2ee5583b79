"""tenfold backup and restore, on a data folder whose mesh does not run."""

import errno
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.backup.restoring import restore, verify
from deploy.backup.saving import Order, save
from deploy.local.data_folder import open_data_folder
from deploy.local.errors import LaunchError
from shared.clock import SystemClock
from shared.db.sqlite import open_sqlite_shards
from tests.databases import SECRET
from tests.integration.shared.bus.ledger import MIGRATIONS, emit, posted
from tests.mesh import ROOT

SERVICES = {"payment": MIGRATIONS}


class Quiet:
    """See Progress."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.done_bytes = 0

    def begin(self, step: str, total_bytes: int = 0) -> None:
        self.steps.append(step)

    def add(self, done_bytes: int) -> None:
        self.done_bytes += done_bytes


@pytest.fixture(scope="session")
async def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a mesh leaves it: keys, a service with events, uploaded files, and what is not kept."""
    path = tmp_path_factory.mktemp("backup") / "data"
    with open_data_folder(path) as folder:
        folder.make_keys()
    opened = open_sqlite_shards(
        path / "services" / "payment" / "shards",
        migrations=MIGRATIONS,
        shard_count=2,
        secret=SECRET,
        clock=SystemClock(),
        service="payment",
    )
    async with opened as shards:
        await emit(shards, 5, posted("transactions/1", "r1"), posted("transactions/1", "r2"))
    for name in ("services/media/videos/v/1/360p.ts", "services/media/work/v.2/a", "logs/edge.log"):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode() * 100_000)
    return path


@pytest.fixture
def data(left: Path, tmp_path: Path) -> Path:
    """The test's own."""
    return Path(shutil.copytree(left, tmp_path / "data"))


def order(data: Path, **changes) -> Order:
    made = Order(data, data.with_name("backup"), list(SERVICES), dict(os.environ))
    return replace(made, **changes)


def restored(data: Path) -> Path:
    to = data.with_name("restored")
    restore(data.with_name("backup"), to, SERVICES, Quiet())
    return to


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def siblings_of(data: Path) -> set[str]:
    return {path.name for path in data.parent.iterdir()}


KEPT = {
    "secret",
    "identity/edge.pem",
    "identity/edge.pub",
    "identity/services.pem",
    "identity/services.pub",
    "services/media/videos/v/1/360p.ts",
    "services/payment/shards/control.sqlite",
    "services/payment/shards/shard-0.sqlite",
    "services/payment/shards/shard-1.sqlite",
}


def test_a_restored_folder_has_all_that_counts_and_it_is_private(data):
    saved = save(order(data), Quiet())
    assert {file.path for file in saved.manifest.files} == {
        "bus.jsonl",
        *(f"data/{name}" for name in KEPT),
    }
    to = restored(data)
    assert files_of(to) == {*KEPT, "lock"}
    for name in ("secret", "identity/edge.pem", "services/media/videos/v/1/360p.ts"):
        assert (to / name).read_bytes() == (data / name).read_bytes()
    for folder in (to, data.with_name("backup")):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in folder.rglob("*"):
            assert path.is_dir() or stat.S_IMODE(path.stat().st_mode) == 0o600
    with open_data_folder(to):
        pass  # it is one


def test_events_that_were_sent_are_sent_again_after_a_restore(data):
    shard = data / "services/payment/shards/shard-0.sqlite"
    with closing(sqlite3.connect(shard)) as file, file:
        file.execute("UPDATE outbox SET sent = 1, ack_stream = 'EVT_payment@then', ack_seq = 7")
    save(order(data), Quiet())
    copied = data.with_name("backup") / "data" / shard.relative_to(data)
    for path, sent in ((copied, 1), (restored(data) / shard.relative_to(data), 0)):
        with closing(sqlite3.connect(path)) as file:
            rows = file.execute("SELECT event_no, sent FROM outbox ORDER BY seq").fetchall()
        assert rows == [(1, sent), (2, sent)], "a backup is what there was"


def test_nothing_of_the_data_folder_is_changed(data):
    before = {name: (data / name).read_bytes() for name in files_of(data)}
    save(order(data), Quiet())
    assert {name: (data / name).read_bytes() for name in files_of(data)} == before


def test_the_mesh_cannot_be_started_while_its_folder_is_copied(data):
    class Starting(Quiet):
        def begin(self, step: str, total_bytes: int = 0) -> None:
            with pytest.raises(LaunchError, match="in use"), open_data_folder(data):
                pass
            super().begin(step)

    progress = Starting()
    save(order(data), progress)
    assert progress.steps


def link_out(data: Path) -> None:
    (data / "services/media/videos/elsewhere").symlink_to("/tmp")


def no_service(data: Path) -> None:
    (data / "services/payment/shards/control.sqlite").unlink()


def cluster(data: Path) -> None:
    (data / "cluster.json").write_text("{}")


def damage(data: Path) -> None:
    with (data / "services/payment/shards/shard-1.sqlite").open("r+b") as file:
        file.seek(3 * 4096 + 3)
        file.write(b"\xff" * 64)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (link_out, "elsewhere is a symbolic link"),
        (no_service, "has no databases of payment"),
        (cluster, "holds a cluster"),
        (damage, "shard-1.sqlite is damaged, and so would its copy be"),
    ],
)
def test_what_cannot_be_kept_whole_is_refused_and_leaves_nothing(data, spoil, sentence):
    spoil(data)
    before = siblings_of(data)
    with pytest.raises(LaunchError, match=sentence):
        save(order(data), Quiet())
    assert siblings_of(data) == before
    assert not list(data.glob(".backup-*"))


@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        ("data/backup", "is inside the data folder"),
        ("data", "is inside the data folder"),
        ("link/backup", "is inside the data folder"),
        ("full", "full exists: name a new folder"),
        ("link", "link exists: name a new folder"),
        ("nowhere/backup", "There is no folder .*nowhere"),
    ],
)
def test_a_backup_goes_to_a_new_folder_elsewhere(data, to, sentence):
    (data.parent / "full").mkdir()
    (data.parent / "full" / "file").touch()
    (data.parent / "link").symlink_to(data)
    before = siblings_of(data)
    with pytest.raises(LaunchError, match=sentence):
        save(order(data, to=data.parent / to), Quiet())
    assert siblings_of(data) == before


def test_a_folder_that_is_no_data_folder_is_left_alone(tmp_path):
    (tmp_path / "home").mkdir()
    with pytest.raises(LaunchError, match="is no data folder"):
        save(order(tmp_path / "home"), Quiet())
    assert list((tmp_path / "home").iterdir()) == []


def test_what_a_service_removes_while_it_is_copied_is_in_the_backup_all_the_same(data):
    class Removing(Quiet):
        def begin(self, step: str, total_bytes: int = 0) -> None:
            if step == "copying":
                (data / "services/media/videos/v/1/360p.ts").unlink()

    save(order(data), Removing())
    assert (restored(data) / "services/media/videos/v/1/360p.ts").stat().st_size > 0


def test_what_comes_before_the_moment_is_in_the_backup(data):
    class Adding(Quiet):
        def begin(self, step: str, total_bytes: int = 0) -> None:
            name = {"waiting for a moment without a writer": "early", "copying": "late"}.get(step)
            if name:
                (data / "services/media/videos/v/1" / name).touch()

    save(order(data), Adding())
    names = files_of(restored(data) / "services/media/videos/v/1")
    assert names == {"360p.ts", "early"}


def test_a_full_disk_is_said_and_nothing_is_left(data, monkeypatch):
    class Full(Quiet):
        def add(self, done_bytes: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    before = siblings_of(data)
    with pytest.raises(LaunchError, match=r"There is no backup in .*: no space left on device"):
        save(order(data), Full())
    assert siblings_of(data) == before
    save(order(data), Quiet())
    before = siblings_of(data)
    with pytest.raises(LaunchError, match=r"Nothing was restored to .*: no space left on device"):
        restore(data.with_name("backup"), data.with_name("to"), SERVICES, Full())
    assert siblings_of(data) == before


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_file_that_was_changed_or_lost_is_named_and_nothing_is_restored(data, existing):
    save(order(data), Quiet())
    backup, to = data.with_name("backup"), data.with_name("to")
    if existing:
        to.mkdir()
    secret = backup / "data" / "secret"
    for spoil in (lambda: secret.write_bytes(b"x" * 32), secret.unlink):
        spoil()
        with pytest.raises(LaunchError, match=r"data/secret is (damaged|missing)"):
            verify(backup, SERVICES, Quiet())
        with pytest.raises(LaunchError, match=r"data/secret is (damaged|missing)"):
            restore(backup, to, SERVICES, Quiet())
        assert to.exists() is existing
        assert not existing or list(to.iterdir()) == []


def test_a_link_in_a_backup_is_not_followed(data):
    save(order(data), Quiet())
    backup = data.with_name("backup")
    moved = data.with_name("moved")
    (backup / "data" / "identity").rename(moved)
    (backup / "data" / "identity").symlink_to(moved)
    with pytest.raises(LaunchError, match=r"data/identity/edge.pem is missing or no file"):
        restored(data)


@pytest.mark.parametrize(
    ("to", "sentence"),
    [("data", "is not empty"), ("backup/in", "inside each other"), (".", "inside each other")],
)
def test_a_restore_goes_to_an_empty_folder_elsewhere(data, to, sentence):
    save(order(data), Quiet())
    before = files_of(data.parent)
    with pytest.raises(LaunchError, match=sentence):
        restore(data.with_name("backup"), data.parent / to, SERVICES, Quiet())
    assert files_of(data.parent) == before


def test_a_backup_of_a_newer_version_is_refused(data):
    shard = data / "services/payment/shards/shard-0.sqlite"
    with closing(sqlite3.connect(shard)) as file, file:
        file.execute("INSERT INTO tenfold_migration VALUES ('payment', 9, '0009_new', 'ab')")
    save(order(data), Quiet())
    said = "written by a newer version"
    with pytest.raises(LaunchError, match=said):
        verify(data.with_name("backup"), SERVICES, Quiet())
    with pytest.raises(LaunchError, match=said):
        restored(data)
    assert not data.with_name("restored").exists()


# Killed, or stopped -----------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
from deploy.backup.restoring import restore
from deploy.backup.saving import Order, save
from tests.integration.deploy.test_backup import SERVICES, Quiet

class Dying(Quiet):
    def begin(self, step, total_bytes=0):
        if step == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)

data = Path(sys.argv[1])
if sys.argv[2].startswith("restore "):
    sys.argv[2] = sys.argv[2].removeprefix("restore ")
    restore(data.with_name("backup"), data.with_name("restored"), SERVICES, Dying())
else:
    save(Order(data, data.with_name("backup"), SERVICES, dict(os.environ)), Dying())
"""


def killed_at(data: Path, step: str) -> None:
    command = [sys.executable, "-c", CHILD, str(data), step]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL


def test_a_killed_backup_is_none_and_the_next_one_takes_its_rests_away(data):
    killed_at(data, "making it durable")
    assert not data.with_name("backup").exists()
    [rest] = data.parent.glob(".backup.partial-*")
    with pytest.raises(LaunchError, match="is no backup"):
        verify(rest, SERVICES, Quiet())
    save(order(data), Quiet())
    assert siblings_of(data) == {"data", "backup"}
    assert not list(data.glob(".backup-*"))


@pytest.mark.parametrize("step", ["preparing the databases", "making it durable"])
def test_no_mesh_starts_on_what_a_killed_restore_has_left(data, step):
    save(order(data), Quiet())
    killed_at(data, f"restore {step}")
    to = data.with_name("restored")
    assert (to / "secret").exists()
    with pytest.raises(LaunchError, match="has not ended"), open_data_folder(to):
        pass
    with pytest.raises(LaunchError, match="is not empty"):
        restored(data)


STOPPED = """
import os, signal, sys
from deploy import backup_commands, cli

class Stopping(backup_commands._Meter):
    def begin(self, step, total_bytes=0):
        if step == "copying":
            os.kill(os.getpid(), signal.SIGTERM)

backup_commands._Meter = Stopping
cli.main()
"""


def test_a_stopped_backup_says_so_and_leaves_nothing(data):
    for service in ("auth", "media", "notification", "reporting"):
        shards = data / "services" / service / "shards"
        shards.mkdir(parents=True)
        sqlite3.connect(shards / "control.sqlite").close()
    before = siblings_of(data)
    command = [sys.executable, "-c", STOPPED, "backup", "--data", str(data)]
    command += ["--to", str(data.with_name("backup"))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (
        1,
        "",
        "tenfold: There is no backup: you stopped it, and nothing was left behind.\n",
    )
    assert siblings_of(data) == before
    assert not list(data.glob(".backup-*"))
