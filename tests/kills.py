"""The demo's story under a nemesis: processes are killed while it runs, then it is checked."""

import io
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console

from deploy.demo import Story
from deploy.rest import Narrator, Rest, StoryError
from tests.mesh import Mesh, poll_until

PATIENCE_S = 120.0
SETTLE_S = 60.0
VIDEO_S = 2
VICTIMS = ("services", "edge", "nats", "valkey", "launcher")


@dataclass
class Told:
    """A story that runs in a thread of its own."""

    mesh: Mesh
    story: Story
    narration: io.StringIO
    failures: list[BaseException] = field(default_factory=list)
    thread: threading.Thread | None = None

    @property
    def is_over(self) -> bool:
        """Whether the last step has ended, well or not."""
        return self.thread is not None and not self.thread.is_alive()

    def begin(self) -> None:
        """Start telling."""

        def tell() -> None:
            try:
                for title, run in self.story.steps():
                    self.story.rest.narrator.step(title, run)
            except BaseException as error:
                self.failures.append(error)

        self.thread = threading.Thread(target=tell)
        self.thread.start()

    def finish(self, *, timeout_s: float = 240.0) -> None:
        """Wait for the end; AssertionError with the narration if a step failed."""
        assert self.thread
        self.thread.join(timeout_s)
        assert self.is_over, f"the story did not end:\n{self.narration.getvalue()[-3000:]}"
        if self.failures:
            tail = self.narration.getvalue()[-3000:]
            raise AssertionError(f"{self.failures[0]!r}\n{tail}\n{self.mesh.output[-2000:]}")


def told_to(mesh: Mesh, *, video_s: int = VIDEO_S) -> Told:
    """A story about to be told to this mesh, by a client that repeats what is not answered."""
    narration = io.StringIO()
    rest = Rest(mesh.edge_url, Narrator(Console(file=narration)), patience_s=PATIENCE_S)
    story = Story(rest, admin_key=mesh.admin_key, mail_folder=mesh.data / "mail", video_s=video_s)
    return Told(mesh, story, narration)


def kill_at_random(told: Told, *, seed: int, kills: int, pause_s: tuple[float, float]) -> list[str]:
    """Kill random processes while the story is told; the victims, in order."""
    chance = random.Random(seed)
    victims: list[str] = []
    while len(victims) < kills:
        time.sleep(chance.uniform(*pause_s))
        victim = chance.choice(VICTIMS)
        if victim == "launcher":
            told.mesh.kill_all()
            told.mesh.start()
        else:
            told.mesh.kill(victim)
            told.mesh.wait_until_ready()
        victims.append(victim)
    return victims


def violations(told: Told) -> list[str]:
    """What is lost, doubled or out of balance after a story; [] when all is well."""
    checks: list[Callable[[Told], str]] = [
        unbalanced_ledger, wrong_balances, doubled_transactions, doubled_videos,
        doubled_notices, doubled_mails,
    ]  # fmt: skip
    return [found for check in checks if (found := check(told))]


def unbalanced_ledger(told: Told) -> str:
    """Debits equal credits in every currency."""
    headers = {"Authorization": f"Bearer {told.mesh.admin_key}"}
    totals = told.mesh.get("/v1/trialBalance", headers=headers).json()["totals"]
    uneven = [row for row in totals if row["debitMinorUnits"] != row["creditMinorUnits"]]
    return f"unbalanced: {uneven}" if uneven else ""


def wrong_balances(told: Told) -> str:
    """Ada has 75.00 and Bob 25.00."""
    story, found = told.story, {}
    for person, expected in ((story.ada, "7500"), (story.bob, "2500")):
        answer = as_person(told, person.token, f"/v1/{person.account}/balance")
        if answer["availableMinorUnits"] != expected:
            found[person.name] = answer
    return f"balances: {found}" if found else ""


def doubled_transactions(told: Told) -> str:
    """Ada's account has exactly the deposit and the transfer."""
    ada = told.story.ada
    rows = as_person(told, ada.token, f"/v1/{ada.account}/transactions")["transactions"]
    return "" if len(rows) == 2 else f"transactions: {rows}"


def doubled_videos(told: Told) -> str:
    """One upload became one video, and it is ready."""
    videos = as_person(told, told.story.ada.token, "/v1/videos")["videos"]
    states = [video["state"] for video in videos]
    return "" if states == ["STATE_READY"] else f"videos: {states}"


def doubled_notices(told: Told) -> str:
    """One notice that the video is ready."""
    items = as_person(told, told.story.ada.token, "/v1/inbox/items")["items"]
    ready = [item for item in items if item["category"] == "video.ready"]
    return "" if len(ready) == 1 else f"notices: {ready}"


def doubled_mails(told: Told) -> str:
    """The e-mail about the video came, and every copy of it is the same message."""
    ada = told.story.ada.email
    about = [m for m in told.mesh.mails if ada in m and told.story.video in m]
    ids = {line for mail in about for line in mail.splitlines() if line.startswith("Message-ID")}
    return "" if len(ids) == 1 else f"e-mails: {len(about)} with ids {ids}"


def as_person(told: Told, token: str, path: str) -> dict[str, list[dict[str, str]]]:
    """The JSON that this user reads, once the mesh answers."""
    headers = {"Authorization": f"Bearer {token}"}

    def ask() -> dict[str, list[dict[str, str]]] | None:
        answer = told.mesh.get(path, headers=headers)
        return answer.json() if answer.status_code == 200 else None

    return poll_until(ask, timeout_s=SETTLE_S, what=path)


__all__ = ["StoryError", "Told", "kill_at_random", "told_to", "violations"]
