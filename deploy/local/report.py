"""What the operator sees while the mesh starts, runs and stops."""

import sys
import time
from contextlib import suppress
from typing import Protocol


class Report(Protocol):
    """Tells the operator how far things are."""

    def step(self, text: str) -> None:
        """What is being done now."""
        ...

    def say(self, text: str) -> None:
        """One line to keep."""
        ...

    def done(self) -> None:
        """Nothing more is being done."""
        ...


class PlainReport:
    """See Report. One line per step, for logs and pipes."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()

    def step(self, text: str) -> None:
        """See Report.step."""
        self.say(f"{time.monotonic() - self._started_s:5.1f} s  {text}")

    def say(self, text: str) -> None:
        """See Report.say. A reader that has gone away stops nothing."""
        with suppress(BrokenPipeError):
            print(text, flush=True)

    def done(self) -> None:
        """See Report.done."""


class TerminalReport:
    """See Report. A spinner with the step, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console  # Half of the launcher's import time, if always loaded.

        self._console = Console(highlight=False)
        self._status = self._console.status("starting")

    def step(self, text: str) -> None:
        """See Report.step."""
        self._status.update(text)
        self._status.start()

    def say(self, text: str) -> None:
        """See Report.say."""
        self._console.print(text, markup=False)

    def done(self) -> None:
        """See Report.done."""
        self._status.stop()


def open_report() -> Report:
    """The report that fits where standard output goes."""
    return TerminalReport() if sys.stdout.isatty() else PlainReport()
