"""One moment over several SQLite files while other processes write them."""

import itertools
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from shared.db import sqlite_cut
from shared.db.errors import DatabaseDamaged, DatabaseRefused
from shared.db.sqlite_cut import open_cut

FUNDS = 1_000_000
# Moves one unit at a time from a file to the next, for ever: taken first, then given.
MOVER = """
import sqlite3, sys
files = [sqlite3.connect(path, isolation_level=None, timeout=30) for path in sys.argv[1:]]
print("ready", flush=True)
while True:
    for file, change in zip(files, (-1, 1)):
        file.execute("BEGIN IMMEDIATE")
        file.execute("UPDATE purse SET funds = funds + ?", (change,))
        file.execute("UPDATE page SET text = hex(randomblob(500)) WHERE id = abs(random()) % 50")
        file.execute("COMMIT")
"""


def make_purse(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = OFF")
        file.execute("CREATE TABLE purse (funds)")
        file.execute("CREATE TABLE page (id INTEGER PRIMARY KEY, text)")
        file.execute("INSERT INTO purse VALUES (?)", (FUNDS,))
        file.executemany("INSERT INTO page VALUES (?, 'a')", [(number,) for number in range(50)])
        file.commit()
    return path


def funds(path: Path) -> int:
    with closing(sqlite3.connect(path)) as file:
        return int(file.execute("SELECT funds FROM purse").fetchone()[0])


def copies_of(paths: list[Path], folder: Path) -> list[Path]:
    """Of the first two and the last two."""
    folder.mkdir()
    with open_cut(paths, inside=lambda: None) as cut:
        kept = [file for file in cut.files if file.path in {*paths[:2], *paths[-2:]}]
        for file in kept:
            file.copy_to(folder / file.path.name, lambda _: None)
    return [folder / file.path.name for file in kept]


@pytest.fixture
def purses(tmp_path: Path) -> list[Path]:
    """Many: what is not done at one moment takes a while for all of them."""
    return [make_purse(tmp_path / f"purse-{number}.sqlite") for number in range(16)]


@pytest.fixture
def movers(purses: list[Path]):
    started = [
        subprocess.Popen([sys.executable, "-c", MOVER, source, target], stdout=subprocess.PIPE)
        for source, target in ((purses[0], purses[-1]), (purses[-2], purses[1]))
    ]
    for mover in started:
        assert mover.stdout and mover.stdout.readline() == b"ready\n"
    yield started
    for mover in started:
        mover.kill()
        mover.communicate()


def test_twenty_cuts_beside_writers_never_show_money_that_is_nowhere_or_twice(
    purses, movers, tmp_path
):
    seen = []
    for number in range(20):
        found = [funds(path) for path in copies_of(purses, tmp_path / str(number))]
        for taken, given in ((found[0], found[3]), (found[2], found[1])):
            assert FUNDS * 2 - (taken + given) in {0, 1}, "at most the unit that is on its way"
        seen.append(found)
    assert all(mover.poll() is None for mover in movers)
    assert all(before[0] > after[0] for before, after in itertools.pairwise(seen)), "it was written"


def test_a_copy_is_of_the_cut_and_not_of_what_is_written_while_it_is_made(tmp_path):
    path = make_purse(tmp_path / "purse.sqlite")
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("INSERT INTO page SELECT NULL, randomblob(4000) FROM page a, page b")

        def write(_: int) -> None:
            writer.execute("UPDATE purse SET funds = 0")
            writer.execute("INSERT INTO page VALUES (NULL, randomblob(100000))")
            writer.execute("PRAGMA wal_checkpoint(PASSIVE)")

        with open_cut([path], inside=lambda: None) as cut:
            write(0)
            cut.files[0].copy_to(tmp_path / "copy.sqlite", write)
        assert funds(tmp_path / "copy.sqlite") == FUNDS
        assert funds(path) == 0
        assert not list(tmp_path.glob("copy.sqlite-*")), "one file holds all of it"


def test_a_file_that_is_always_being_written_is_named_and_the_others_are_let_go(
    purses, tmp_path, monkeypatch
):
    monkeypatch.setattr(sqlite_cut, "TRIES_MAX", 2)
    monkeypatch.setattr(sqlite_cut, "PAUSE_S", (0.01, 0.02))
    monkeypatch.setattr(sqlite_cut, "HELD_S_MAX", 0.05)
    monkeypatch.setattr(sqlite_cut, "FIRST_S_MAX", 0.05)
    with closing(sqlite3.connect(purses[2], isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with (
            pytest.raises(DatabaseRefused, match=r"purse-2.sqlite was being written all the time"),
            open_cut(purses, inside=lambda: None),
        ):
            pass
        for path in (*purses[:2], *purses[3:]):
            with closing(sqlite3.connect(path, timeout=0)) as other, other:
                other.execute("UPDATE purse SET funds = 1")


def test_whoever_kept_us_waiting_is_first_in_the_next_try(purses, monkeypatch):
    monkeypatch.setattr(sqlite_cut, "HELD_S_MAX", 0.05)
    monkeypatch.setattr(sqlite_cut, "PAUSE_S", (0.05, 0.1))
    writer = sqlite3.connect(purses[-1], isolation_level=None, check_same_thread=False)
    writer.execute("BEGIN IMMEDIATE")
    # With the busy file last, the first try ends while it is written; in the second it alone
    # is waited for, much longer than anybody may be kept waiting.
    ending = threading.Timer(0.6, lambda: writer.execute("COMMIT"))
    ending.start()
    with open_cut(purses, inside=lambda: None) as cut:
        assert cut.tries <= 2
    ending.join()
    writer.close()


def test_nobody_writes_while_the_inside_runs(purses):
    def inside() -> None:
        for path in purses:
            with (
                closing(sqlite3.connect(path, timeout=0)) as other,
                pytest.raises(sqlite3.OperationalError, match="locked"),
            ):
                other.execute("BEGIN IMMEDIATE")

    with open_cut(purses, inside=inside) as cut:
        assert cut.tries == 1


def test_what_a_killed_writer_left_in_the_log_is_in_the_copy(tmp_path):
    path = make_purse(tmp_path / "purse.sqlite")
    script = (
        "import os, signal, sqlite3, sys\n"
        "file = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "file.execute('UPDATE purse SET funds = 7')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, path], check=False)
    assert path.with_name("purse.sqlite-wal").stat().st_size > 0
    [copied] = copies_of([path], tmp_path / "copies")
    assert funds(copied) == 7


def test_a_damaged_file_is_named_instead_of_copied_damaged(tmp_path):
    path = make_purse(tmp_path / "purse.sqlite")
    with path.open("r+b") as file:
        file.seek(4096 + 5)
        file.write(b"\xff" * 40)
    with pytest.raises(DatabaseDamaged, match=r"tmp.*purse.sqlite is damaged"):
        copies_of([path], tmp_path / "copies")
