"""`tenfold edge` in front of a stranger's server, both as processes of their own."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.mesh import poll_until
from tests.protos import ROOT, SITE_PACKAGES

STRANGER = Path(__file__).parent / "e2e" / "stranger"
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 20.0
COMMAND = [sys.executable, "-P", "-m", "deploy.cli", "edge"]
SERVING = re.compile(r"^edge: (http://\S+) serves .*$", re.MULTILINE)


@dataclass(frozen=True)
class Shop:
    """The stranger's contract, compiled as a stranger would.

    Attributes:
        stubs: the folder of its Python modules.
        image: its descriptor set.
    """

    stubs: Path
    image: Path

    @classmethod
    def compiled(cls, folder: Path) -> "Shop":
        """Compile it into a folder."""
        image = folder / "shop.binpb"
        outputs = [f"--python_out={folder}", f"--grpc_python_out={folder}"]
        outputs += [f"--descriptor_set_out={image}", "--include_imports", "--include_source_info"]
        arguments = [f"-I{STRANGER}", f"-I{SITE_PACKAGES}", *outputs, "shop.proto"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True)
        return cls(folder, image)

    @contextmanager
    def serving(self, port: int, *flags: str) -> Iterator[subprocess.Popen[str]]:
        """The stranger's server, ready; see its own docstring for the flags."""
        process = subprocess.Popen(
            [sys.executable, str(STRANGER / "server.py"), str(port), *flags],
            env={**os.environ, "PYTHONPATH": str(self.stubs)},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == str(port)
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@dataclass(frozen=True)
class Edge:
    """A running `tenfold edge`.

    Attributes:
        process: of it.
        log: what it has said, on both streams.
        client: of the URL that it has said; opened by `until_serving`.
    """

    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client

    @property
    def said(self) -> str:
        """What it has said, on both streams."""
        return self.log.read_text()

    def until_serving(self) -> None:
        """Return when it says where it serves."""

        def is_serving() -> bool:
            assert self.process.poll() is None, self.said
            return SERVING.search(self.said) is not None

        poll_until(is_serving, timeout_s=START_TIMEOUT_S, what="a serving edge")
        found = SERVING.search(self.said)
        assert found is not None
        self.client.base_url = httpx.URL(found.group(1))

    def until_said(self, text: str) -> None:
        """Return when it has said so."""
        poll_until(lambda: text in self.said, timeout_s=START_TIMEOUT_S, what=text)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        """Wait for its end."""
        return self.process.wait(END_TIMEOUT_S)


@contextmanager
def started_edge(
    folder: Path, *arguments: str, environ: Mapping[str, str] | None = None
) -> Iterator[Edge]:
    """`tenfold edge` just started; it ends with the block.

    Args:
        folder: where it runs and its output goes.
        arguments: of the command, but for --listen.
        environ: further variables.
    """
    log = folder / f"edge-{len(list(folder.glob('edge-*')))}.out"
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [*COMMAND, *arguments, "--listen", "127.0.0.1:0"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        client = stack.enter_context(httpx.Client(timeout=30, trust_env=False))
        yield Edge(process, log, client)


@contextmanager
def running_edge(
    folder: Path, *arguments: str, environ: Mapping[str, str] | None = None
) -> Iterator[Edge]:
    """See started_edge; it serves."""
    with started_edge(folder, *arguments, environ=environ) as edge:
        edge.until_serving()
        yield edge


def refusal(
    folder: Path, arguments: Sequence[str], *, environ: Mapping[str, str] | None = None
) -> str:
    """The one sentence with which `tenfold edge` ends, with exit code 1, before it listens."""
    with closing(socket.socket()) as taken:
        # It would say that the port is taken, had it tried to listen.
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = subprocess.run(
            [*COMMAND, *arguments, "--listen", address],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
    assert (ended.returncode, ended.stdout) == (1, ""), ended
    [sentence] = [line for line in ended.stderr.splitlines() if "does not answer yet" not in line]
    return sentence
