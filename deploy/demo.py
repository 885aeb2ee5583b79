"""The story of one user through every service, told by real REST calls.

`Story` is also what the kill tests run: with `patience_s` it repeats a call under the
same Idempotency-Key until it is answered, as any client should.
"""

import base64
import http.client
import re
import secrets
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.rest import (
    RETRY_PAUSE_S,
    RETRYABLE_STATUSES,
    Answer,
    Narrator,
    Rest,
    StoryError,
    escaped,
)

EVENT_WAIT_S = 60
UPLOAD_CHUNK_BYTES = 256 * 1024
# The rest of a film goes up in so many requests: each is safe once it is answered.
UPLOAD_PIECES = 4
CURRENCY = "EUR"


@dataclass
class Person:
    """One user of the story."""

    name: str
    email: str
    password: str
    token: str = ""
    user: str = ""
    account: str = ""


class Story:
    """The steps, in order; each returns one line that says what happened.

    Args:
        rest: how the story talks to the edge.
        admin_key: an operator's key with ledger.post, reports and audit scopes.
        mail_folder: where the local mail sink puts what it receives.
        video_s: length of the film that is uploaded, in seconds.
    """

    def __init__(self, rest: Rest, *, admin_key: str, mail_folder: Path, video_s: int = 20) -> None:
        self.rest = rest
        self._admin_key = admin_key
        self._mail_folder = mail_folder
        self._video_s = video_s
        run = secrets.token_hex(4)
        self._run = run
        self.ada = Person("Ada", f"ada-{run}@example.com", secrets.token_urlsafe(16))
        self.bob = Person("Bob", f"bob-{run}@example.com", secrets.token_urlsafe(16))
        self._cash = ""
        self._recorded_time = ""
        self.video = ""
        self._notice: list[Any] = []
        self._notice_arrived = threading.Event()

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """(title, run) of every step."""
        return [
            ("Sign up", self.sign_up),
            ("Log in", self.log_in),
            ("Open accounts", self.open_accounts),
            ("Deposit", self.deposit),
            ("Transfer", self.transfer),
            ("Upload a video, cut and resumed", self.upload),
            ("Watch it transcode", self.watch),
            ("Play it", self.play),
            ("A notice and an e-mail arrive", self.hear),
            ("The day's report equals the ledger", self.report),
        ]

    def sign_up(self) -> str:
        """Two users exist afterwards, however often this is asked."""
        for person in (self.ada, self.bob):
            body = {"email": person.email, "password": person.password, "displayName": person.name}
            self.rest.call("POST", "/v1/users:signUp", body, key=f"sign-up-{person.email}")
        return "two users"

    def log_in(self) -> str:
        """Each user gets tokens."""
        for person in (self.ada, self.bob):
            body = {"email": person.email, "password": person.password}
            answer = self.rest.call("POST", "/v1/sessions", body).json
            person.token = answer["tokens"]["accessToken"]
            person.user = answer["session"]["user"]
        return "signed tokens, valid in every service"

    def open_accounts(self) -> str:
        """Each user has an account; the operator has a cash account."""
        self._cash = self._cash_account()
        for person in (self.ada, self.bob):
            answer = self.rest.call(
                "POST",
                "/v1/accounts",
                {"currencyCode": CURRENCY, "displayName": f"{person.name}'s account"},
                token=person.token,
                key=f"account-{person.email}",
            )
            person.account = answer.json["name"]
        return "three accounts, each in its owner's bucket"

    def _cash_account(self) -> str:
        body = {"currencyCode": CURRENCY, "displayName": "Cash", "normalSide": "SIDE_DEBIT"}
        body["mayOverdraw"] = True  # type: ignore[assignment] # JSON values are of any type
        # One key for every run: the story shares one cash account.
        return str(
            self.rest.call(
                "POST", "/v1/accounts", body, token=self._admin_key, key="demo-cash-account"
            ).json["name"]
        )

    def deposit(self) -> str:
        """100.00 EUR enter from cash; a repeat changes nothing."""
        body = {
            "reference": f"deposit-{self._run}",
            "description": "First deposit",
            "entries": [
                entry(self._cash, "SIDE_DEBIT", 10_000),
                entry(self.ada.account, "SIDE_CREDIT", 10_000),
            ],
        }
        for _ in range(2):  # the second shows that a retry has no second effect
            answer = self.rest.call(
                "POST",
                "/v1/transactions",
                body,
                token=self._admin_key,
                key=f"deposit-{self._run}",
            )
        self._recorded_time = answer.json["recordedTime"]
        self._expect_balance(self.ada, 10_000)
        return "100.00 EUR, once, though asked twice"

    def transfer(self) -> str:
        """25.00 EUR go from Ada to Bob; more than she has is refused."""
        path = f"/v1/{self.ada.account}:transferFunds"
        body = {"toAccount": self.bob.account, "amount": money(2_500), "description": "Lunch"}
        answer = self.rest.call(
            "POST", path, body, token=self.ada.token, key=f"transfer-{self._run}"
        )
        self._recorded_time = answer.json["recordedTime"]
        self.rest.call(
            "POST",
            path,
            {**body, "amount": money(1_000_000)},
            token=self.ada.token,
            key=f"too-much-{self._run}",
            expect=(400,),
        )
        self._expect_balance(self.ada, 7_500)
        self._expect_balance(self.bob, 2_500)
        return "25.00 EUR; 10,000.00 EUR refused"

    def _expect_balance(self, person: Person, minor_units: int) -> None:
        answer = self.rest.call("GET", f"/v1/{person.account}/balance", token=person.token)
        found = int(answer.json["availableMinorUnits"])
        if found != minor_units:
            raise StoryError(f"{person.name} has {found} minor units, not {minor_units}")

    def upload(self) -> str:
        """A real film goes up by tus; the connection is cut in the middle."""
        self._listen()
        film = make_film(self._video_s)
        name = base64.b64encode(b"holiday.mp4").decode()
        kind = base64.b64encode(b"video/mp4").decode()
        created = self.rest.call(
            "POST",
            "/v1/files",
            token=self.ada.token,
            key=f"upload-{self._run}",
            headers={
                "Tus-Resumable": "1.0.0",
                "Upload-Length": str(len(film)),
                "Upload-Metadata": f"filename {name},filetype {kind}",
            },
            expect=(201,),
        )
        path = urllib.parse.urlsplit(created.headers["location"]).path
        cut_at = len(film) // 2
        self._send_and_cut(path, film, cut_at)
        message = self._resume(path, film)
        megabytes = len(film) / 1e6
        return f"{megabytes:.1f} MB, cut at {cut_at / 1e6:.1f} MB: “{message}”"

    def _send_and_cut(self, path: str, film: bytes, cut_at: int) -> None:
        """Announce everything, send half, and drop the connection."""
        connection = self.rest.connect()
        try:
            connection.putrequest("PATCH", path)
            for header, value in self._patch_headers(0, len(film)).items():
                connection.putheader(header, value)
            connection.endheaders()
            for start in range(0, cut_at, UPLOAD_CHUNK_BYTES):
                connection.send(film[start : min(start + UPLOAD_CHUNK_BYTES, cut_at)])
        except OSError:
            if not self.rest.patience_s:
                raise
        finally:
            connection.close()

    def _patch_headers(self, offset: int, end: int) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self.ada.token}",
            "Tus-Resumable": "1.0.0",
            "Upload-Offset": str(offset),
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(end - offset),
        }

    def _resume(self, path: str, film: bytes) -> str:
        """Ask how much is safe and send the rest, until every byte is there."""
        give_up = time.monotonic() + max(self.rest.patience_s, EVENT_WAIT_S)
        while time.monotonic() < give_up:
            head = self.rest.call(
                "HEAD", path, token=self.ada.token, headers={"Tus-Resumable": "1.0.0"}
            )
            offset = int(head.headers["upload-offset"])
            if offset == len(film):
                return self._uploaded(path)
            answer = self._patch(path, film, offset)
            if answer is not None and answer.status not in (204, 409, 423, *RETRYABLE_STATUSES):
                raise StoryError(f"PATCH {path} answered {answer.status}: {answer.body[:300]!r}")
            time.sleep(RETRY_PAUSE_S if answer is None or answer.status != 204 else 0)
        raise StoryError("the upload did not end in time")

    def _patch(self, path: str, film: bytes, offset: int) -> Answer | None:
        connection = self.rest.connect()
        try:
            end = min(offset + -(-len(film) // UPLOAD_PIECES), len(film))
            headers = self._patch_headers(offset, end)
            connection.request("PATCH", path, film[offset:end], headers)
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, named, response.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _uploaded(self, path: str) -> str:
        upload = path.rsplit("/", 1)[1]
        answer = self.rest.call("GET", f"/v1/uploads/{upload}", token=self.ada.token).json
        self.video = answer["video"]
        return str(answer["message"])

    def _listen(self) -> None:
        """Open the inbox's live stream before anything is uploaded."""
        ready = threading.Event()

        def listen() -> None:
            for event in self.rest.events("/v1/inbox:watch", token=self.ada.token, ready=ready):
                item = event.get("item") or {}
                if item.get("category") == "video.ready":
                    self._notice.append(item)
                    self._notice_arrived.set()
                    return

        threading.Thread(target=listen, daemon=True).start()
        if not ready.wait(EVENT_WAIT_S):
            raise StoryError("the inbox's stream did not open")

    def watch(self) -> str:
        """Progress arrives live until the video is READY."""
        seen: list[int] = []
        for event in self.rest.events(f"/v1/{self.video}:watch", token=self.ada.token):
            video = event.get("video") or {}
            state, percent = video.get("state", ""), int(video.get("progressPercent", 0))
            if not seen or percent != seen[-1]:
                self.rest.narrator.answer(200, f"{state} {percent} %")
                seen.append(percent)
            if state == "STATE_FAILED":
                raise StoryError(f"the video failed: {video.get('failure')}")
            if state == "STATE_READY":
                return f"{len(seen)} progress marks, then READY"
        raise StoryError("the stream ended before the video was ready")

    def play(self) -> str:
        """Every play-list and segment is fetched and decoded."""
        with tempfile.TemporaryDirectory() as folder:
            names = self._download("master.m3u8", Path(folder))
            variants = [name for name in names if name.endswith(".m3u8")]
            frames = [decoded_frames(Path(folder) / name) for name in variants]
        if len(variants) < 2 or not all(frames):
            raise StoryError(
                f"the renditions do not decode: {dict(zip(variants, frames, strict=True))}"
            )
        return f"{len(variants)} renditions, {sum(frames)} frames decoded"

    def _download(self, name: str, folder: Path) -> list[str]:
        path = f"/v1/{self.video}/files/{name}"
        answer = self.rest.call("GET", path, token=self.ada.token, quiet=not name.endswith("m3u8"))
        (folder / name).write_bytes(answer.body)
        named = []
        if name.endswith(".m3u8"):
            text = answer.body.decode()
            named = [line for line in text.splitlines() if line and not line.startswith("#")]
            named += re.findall(r'URI="([^"]+)"', text)
        for inner in named:
            self._download(inner, folder)
        return named

    def hear(self) -> str:
        """The notice came over the live stream, the e-mail over SMTP."""
        if not self._notice_arrived.wait(EVENT_WAIT_S):
            raise StoryError("no notice arrived on the inbox's stream")
        title = self._notice[0]["title"]
        self.rest.narrator.answer(200, f"notice: {title}")
        mail = self._await_mail()
        self.rest.narrator.answer(200, f"e-mail: {mail}")
        return f"{title}: in the inbox and by e-mail"

    def _await_mail(self) -> str:
        give_up = time.monotonic() + EVENT_WAIT_S
        address = self.ada.email.encode()
        while time.monotonic() < give_up:
            for path in sorted(self._mail_folder.glob("*.eml")):
                content = path.read_bytes()
                if address in content and self.video.encode() in content:
                    return path.name
            time.sleep(RETRY_PAUSE_S)
        raise StoryError(f"no e-mail about {self.video} arrived in {self._mail_folder}")

    def report(self) -> str:
        """The operator's report of the day and the ledger's own trial balance agree."""
        day = self._recorded_time[:10]
        body = {"firstDay": day, "lastDay": day, "minEventTime": self._recorded_time}
        give_up = time.monotonic() + EVENT_WAIT_S
        attempt = 0
        while True:
            attempt += 1
            run = self.rest.call(
                "POST",
                "/v1/reportRuns",
                body,
                token=self._admin_key,
                key=f"report-{self._run}-{attempt}",
            ).json
            trial = self.rest.call("GET", f"/v1/trialBalance?day={day}", token=self._admin_key).json
            reported, booked = reported_totals(run), booked_totals(trial)
            if reported == booked:
                debits = booked[CURRENCY][0] / 100
                return f"{debits:,.2f} {CURRENCY} on {day}, in both"
            # The day's last events may still be on their way.
            if time.monotonic() >= give_up:
                raise StoryError(f"the report says {reported}, the ledger {booked}")
            time.sleep(RETRY_PAUSE_S)


def entry(account: str, side: str, minor_units: int) -> dict[str, object]:
    """One entry of a transaction, as JSON."""
    return {"account": account, "side": side, "amount": money(minor_units)}


def money(minor_units: int) -> dict[str, str]:
    """An amount, as JSON: int64 travels as a string."""
    return {"currencyCode": CURRENCY, "minorUnits": str(minor_units)}


def reported_totals(run: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(debits, credits) per currency in a report run."""
    totals: dict[str, list[int]] = {}
    for row in run.get("sums", []):
        if row["metric"] in ("ledger.debits", "ledger.credits"):
            side = 0 if row["metric"] == "ledger.debits" else 1
            totals.setdefault(row["currencyCode"], [0, 0])[side] += int(row["value"])
    return {code: (debits, credits_) for code, (debits, credits_) in totals.items()}


def booked_totals(trial: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(debits, credits) per currency in a trial balance."""
    return {
        row["currencyCode"]: (int(row["debitMinorUnits"]), int(row["creditMinorUnits"]))
        for row in trial.get("totals", [])
    }


def make_film(seconds: int) -> bytes:
    """A real film, H.264 and AAC, about half a megabyte a second, made by ffmpeg."""
    import imageio_ffmpeg  # here: only the demo makes films

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "film.mp4"
        picture = f"testsrc2=size=1280x720:rate=30:duration={seconds},noise=alls=12:allf=t"
        subprocess.run(
            [
                imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error",
                "-f", "lavfi", "-i", picture,
                "-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds}",
                "-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p",
                "-b:v", "4M", "-maxrate", "4M", "-bufsize", "4M",
                "-c:a", "aac", "-b:a", "128k", str(target),
            ],
            check=True,
        )  # fmt: skip
        return target.read_bytes()


def decoded_frames(playlist: Path) -> int:
    """How many pictures of a play-list decode."""
    import av  # here: it loads the ffmpeg libraries

    with av.open(str(playlist)) as container:
        return sum(1 for _ in container.decode(video=0))


def run_demo(edge_url: str, data_folder: Path) -> int:
    """Tell the story against a running mesh; 0 when it ended well."""
    console = Console()
    key_file = data_folder / "admin.key"
    if not key_file.is_file():
        console.print(f"no admin key at {key_file}: start the mesh first with 'make up'")
        return 1
    narrator = Narrator(console)
    story = Story(
        Rest(edge_url, narrator),
        admin_key=key_file.read_text().strip(),
        mail_folder=data_folder / "mail",
    )
    try:
        for title, run in story.steps():
            narrator.step(title, run)
    except StoryError as error:
        console.print(f"[red]The story broke:[/] {escaped(str(error))}")
        narrator.table()
        return 1
    narrator.table()
    return 0
