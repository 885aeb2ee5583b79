"""A process that lends its imports: each command is a fork that moves, and dies where it is told.

Commands and answers are lines of JSON. {"path", "bucket", "dst", "how", "failpoint"} forks a
mover and answers {"pid", "end"}: "stopped", "killed", or the name of what its run ended with;
{"continue": pid} wakes a stopped one up and answers with its end.
"""

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from shared.db.move.failpoints import FAILPOINT_VARIABLE, armed
from shared.db.move.mover import Pace, Tools
from shared.db.move.place import move_bucket, settle_move
from shared.db.move.port import MoveFailed, MoveLost
from shared.db.move.protocol import Phase
from tests.integration.shared.db.move.conftest import Place

PACE = Pace(
    lease_s=0.3,
    # Never: a process that is stopped while it renews would keep Control's file locked.
    renew_s=3600.0,
    page_rows=300,
    marks_max=300,
    backlog_max=400,
    pass_s_max=60.0,
    passes_max=50,
    grace_s=0.0,
)
# A write just before the marks are read, so that there is always one to carry over.
TOUCH = "UPDATE counter SET place = place WHERE place = 0"
ENDS = ["DONE", "ABORTED", "MoveFailed", "MoveLost", "refused or broken"]


def tools_of(place: Place) -> Tools:
    visit = armed(os.environ.get(FAILPOINT_VARIABLE, ""))

    def touch_and_visit(name: str) -> None:
        if name in {"copied", "precheck"}:
            for index in (0, 1):
                if place.states()[index] == "MOVING":
                    place.rows(index, TOUCH)
        visit(name)

    return Tools(pace=PACE, visit=touch_and_visit)


async def run(command: dict) -> Phase:
    place = Place(Path(command["path"]))
    tools, folder = tools_of(place), place.folder
    if command["how"] == "settle":
        [move] = await folder.control.list_moves(is_open=True)
        return await settle_move(folder, move, tools, preference="abort", is_forced=True)
    if command["how"] == "fail":
        # Its precheck finds too much waiting: it aborts by itself.
        tools = replace(tools, pace=replace(PACE, unsent_max=-1))
    return await move_bucket(folder, command["bucket"], command["dst"], tools)


def child(command: dict) -> str:
    os.environ[FAILPOINT_VARIABLE] = command["failpoint"]
    try:
        return str(asyncio.run(run(command)))
    except (MoveFailed, MoveLost) as error:
        return type(error).__name__
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        return ENDS[-1]


def end_of(pid: int) -> str:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return "stopped"
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else "another signal"
    return ENDS[os.WEXITSTATUS(status)]


def main() -> None:
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
