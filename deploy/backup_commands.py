"""tenfold backup and tenfold restore: a data folder of one moment, and one made from it."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import structlog
import typer

from deploy.backup.sizes import mebibytes
from deploy.local.errors import LaunchError
from deploy.settings import load_settings, value_of

if TYPE_CHECKING:  # Not needed, and so not loaded, by the other commands.
    from deploy.backup.restoring import Restored

DATA_SETTING = "TENFOLD_DATA"
DATABASE_SUFFIX = "_DATABASE"
SERVICES_FOLDER = Path(__file__).resolve().parents[1] / "services"
REPORT_S = 1.0

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def backup_command(
    *,
    to: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The backup: a new folder, outside the data.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help=f"The mesh's data folder. Default: {DATA_SETTING}, else .tenfold."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Back up a data folder, of one moment, while its mesh runs or not.

    All databases of all services are kept as they were at one moment, with every file that they
    know of, the keys, and the events and jobs that were under way. Writers wait for that moment,
    usually some milliseconds and never more than two seconds. Logs and caches are left out.

    \b
        tenfold backup --to /backup/tenfold-$(date +%F)
        tenfold restore /backup/tenfold-2026-11-26 --check
        tenfold restore /backup/tenfold-2026-11-26 --data /srv/restored
        tenfold up --data /srv/restored

    The backup holds the keys of the mesh and its users' data: it is private (mode 0700), and is
    not encrypted. Ctrl-C leaves nothing behind. Exit code 1: there is no backup, the sentence
    says why. Progress is written to standard error about once a second.
    """  # noqa: D301 - \b keeps the lines of the example
    from deploy.backup.saving import Order, save

    settings = load_settings()
    services = _services_of(settings)
    for service in services:
        variable = _variable_of(service)
        if value_of(variable, os.environ, settings):
            raise LaunchError(
                f"{service} keeps its data in Postgres ({variable}), which has backups of its "
                "own: see 'Back up and restore' in deploy/runbook.md."
            )
    folder = data or Path(value_of(DATA_SETTING, os.environ, settings))
    meter = _Meter(as_json=as_json)
    with _stoppable("There is no backup: you stopped it, and nothing was left behind."):
        saved = save(Order(folder, to, services, dict(os.environ)), meter)
    manifest = saved.manifest
    told = {
        "backup": str(to.absolute()),
        "cut_at": manifest.cut_at.isoformat(),
        "files": len(manifest.files),
        "bytes": manifest.size_bytes,
        "messages": saved.message_count,
        "writers_waited_ms": round(saved.held_s * 1000),
        "seconds": round(meter.seconds, 3),
    }
    if as_json:
        print(json.dumps(told))
        return
    print(
        f"{to.absolute()}: {len(manifest.files)} files, {mebibytes(manifest.size_bytes)}, as of "
        f"{manifest.cut_at:%Y-%m-%d %H:%M:%S.%f} UTC, in {meter.seconds:.1f} s; writers waited "
        f"{told['writers_waited_ms']} ms."
    )


def restore_command(
    backup: Annotated[
        Path, typer.Argument(metavar="FROM", help="A folder that 'tenfold backup' has made.")
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="The data folder to make: new, or empty."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only read and verify every file of the backup.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a data folder from a backup, and verify every file of it.

    A mesh started there goes on from the backup's moment: what was acknowledged before it is
    there, and events and jobs that were under way have their effect, once. What happened after
    it is gone; e-mails and webhooks that left after it may be sent again.

    \b
        tenfold restore /backup/tenfold-2026-11-26 --data /srv/restored
        tenfold up --data /srv/restored

    Never run the restored mesh beside the one it comes from, but to look at it: it has the same
    keys and sends the same e-mails. Ctrl-C leaves nothing behind. Exit code 1: nothing was
    restored, the sentence says why.
    """  # noqa: D301 - \b keeps the lines of the example
    from deploy.backup.restoring import restore, verify

    if check == (data is not None):
        raise LaunchError("Say what to do: either --data FOLDER, or --check.")
    migrations = {path.parent.name: path for path in SERVICES_FOLDER.glob("*/migrations")}
    meter = _Meter(as_json=as_json)
    with _stoppable("Nothing was restored: you stopped it, and nothing was left behind."):
        if data is None:
            restored = verify(backup, migrations, meter)
        else:
            restored = restore(backup, data, migrations, meter)
    _print_restored(backup, data, restored, meter)


def _print_restored(backup: Path, data: Path | None, restored: "Restored", meter: "_Meter") -> None:
    manifest = restored.manifest
    if meter.as_json:
        told = {
            "backup": str(backup.absolute()),
            "data": str(data.absolute()) if data else None,
            "cut_at": manifest.cut_at.isoformat(),
            "files": len(manifest.files),
            "bytes": manifest.size_bytes,
            "messages": restored.returned,
            "messages_left_out": restored.foreign,
            "seconds": round(meter.seconds, 3),
        }
        print(json.dumps(told))
        return
    what = f"{data.absolute()}: restored" if data else f"{backup.absolute()} is whole:"
    print(
        f"{what} {len(manifest.files)} files, {mebibytes(manifest.size_bytes)}, as of "
        f"{manifest.cut_at:%Y-%m-%d %H:%M:%S.%f} UTC, in {meter.seconds:.1f} s."
    )
    if restored.foreign:
        print(f"{restored.foreign} messages of no service here were left out.", file=sys.stderr)


class _Meter:
    """See Progress. A line now and then, on standard error."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._began_s = self._step_began_s = self._shown_at_s = time.monotonic()
        self._step, self._done_bytes, self._total_bytes = "", 0, 0

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began_s

    def begin(self, step: str, total_bytes: int = 0) -> None:
        """See Progress.begin."""
        self._step, self._done_bytes, self._total_bytes = step, 0, total_bytes
        self._step_began_s = time.monotonic()
        self._show()

    def add(self, done_bytes: int) -> None:
        """See Progress.add."""
        self._done_bytes += done_bytes
        self._show()

    def _show(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_at_s < REPORT_S:
            return
        self._shown_at_s = now_s
        left_s = self._left_s(now_s)
        if self.as_json:
            told = {"step": self._step, "bytes": self._done_bytes}
            told |= {"bytes_total": self._total_bytes, "left_s": left_s}
            print(json.dumps(told), file=sys.stderr, flush=True)
            return
        line = self._step
        if self._total_bytes:
            line += f", {mebibytes(self._done_bytes)} of {mebibytes(self._total_bytes)}"
        if left_s is not None:
            line += f", about {left_s:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    def _left_s(self, now_s: float) -> float | None:
        if not self._done_bytes or not self._total_bytes:
            return None
        left = max(0, self._total_bytes - self._done_bytes)
        return (now_s - self._step_began_s) * left / self._done_bytes


def _services_of(settings: object) -> list[str]:
    assert isinstance(settings, dict)
    return [
        name.removeprefix("TENFOLD_").removesuffix(DATABASE_SUFFIX).lower()
        for name in settings
        if name.endswith(DATABASE_SUFFIX)
    ]


def _variable_of(service: str) -> str:
    return f"TENFOLD_{service.upper()}{DATABASE_SUFFIX}"


@contextmanager
def _stoppable(sentence: str) -> Iterator[None]:
    """SIGTERM and a closed terminal stop as Ctrl-C does: what was begun is taken away."""
    # What the parts log would stand in the middle of what is printed.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise LaunchError(sentence) from None
