"""Every setting, as `development.env` lists them: name, default and one comment each."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.local.errors import LaunchError

LIST_FILE = Path(__file__).with_name("development.env")
PREFIX = "TENFOLD_"
SECRET_MARK = "(secret)"  # noqa: S105 - it marks one
MASK = "********"


@dataclass(frozen=True)
class Setting:
    """One variable that the mesh reads."""

    name: str
    default: str
    comment: str

    @property
    def is_secret(self) -> bool:
        """Whether its value must never be shown."""
        return SECRET_MARK in self.comment

    def shown(self, environ: Mapping[str, str]) -> str:
        """Its value as an operator may see it."""
        value = environ.get(self.name, self.default)
        return MASK if self.is_secret and value else value

    def source(self, environ: Mapping[str, str]) -> str:
        """Where its value comes from."""
        return "environment" if self.name in environ else "default"


def load_settings(path: Path = LIST_FILE) -> dict[str, Setting]:
    """Every setting by name, in the file's order.

    Raises:
        ValueError: a line is neither a comment nor NAME=value, or a setting has no comment.
    """
    settings: dict[str, Setting] = {}
    comment: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            comment.append(line[2:])
            continue
        if line and not line.startswith("#"):
            setting = _setting_of(line, " ".join(comment))
            settings[setting.name] = setting
        comment = []
    return settings


def require_known(environ: Mapping[str, str], settings: Mapping[str, Setting]) -> None:
    """Refuse a TENFOLD_ variable that nothing reads: a typing error would be ignored silently.

    Raises:
        LaunchError: naming the variable, and the one that was probably meant.
    """
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in settings:
            near = difflib.get_close_matches(name, settings, n=1, cutoff=0.6)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise LaunchError(f"There is no setting {name}.{hint} 'tenfold config' lists them all.")


def value_of(name: str, environ: Mapping[str, str], settings: Mapping[str, Setting]) -> str:
    """The variable's value, or the setting's default."""
    return environ.get(name, settings[name].default)


def _setting_of(line: str, comment: str) -> Setting:
    name, equals, default = line.partition("=")
    if not equals or not name.startswith(PREFIX) or not comment:
        raise ValueError(f"{line!r}: a setting is a comment line, then {PREFIX}NAME=default")
    return Setting(name, default, comment)
