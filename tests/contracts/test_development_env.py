"""`deploy/development.env` lists every setting that any process reads, and no other."""

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import binaries
from deploy.settings import SECRET_MARK, Setting, load_settings
from shared.config import ProcessConfig
from shared.crashpoints import CRASH_JOURNAL_VARIABLE, CRASH_POINT_VARIABLE
from shared.db.move.failpoints import FAILPOINT_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
# Read by the launcher and by crash points: no config class has them.
OTHERS = {
    binaries.NATS_SETTING,
    binaries.POSTGRES_SETTING,
    binaries.VALKEY_SETTING,
    CRASH_POINT_VARIABLE,
    CRASH_JOURNAL_VARIABLE,
    FAILPOINT_VARIABLE,
}


def config_classes() -> Iterator[tuple[str, type]]:
    """Prefix and class of every process's settings."""
    yield "TENFOLD_", ProcessConfig
    for file in [*(ROOT / "services").glob("*/config.py"), ROOT / "edge" / "config.py"]:
        package = file.parent.name
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        name = f"{package.capitalize()}Config"
        yield f"TENFOLD_{package.upper()}_", getattr(importlib.import_module(module), name)


def listed_default(entry: dataclasses.Field[object]) -> str:
    default = entry.default
    if default is dataclasses.MISSING:
        assert entry.default_factory is not dataclasses.MISSING, entry.name
        default = entry.default_factory()
    if default is None:
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def line_of(prefix: str, entry: dataclasses.Field[object]) -> Setting:
    """What the list must say; the marks "(up)" are the list's own."""
    comment = str(entry.metadata.get("help", ""))
    if unit := entry.metadata.get("unit"):
        comment += f" ({unit})"
    if entry.metadata.get("secret"):
        comment += f" {SECRET_MARK}"
    return Setting(prefix + entry.name.upper(), listed_default(entry), comment)


CODE = {
    setting.name: setting
    for prefix, config in config_classes()
    for setting in (line_of(prefix, entry) for entry in dataclasses.fields(config))
}


def test_the_list_names_what_is_read_and_nothing_else() -> None:
    listed = set(load_settings()) - OTHERS
    unlisted = [setting for name, setting in CODE.items() if name not in listed]
    missing = "\n".join(f"# {s.comment}\n{s.name}={s.default}" for s in unlisted)
    assert not missing, f"add to deploy/development.env:\n{missing}"
    assert not listed - set(CODE), "nothing reads these"


@pytest.mark.parametrize("name", sorted(CODE))
def test_the_list_gives_the_default_and_says_what_is_secret(name: str) -> None:
    listed, read = load_settings()[name], CODE[name]
    assert listed.default == read.default
    assert listed.is_secret == read.is_secret
    assert read.comment, f"{name} needs metadata 'help'"


def test_no_default_is_a_secret() -> None:
    shown = [s.name for s in load_settings().values() if s.is_secret and "@" in s.default]
    assert shown == []
