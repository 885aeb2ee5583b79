"""shared/config.py: wrong settings are refused by name."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shared.config import ConfigError, ProcessConfig, load, read_secret, read_trust, settings


@dataclass(frozen=True)
class Example:
    folder: Path
    size: int = field(default=5, metadata={"help": "how many", "unit": "rows", "min": 1, "max": 9})
    wait_s: float = 1.5
    is_on: bool = False
    level: str = field(default="info", metadata={"choices": ("info", "debug")})
    password: str = field(default="", metadata={"secret": True})


def loaded(**environ: str) -> Example:
    return load(Example, "X_", {"X_FOLDER": "/data", **environ})


def test_values_are_read_and_defaults_kept() -> None:
    config = loaded(X_SIZE="7", X_IS_ON="yes", X_WAIT_S="0.25")
    assert config == Example(Path("/data"), 7, 0.25, True)


def test_an_empty_value_counts_as_not_set() -> None:
    assert loaded(X_SIZE="").size == 5


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("X_SIZE", "many", "a whole number"),
        ("X_SIZE", "0", "at least 1"),
        ("X_SIZE", "10", "at most 9"),
        ("X_SIZE", "2.5", "a whole number"),
        ("X_WAIT_S", "nan", "a finite number"),
        ("X_WAIT_S", "soon", "a number"),
        ("X_IS_ON", "maybe", "true or false"),
        ("X_LEVEL", "loud", "one of info, debug"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_is_allowed(
    variable: str, value: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        loaded(**{variable: value})
    sentence = str(refusal.value)
    assert sentence.startswith(f"{variable}={value!r}")
    assert allowed in sentence
    assert "\n" not in sentence


def test_a_missing_value_without_default_is_named() -> None:
    with pytest.raises(ConfigError, match="X_FOLDER is not set"):
        load(Example, "X_", {})


def test_secrets_are_never_shown() -> None:
    shown = {setting.variable: setting.value for setting in settings(loaded(X_PASSWORD="p"), "X_")}
    assert shown["X_PASSWORD"] == "********"
    assert shown["X_SIZE"] == "5"


def test_a_process_needs_no_setting_at_all() -> None:
    config = load(ProcessConfig, "TENFOLD_", {})
    assert config.identity_path == Path(".tenfold/identity")
    assert config.secret_path == Path(".tenfold/secret")


def test_key_files_are_refused_by_the_variable_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TENFOLD_SECRET_FILE"):
        read_secret(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"x" * 31)
    with pytest.raises(ConfigError, match="holds 31 bytes"):
        read_secret(tmp_path / "short")
    with pytest.raises(ConfigError, match="TENFOLD_IDENTITY_FOLDER"):
        read_trust(tmp_path)
