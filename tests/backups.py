"""A mesh that is used while it is backed up, and what is wrong on one made from the backup."""

import json
import random
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.demo import Story, money
from tests.kills import (
    SETTLE_S,
    Told,
    as_person,
    doubled_mails,
    doubled_notices,
    doubled_videos,
    told_to,
    unbalanced_ledger,
)
from tests.mesh import ROOT, Mesh, poll_until

FUNDS = 10_000
TUS = {"Tus-Resumable": "1.0.0"}


def tenfold(*arguments: str) -> dict[str, Any]:
    """What a command prints with --json; AssertionError with its sentence if it fails."""
    command = [sys.executable, "-P", "-m", "deploy.cli", *arguments, "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return dict(json.loads(run.stdout))


@dataclass
class Traffic:
    """Ada sends Bob one cent after the other.

    Attributes:
        pause_s: between two.
        acknowledged: the descriptions of those that were answered, in order.
        began_s, answered_s: of each of these, monotonic.
    """

    told: Told
    pause_s: float = 0.0
    acknowledged: list[str] = field(default_factory=list)
    began_s: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    begun: int = 0
    failures: list[BaseException] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def send(self, description: str) -> dict[str, Any]:
        """One cent, under a key that is its description."""
        story = self.told.story
        body = {"toAccount": story.bob.account, "amount": money(1), "description": description}
        path = f"/v1/{story.ada.account}:transferFunds"
        answer = story.rest.call("POST", path, body, token=story.ada.token, key=description)
        return dict(answer.json)

    def run(self) -> None:
        """Until stopped."""
        try:
            while not self._is_over.is_set():
                self.begun += 1
                began_s = time.monotonic()
                description = f"cent-{self.begun}"
                self.send(description)
                self.began_s.append(began_s)
                self.answered_s.append(time.monotonic())
                self.acknowledged.append(description)
                self._is_over.wait(self.pause_s)
        except BaseException as error:
            if not self._is_over.is_set():
                self.failures.append(error)

    def wait_for(self, count: int) -> None:
        """Return when so many more were answered."""
        wanted = len(self.acknowledged) + count

        def is_there() -> bool:
            assert not self.failures, self.failures
            return len(self.acknowledged) >= wanted

        poll_until(is_there, timeout_s=SETTLE_S, what=f"{wanted} transfers")

    def stop(self) -> None:
        """No more after the one that is under way."""
        self._is_over.set()


@contextmanager
def flowing(told: Told, *, pause_s: float = 0.0) -> Iterator[Traffic]:
    """Transfers while the block runs."""
    traffic = Traffic(told, pause_s)
    thread = threading.Thread(target=traffic.run)
    thread.start()
    try:
        yield traffic
    finally:
        traffic.stop()
        thread.join(SETTLE_S)


@dataclass
class HalfUpload:
    """An upload of which the first half has been acknowledged."""

    path: str
    film: bytes
    half: int

    @classmethod
    def begin(cls, story: Story, film: bytes) -> "HalfUpload":
        """Create it and send the half."""
        headers = {**TUS, "Upload-Length": str(len(film))}
        created = story.rest.call(
            "POST", "/v1/files", token=story.ada.token, key="half", headers=headers, expect=(201,)
        )
        path = urllib.parse.urlsplit(created.headers["location"]).path
        upload = cls(path, film, len(film) // 2)
        assert upload._patch(story, 0, upload.half) == upload.half
        return upload

    def offset(self, story: Story) -> int:
        """How much is safe."""
        head = story.rest.call("HEAD", self.path, token=story.ada.token, headers=TUS)
        return int(head.headers["upload-offset"])

    def finish(self, story: Story) -> str:
        """Send the rest; the state of the upload."""
        self._patch(story, self.offset(story), len(self.film))
        path = f"/v1/uploads/{self.path.rsplit('/', 1)[1]}"
        return str(story.rest.call("GET", path, token=story.ada.token).json["message"])

    def _patch(self, story: Story, start: int, end: int) -> int:
        connection = story.rest.connect()
        try:
            headers = story._patch_headers(start, end)
            connection.request("PATCH", self.path, self.film[start:end], headers)
            response = connection.getresponse()
            assert response.status == 204, response.read()
            return int(response.headers["upload-offset"])
        finally:
            connection.close()


@dataclass
class Backup:
    """A backup, and what its mesh had answered when it was begun and when it had ended."""

    folder: Path
    printed: dict[str, Any]
    before: list[str]
    begun_after: int
    half: HalfUpload


def begin_story(mesh: Mesh) -> Told:
    """Two people with accounts, one with money."""
    told = told_to(mesh, video_s=1)
    story = told.story
    for step in (story.sign_up, story.log_in, story.open_accounts, story.deposit):
        step()
    return told


def back_up(data: Path, folder: Path) -> dict[str, Any]:
    """What the command prints."""
    return tenfold("backup", "--data", str(data), "--to", str(folder))


def back_up_in_use(
    told: Told,
    folder: Path,
    *,
    transfers: int = 10,
    by: Callable[[Path, Path], dict[str, Any]] = back_up,
) -> Backup:
    """Back the mesh up while money moves, a video is made and an upload has come half way.

    Args:
        told: a story that has begun.
        folder: the backup's.
        transfers: how many there are before and after it, at least.
        by: makes it, given the data folder and the backup's.
    """
    story = told.story
    film = random.randbytes(400_000)
    with flowing(told) as traffic:
        half = HalfUpload.begin(story, film)
        traffic.wait_for(transfers)
        story.upload()  # its job and its events are under way from here on
        before = list(traffic.acknowledged)
        printed = by(told.mesh.data, folder)
        begun_after = traffic.begun
        traffic.wait_for(transfers)
    assert not traffic.failures, traffic.failures
    return Backup(folder, printed, before, begun_after, half)


def same_story(told: Told, mesh: Mesh) -> Told:
    """As the same people go on with it on another mesh."""
    again = told_to(mesh)
    kept = {"rest": again.story.rest, "_mail_folder": mesh.data / "mail"}
    vars(again.story).update(vars(told.story) | kept)
    return again


def violations(told: Told, backup: Backup) -> list[str]:
    """What is lost, doubled or out of balance on a restored mesh; [] when all is well."""
    checks: list[Callable[[Told], str]] = [
        lambda told: wrong_transfers(told, backup),
        lambda told: repeated_effect(told, backup),
        unbalanced_ledger,
        lambda told: lost_bytes(told, backup),
        unready_video,
        doubled_videos,
        wrong_report,
        doubled_notices,
        doubled_mails,
    ]
    return [found for check in checks if (found := check(told))]


def wrong_transfers(told: Told, backup: Backup) -> str:
    """Those answered before the backup began are there, once; none that came after it ended."""
    rows = transfers_of(told)
    lost = set(backup.before) - set(rows)
    doubled = [name for name, count in Counter(rows).items() if count > 1]
    from_later = [name for name in rows if int(name.removeprefix("cent-")) > backup.begun_after]
    balance = as_person(told, told.story.ada.token, f"/v1/{told.story.ada.account}/balance")
    off = int(str(balance["availableMinorUnits"])) != FUNDS - len(rows)
    wrong = {"lost": lost, "doubled": doubled, "later": from_later, "balance": off and balance}
    return f"transfers: {wrong}" if any(wrong.values()) else ""


def transfers_of(told: Told) -> list[str]:
    """Every cent that Ada has sent."""
    found: list[str] = []
    token = ""
    while True:
        path = f"/v1/{told.story.ada.account}/transactions?pageToken={token}"
        page: dict[str, Any] = as_person(told, told.story.ada.token, path)
        found += [row.get("description", "") for row in page["transactions"]]
        token = page.get("nextPageToken", "")
        if not token:
            return [name for name in found if name.startswith("cent-")]


def repeated_effect(told: Told, backup: Backup) -> str:
    """A call that was answered before the backup is answered again, and nothing happens."""
    rows = transfers_of(told)
    Traffic(told).send(backup.before[0])
    return "" if len(transfers_of(told)) == len(rows) else "a repeated call had a second effect"


def lost_bytes(told: Told, backup: Backup) -> str:
    """What an upload was told to be safe is there."""
    offset = backup.half.offset(told.story)
    return "" if offset >= backup.half.half else f"upload: {offset} of {backup.half.half}"


def unready_video(told: Told) -> str:
    """The video whose job was under way is made."""

    def state() -> str:
        videos = as_person(told, told.story.ada.token, "/v1/videos")["videos"]
        states = {video["state"] for video in videos}
        return ",".join(states) if states <= {"STATE_READY", "STATE_FAILED"} else ""

    found = poll_until(state, timeout_s=SETTLE_S, what="a video")
    return "" if found == "STATE_READY" else f"video: {found}"


def wrong_report(told: Told) -> str:
    """Every event of the ledger has been counted once; waits for those that are on their way."""
    told.story.report()

    def has_notice() -> bool:
        items = as_person(told, told.story.ada.token, "/v1/inbox/items")["items"]
        mails = [mail for mail in told.mesh.mails if told.story.video in mail]
        return bool(mails) and any(item["category"] == "video.ready" for item in items)

    poll_until(has_notice, timeout_s=SETTLE_S, what="the notice and the e-mail")
    return ""
