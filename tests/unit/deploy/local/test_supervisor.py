"""The supervisor, with small stand-in programs as children."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local.address import Address
from deploy.local.errors import LaunchError
from deploy.local.processes import ProcessMark, mark
from deploy.local.program import Program
from deploy.local.supervisor import WRAPPER, Patience, open_supervisor, tail_of
from shared.signals import send_signal
from tests.mesh import ROOT, poll_until, wait_until_gone

ADDRESS = Address("127.0.0.1", 1)
WAIT_S = 20.0
# Touches its own ready file, then waits for SIGTERM, which it writes down.
OBEDIENT = """
    import pathlib, signal, sys, time
    folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
    def on_term(number, frame):
        with (folder / "stopped").open("a") as file:
            file.write(name + " ")
        sys.exit(0)
    signal.signal(signal.SIGTERM, on_term)
    (folder / (name + ".ready")).write_text("")
    while True:
        signal.pause()
"""
STUBBORN = OBEDIENT.replace("signal.signal(signal.SIGTERM, on_term)", "signal.signal(15, 1)")
REFUSING = "import sys; sys.exit('TENFOLD_X is wrong')"


def program(
    folder: Path, name: str, source: str = OBEDIENT, *, rank: int = 0, stop_timeout_s: float = 5
) -> Program:
    ready = folder / f"{name}.ready"

    async def is_ready() -> bool:
        return ready.exists()

    return Program(
        name=name,
        argv=[sys.executable, "-c", textwrap.dedent(source), str(folder), name],
        environment=os.environ,
        address=ADDRESS,
        is_ready=is_ready,
        stop_rank=rank,
        stop_timeout_s=stop_timeout_s,
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - another process changes it
            await asyncio.sleep(0.01)


async def test_children_are_stopped_in_the_order_of_their_rank(tmp_path: Path) -> None:
    async with open_supervisor(logs=tmp_path, say=print) as supervisor:
        ranks = {"third": 2, "first": 0, "second": 1}
        await supervisor.start(*(program(tmp_path, n, rank=r) for n, r in ranks.items()))
    assert (tmp_path / "stopped").read_text() == "first second third "


async def test_a_killed_child_is_started_again_and_the_operator_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    async with open_supervisor(logs=tmp_path, say=said.append) as supervisor:
        await supervisor.start(program(tmp_path, "child"))
        child = supervisor.children["child"]
        first = child.mark
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: child.restarts == 1 and child.is_ready)
        assert child.mark != first
    assert said == ["child ended (SIGKILL); starting it again in 0.1 s", "child is back"]


async def test_a_child_that_refuses_to_start_ends_the_start_with_its_own_words(
    tmp_path: Path,
) -> None:
    with pytest.raises(LaunchError, match="TENFOLD_X is wrong"):
        async with open_supervisor(logs=tmp_path, say=print) as supervisor:
            await supervisor.start(program(tmp_path, "child", REFUSING))


async def test_a_child_that_keeps_dying_ends_the_mesh_and_its_siblings(tmp_path: Path) -> None:
    patience = Patience(deaths_max=3, restart_first_s=0.01)
    siblings: list[ProcessMark] = []
    with pytest.raises(LaunchError, match=r"child ended .* 3 times in a minute"):
        async with open_supervisor(logs=tmp_path, say=print, patience=patience) as supervisor:
            await supervisor.start(program(tmp_path, "child"), program(tmp_path, "sibling"))
            sibling = supervisor.children["sibling"].mark
            assert sibling is not None
            siblings.append(sibling)
            async with asyncio.timeout(WAIT_S):
                while True:
                    child = supervisor.children["child"]
                    if child.process:
                        send_signal(child.process, signal.SIGKILL)
                    await asyncio.sleep(0.01)
    wait_until_gone(siblings, timeout_s=WAIT_S)


async def test_a_child_that_does_not_stop_is_killed_after_its_time(tmp_path: Path) -> None:
    said: list[str] = []
    async with open_supervisor(logs=tmp_path, say=said.append) as supervisor:
        await supervisor.start(program(tmp_path, "child", STUBBORN, stop_timeout_s=0.2))
        child = supervisor.children["child"].mark
    assert child is not None
    assert not child.is_alive
    assert said == ["child did not stop in time and was killed"]


async def test_killing_needs_no_patience(tmp_path: Path) -> None:
    async with open_supervisor(logs=tmp_path, say=print) as supervisor:
        await supervisor.start(program(tmp_path, "child", STUBBORN, stop_timeout_s=60))
        started_s = time.monotonic()
        supervisor.kill()
    assert time.monotonic() - started_s < 10


async def test_what_a_child_has_started_itself_ends_with_it(tmp_path: Path) -> None:
    source = OBEDIENT.replace(
        "signal.signal(",
        "import subprocess; n = subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(600)']); (folder / 'below').write_text(str(n.pid)); signal.signal(",
    )
    async with open_supervisor(logs=tmp_path, say=print) as supervisor:
        await supervisor.start(program(tmp_path, "child", source))
        below = mark(int((tmp_path / "below").read_text()))
        assert below.is_alive
    wait_until_gone([below], timeout_s=WAIT_S)


async def test_a_crash_point_kills_once_and_the_next_process_can_finish(tmp_path: Path) -> None:
    source = OBEDIENT.replace(
        "(folder / (name",
        "import os; 'TENFOLD_CRASH_POINT' in os.environ and os.kill(os.getpid(), 9)\n"
        "    (folder / (name",
    )
    armed = program(tmp_path, "child", source)
    environment = {**armed.environment, "TENFOLD_CRASH_POINT": "somewhere"}
    armed = Program(**{**vars(armed), "environment": environment})
    async with open_supervisor(logs=tmp_path, say=print) as supervisor:
        await supervisor.start(armed)
        assert supervisor.children["child"].restarts == 1


async def test_a_cancelled_run_stops_its_children(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_supervisor(logs=tmp_path, say=print) as supervisor:
            await supervisor.start(program(tmp_path, "child"))
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    await until((tmp_path / "child.ready").exists)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (tmp_path / "stopped").read_text() == "child "


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    wrapped = [sys.executable, "-I", "-S", str(WRAPPER), "{pid}", "-", sys.executable, "-c"]
    source = f"""
        import os, subprocess, sys, time
        command = {wrapped!r} + ["import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
        subprocess.Popen([c.format(pid=os.getpid()) for c in command])
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = mark(int(parent.stdout.readline()))
    assert child.is_alive
    parent.kill()
    parent.wait()
    wait_until_gone([child], timeout_s=WAIT_S)


def test_a_child_whose_parent_is_already_gone_does_not_start() -> None:
    not_the_parent = "1" if os.getpid() != 1 else "2"
    command = [sys.executable, "-I", "-S", str(WRAPPER), not_the_parent, "-", "/bin/echo", "here"]
    run = subprocess.run(command, capture_output=True, check=False, timeout=WAIT_S)
    assert (run.returncode, run.stdout) == (127, b"")


def test_a_missing_program_is_named() -> None:
    command = [sys.executable, "-I", "-S", str(WRAPPER), str(os.getpid()), "-", "/no/such"]
    run = subprocess.run(command, capture_output=True, check=False, timeout=WAIT_S)
    assert run.returncode == 127
    assert b"/no/such cannot be started: No such file" in run.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may change user")
def test_a_child_of_another_user_still_ends_with_its_parent() -> None:
    reader = "import ctypes, os; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n))"
    reader += "; print(os.getuid(), os.getgid(), os.getgroups(), n.value)"
    wrapper = [sys.executable, "-I", "-S", str(WRAPPER), str(os.getpid()), "65534:65534"]
    program = "/usr/bin/python3"  # one that everybody may run
    if not Path(program).exists():
        pytest.skip("no python that everybody may run")
    run = subprocess.run([*wrapper, program, "-c", reader], capture_output=True, check=True)
    assert run.stdout.decode().strip() == f"65534 65534 [] {int(signal.SIGKILL)}"


def test_the_supervisor_never_loads_grpc() -> None:
    source = "import sys, deploy.cli, deploy.local.embedded, deploy.local.report"
    source += "; sys.exit(', '.join(m for m in sys.modules if m.partition('.')[0] == 'grpc') or 0)"
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT, timeout=WAIT_S)


def test_the_tail_of_a_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {n}\n" for n in range(10_000)))
    assert tail_of(log)[-1] == "line 9999"
    assert len(tail_of(log)) == 12
    assert tail_of(tmp_path / "absent.log") == []


async def test_a_program_that_is_never_ready_is_named(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    slow: Callable[[], Awaitable[bool]] = never
    waiting = Program(**{**vars(program(tmp_path, "child")), "is_ready": slow})
    with pytest.raises(LaunchError, match="child is not ready after 0 s"):
        patience = Patience(ready_timeout_s=0.1)
        async with open_supervisor(logs=tmp_path, say=print, patience=patience) as supervisor:
            await supervisor.start(waiting)


def test_polling_names_what_did_not_come() -> None:
    with pytest.raises(AssertionError, match="the moon: not within 0"):
        poll_until(lambda: False, timeout_s=0, what="the moon")


async def test_what_is_started_in_a_dead_childs_place_is_asked_for(tmp_path: Path) -> None:
    other = program(tmp_path, "child", STUBBORN)
    asked = asyncio.Event()

    async def successor() -> Program:
        asked.set()
        return other

    async with open_supervisor(logs=tmp_path, say=print) as supervisor:
        await supervisor.start(replace(program(tmp_path, "child"), successor=successor))
        child = supervisor.children["child"]
        first = child.mark
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: child.mark != first and child.is_ready)
        assert asked.is_set()
        assert child.program is other
        supervisor.kill()


async def test_a_stop_does_not_wait_for_what_was_asked_for_or_runs_beside(tmp_path: Path) -> None:
    asked, ended = asyncio.Event(), []

    async def for_ever() -> Program:
        asked.set()
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            ended.append("asked for")

    async def beside() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("beside")

    async with open_supervisor(logs=tmp_path, say=print) as supervisor:
        await supervisor.start(replace(program(tmp_path, "child"), successor=for_ever))
        supervisor.run_beside(beside())
        mark = supervisor.children["child"].mark
        assert mark is not None
        os.kill(mark.pid, signal.SIGKILL)
        await asked.wait()
    assert sorted(ended) == ["asked for", "beside"]
