"""The README's "edge in front of your own gRPC server", followed to the letter."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from deploy.local.address import free_addresses
from tests.mesh import ROOT, poll_until

TITLE = "## The edge in front of your own gRPC server, in two minutes"
FILE_BLOCK = re.compile(r"^```\w+ file=(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def section() -> str:
    """The text, with ports that are free here."""
    text = (ROOT / "README.md").read_text().split(TITLE, 1)[1].split("\n## ", 1)[0]
    server, edge = (str(address.port) for address in free_addresses(2))
    # The edge's default port is in no command: it is added, that meshes may run beside.
    text = text.replace("--allow-anonymous\n", f"--allow-anonymous --listen 127.0.0.1:{edge}\n")
    return text.replace("50051", server).replace("8080", edge)


@pytest.fixture(scope="module")
def terminals(section: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """All blocks but the last typed, each into a terminal of its own; the last is given."""
    folder = tmp_path_factory.mktemp("hello")
    for name, content in FILE_BLOCK.findall(section):
        (folder / name).write_text(content)
    *started, last = SHELL_BLOCK.findall(section)
    with ExitStack() as stack:
        for block in started:
            stack.enter_context(terminal(block, folder))
        yield last.split()


@contextmanager
def terminal(block: str, folder: Path) -> Iterator[None]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    typed = subprocess.Popen(["sh", "-ec", block], cwd=folder, env=environ, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(typed.pid, 9)
        typed.wait()


def test_the_last_command_gets_the_answer_that_the_text_promises(section, terminals) -> None:
    curl, url = terminals

    def ask() -> httpx.Response | None:
        try:
            answer = httpx.get(url, trust_env=False)
        except httpx.TransportError:
            return None
        return answer if answer.status_code == 200 else None

    answer = poll_until(ask, timeout_s=TIMEOUT_S, what=f"{curl} {url}")
    assert f"answers `{answer.text}`" in section
    [docs] = re.findall(r"`(http\S+/docs)`", section)
    assert "hello.v1" in httpx.get(docs, trust_env=False).text
