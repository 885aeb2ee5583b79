"""A whole mesh as the tests see it: started by the command that users type, ended for certain."""

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from deploy.local.data_folder import DataFolder, children_of, launcher_of
from deploy.local.embedded import SERVICES_SETTING
from deploy.local.processes import ProcessMark, family
from deploy.local.program import Program
from deploy.local.supervisor import WRAPPER

ROOT = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 90.0
GONE_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0
POLL_S = 0.05
# Defaults of a mesh under test; its own environment overrides them.
TEST_SETTINGS = {
    # Meshes on chosen edge ports run side by side.
    SERVICES_SETTING: "127.0.0.1:0",
    # All tests log in from one address; those of the quota set their own.
    "TENFOLD_EDGE_LOGIN_POINTS_PER_MINUTE": "60000",
    "TENFOLD_EDGE_LOGIN_BURST_POINTS": "60000",
}

T = TypeVar("T")


def poll_until(ask: Callable[[], T | None], *, timeout_s: float, what: str) -> T:
    """The first true answer; AssertionError naming what did not come in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := ask()):
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s} s"
        time.sleep(POLL_S)
    return answer


def wait_until_gone(marks: Sequence[ProcessMark], *, timeout_s: float = GONE_TIMEOUT_S) -> None:
    """Return when none of these processes runs any more."""

    def nobody_left() -> bool:
        return not [mark for mark in marks if mark.is_alive]

    poll_until(nobody_left, timeout_s=timeout_s, what=f"the end of {[m.pid for m in marks]}")


class Mesh:
    """An embedded mesh in a process tree of its own.

    Attributes:
        data: its data folder.
        tree: the checkout whose code it runs.
        output: everything that the launcher printed, over all its starts.
    """

    def __init__(
        self,
        data: Path,
        *,
        tree: Path = ROOT,
        environ: Mapping[str, str] | None = None,
        edge: str = "127.0.0.1:0",
        options: Sequence[str] = (),
    ) -> None:
        self.data = data
        self.tree = tree
        self._environ = {**TEST_SETTINGS, **(environ or os.environ)}
        self._edge = edge
        self._options = options
        self._folder = DataFolder(data)
        self._process: subprocess.Popen[bytes] | None = None
        self._client: httpx.Client | None = None
        self._log = data.with_name(f"{data.name}.out")

    @property
    def output(self) -> str:
        """What the launcher printed so far."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def launcher(self) -> subprocess.Popen[bytes]:
        """The process of `tenfold up`."""
        assert self._process is not None, "the mesh was not started"
        return self._process

    @property
    def state(self) -> dict[str, Any]:
        """What the launcher says about itself."""
        return self._folder.read_state()

    @property
    def edge_url(self) -> str:
        """Where the edge serves, without a slash at the end; another one after a restart."""
        return str(self.state["edge"])

    @property
    def admin_key(self) -> str:
        """The key that auth wrote at the first start."""
        return self._folder.admin_key.read_text().strip()

    @property
    def mails(self) -> list[str]:
        """Every e-mail that was sent, oldest first."""
        return [path.read_text() for path in sorted(self._folder.mail.glob("*.eml"))]

    def begin(self, *, environ: Mapping[str, str] | None = None) -> None:
        """Start the launcher and return at once; `environ` adds to this start alone."""
        command = [sys.executable, "-P", "-m", "deploy.cli", "up"]
        command += ["--data", str(self.data), "--edge", self._edge, *self._options]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.tree,
                env={**self._environ, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start(self, *, environ: Mapping[str, str] | None = None) -> None:
        """Start, and return when the edge is ready."""
        self.begin(environ=environ)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return when /readyz answers 200 and every process is up."""

        def is_ready() -> bool:
            assert self.launcher.poll() is None, f"the launcher ended:\n{self.output}"
            state = self.state
            mark = launcher_of(state)
            if mark is None or mark.pid != self.launcher.pid or not state.get("ready"):
                return False
            return all(child["ready"] for child in state["children"].values()) and self._answers()

        poll_until(is_ready, timeout_s=READY_TIMEOUT_S, what="a ready mesh")

    def processes(self) -> list[ProcessMark]:
        """The launcher and everything below it, now."""
        return family(self.launcher.pid)

    def child(self, name: str) -> ProcessMark:
        """The process of one child: "services", "edge", "nats", "valkey", "mail"."""
        return children_of(self.state)[name]

    def kill(self, name: str) -> None:
        """SIGKILL one child; the launcher has noticed, and starts it again."""

        def running() -> ProcessMark | None:
            child = self.child(name)
            return child if child.is_alive else None

        def is_noticed() -> bool:
            return self.child(name) != killed or not self.state["children"][name]["ready"]

        killed = poll_until(running, timeout_s=READY_TIMEOUT_S, what=name)
        os.kill(killed.pid, signal.SIGKILL)
        wait_until_gone([killed])
        poll_until(is_noticed, timeout_s=GONE_TIMEOUT_S, what=f"the end of {name} in state.json")

    def kill_all(self) -> None:
        """SIGKILL the launcher, as a crash of the machine would; everything ends with it."""
        processes = self.processes()
        self.launcher.kill()
        self.launcher.wait(GONE_TIMEOUT_S)
        wait_until_gone(processes)

    def stop(self) -> int:
        """Ask the launcher to stop everything; its exit code."""
        if self._process is None:
            return 0
        processes = self.processes()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(GONE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait(GONE_TIMEOUT_S)
        wait_until_gone(processes)
        return code

    def close(self) -> None:
        """Stop, and let go of the client."""
        self.stop()
        if self._client:
            self._client.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One REST call; see httpx.Client.request."""
        if self._client is None:
            self._client = httpx.Client(timeout=CALL_TIMEOUT_S, trust_env=False)
        return self._client.request(method, self.edge_url + path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET; see request."""
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """POST; see request."""
        return self.request("POST", path, **options)

    def sign_up_and_in(self) -> str:
        """Sign a new user up and in, over REST; the access token."""
        email = f"user-{secrets.token_hex(6)}@example.com"
        body = {"email": email, "password": secrets.token_urlsafe(16)}
        signed_up = self.post("/v1/users:signUp", json=body, headers={"Idempotency-Key": email})
        assert signed_up.status_code == 200, signed_up.text
        session = self.post("/v1/sessions", json=body, headers={"Idempotency-Key": email})
        assert session.status_code == 200, session.text
        return str(session.json()["tokens"]["accessToken"])

    def _answers(self) -> bool:
        try:
            return self.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def running_mesh(
    data: Path,
    *,
    tree: Path = ROOT,
    environ: Mapping[str, str] | None = None,
    edge: str = "127.0.0.1:0",
    environ_of_start: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Iterator[Mesh]:
    """A ready mesh; nothing of it is left afterwards.

    Args:
        data: its data folder; what an earlier mesh left there is found again.
        tree: the checkout whose code it runs.
        environ: all of its variables; ours by default.
        edge: HOST:PORT; give a port if it must stay the same over restarts.
        environ_of_start: further variables of the first start alone.
        options: of `tenfold up`, beside these.
    """
    mesh = Mesh(data, tree=tree, environ=environ, edge=edge, options=options)
    try:
        mesh.start(environ=environ_of_start)
        yield mesh
    finally:
        mesh.close()


@contextmanager
def running_program(program: Program, logs: Path) -> Iterator[None]:
    """One server, ready; it ends with the block, and with this process."""
    command = [sys.executable, "-I", "-S", str(WRAPPER), str(os.getpid()), program.user]
    command += program.argv
    with (logs / f"{program.name}.log").open("ab") as log:
        process = subprocess.Popen(command, env=dict(program.environment), stdout=log, stderr=log)
    try:
        poll_until(lambda: _is_ready(program, process), timeout_s=30, what=program.name)
        yield
    finally:
        process.send_signal(program.stop_signal)
        try:
            process.wait(program.stop_timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(program: Program, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, f"{program.name} ended with {process.returncode}"
    loop = asyncio.new_event_loop()  # Not the tests' loop, and never made the current one.
    try:
        return loop.run_until_complete(program.is_ready())
    finally:
        loop.close()
