"""shared/spawner.py with real programs."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator

import pytest

from shared.errors import Unavailable
from shared.spawner import Limits, Spawner, SpawnError


@pytest.fixture
async def spawner() -> AsyncIterator[Spawner]:
    spawner = Spawner.start()
    yield spawner
    spawner.close()


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return not is_alive(pid)


async def test_a_program_gives_its_lines_and_its_exit_code(spawner: Spawner) -> None:
    async with spawner.run(
        ["/bin/sh", "-c", "echo one; echo two; echo bad >&2; exit 3"]
    ) as program:
        lines = [line async for line in program.stdout]
        assert lines == [b"one\n", b"two\n"]
        assert await program.stderr.read() == b"bad\n"
        assert await program.wait() == 3


async def test_leaving_the_block_kills_the_program_and_what_it_started(spawner: Spawner) -> None:
    script = "sleep 60 & echo $!; wait"
    async with spawner.run(["/bin/sh", "-c", script]) as program:
        child = int(await program.stdout.readline())
        pid = program.pid
        assert is_alive(pid) and is_alive(child)
    assert await gone(pid)
    assert await gone(child)


async def test_a_missing_program_is_refused(spawner: Spawner) -> None:
    with pytest.raises(SpawnError, match="no-such-program"):
        async with spawner.run(["/no-such-program"]):
            pass


async def test_a_program_beyond_its_file_limit_dies(spawner: Spawner, tmp_path) -> None:
    argv = ["/bin/sh", "-c", "head -c 100000 /dev/zero > big"]
    async with spawner.run(argv, cwd=tmp_path, limits=Limits(file_bytes=1000)) as program:
        assert await program.wait() != 0
    assert (tmp_path / "big").stat().st_size <= 1000


async def test_twenty_programs_run_at_once(spawner: Spawner) -> None:
    async def one(number: int) -> bytes:
        async with spawner.run(["/bin/sh", "-c", f"sleep 0.1; echo {number}"]) as program:
            return await program.stdout.read()

    outputs = await asyncio.gather(*(one(number) for number in range(20)))
    assert [int(output) for output in outputs] == list(range(20))


async def test_when_the_helper_is_killed_its_programs_end_and_the_caller_hears_it(
    spawner: Spawner,
) -> None:
    with pytest.raises(Unavailable):
        async with spawner.run(["/bin/sleep", "60"]) as program:
            pid = program.pid
            os.kill(spawner._helper.pid, signal.SIGKILL)
            await program.wait()
    assert await gone(pid)


async def test_when_the_caller_is_killed_nothing_is_left_behind() -> None:
    script = textwrap.dedent(
        """
        import asyncio
        from shared.spawner import Spawner
        async def main():
            async with spawner.run(["/bin/sleep", "60"]) as program:
                print(spawner._helper.pid, program.pid, flush=True)
                await program.wait()
        spawner = Spawner.start()
        asyncio.run(main())
        """
    )
    caller = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", script], stdout=subprocess.PIPE
    )
    try:
        assert caller.stdout is not None
        helper, program = (int(word) for word in caller.stdout.readline().split())
    finally:
        caller.kill()
        caller.wait(5)
        caller.stdout.close()
    assert await gone(helper)
    assert await gone(program)
