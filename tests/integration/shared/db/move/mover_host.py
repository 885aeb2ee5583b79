"""A process that lends its imports: each command is a fork that moves, and dies where it is told.

Commands and answers are lines of JSON. {"ground", "bucket", "dst", "how", "failpoint", "pace"}
forks a mover and answers {"pid", "end"}: "stopped", "killed", or what its run ended with;
{"continue": pid} wakes a stopped one up and answers with its end.
"""

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace
from typing import Any

from shared.db.errors import DatabaseRefused
from shared.db.move.failpoints import FAILPOINT_VARIABLE, armed
from shared.db.move.mover import Pace, Tools
from shared.db.move.place import move_bucket, settle_move
from shared.db.move.port import MoveFailed, MoveLost, MoveRefused
from shared.db.move.protocol import Phase
from tests.integration.shared.db.move.grounds import Ground, ground_of, states_of

PACE = Pace(
    lease_s=0.2,
    # Never: a process that is stopped while it renews would keep Control locked.
    renew_s=3600.0,
    page_rows=300,
    marks_max=300,
    backlog_max=400,
    pass_s_max=60.0,
    passes_max=50,
    grace_s=0.0,
    rest_share=0.0,
)
EXPECTED = (MoveFailed, MoveLost, MoveRefused, DatabaseRefused)
ENDS = ["DONE", "ABORTED", *(error.__name__ for error in EXPECTED), "broken"]


def tools_of(ground: Ground, command: dict[str, Any]) -> Tools:
    """A mover's tools; just before marks are read there is a write, so that there always are."""
    visit = armed(os.environ.get(FAILPOINT_VARIABLE, ""))

    def touch_and_visit(name: str) -> None:
        if name in {"copied", "precheck"}:
            for index, state in enumerate(states_of(ground, command["bucket"])):
                if state == "MOVING":
                    ground.touch(index, command["bucket"])
        visit(name)

    return Tools(pace=replace(PACE, **command.get("pace", {})), visit=touch_and_visit)


async def run(command: dict[str, Any]) -> Phase:
    """What a command asks for."""
    ground = ground_of(command["ground"])
    tools, place = tools_of(ground, command), ground.moves
    if command["how"] == "settle":
        for move in await place.control.list_moves(is_open=True):
            if move.bucket == command["bucket"]:
                return await settle_move(place, move, tools, preference="abort", is_forced=True)
        raise MoveRefused("it has been settled")
    if command["how"] == "fail":
        # Its precheck finds too much waiting: it aborts by itself.
        tools = replace(tools, pace=replace(tools.pace, unsent_max=-1))
    return await move_bucket(place, command["bucket"], command["dst"], tools)


def child(command: dict[str, Any]) -> str:
    """How a mover ends, if it does."""
    os.environ[FAILPOINT_VARIABLE] = command["failpoint"]
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what it logs is no answer
    try:
        return str(asyncio.run(run(command)))
    except EXPECTED as error:
        return type(error).__name__
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        return ENDS[-1]


def end_of(pid: int) -> str:
    """How a process has ended, or that it is stopped; waits for either."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return "stopped"
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else "another signal"
    return ENDS[os.WEXITSTATUS(status)]


def main() -> None:
    """Answer every command until the input ends."""
    stopped: set[int] = set()
    for line in sys.stdin:
        command = json.loads(line)
        if pid := command.get("continue"):
            os.kill(pid, signal.SIGCONT)
        else:
            pid = os.fork()
            if not pid:
                os._exit(ENDS.index(child(command)))
        end = end_of(pid)
        stopped = stopped | {pid} if end == "stopped" else stopped - {pid}
        print(json.dumps({"pid": pid, "end": end}), flush=True)
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
