"""Environment -> frozen settings, read once at start; a wrong value is refused by name.

A config class is a frozen dataclass of str, int, float, bool and Path fields, or of one of these
or None, its default when nothing is set. The variable of a field is the prefix and the field's
name in capitals. Field metadata: "help" (one line), "unit",
"min" and "max", "choices", "secret" (never shown).
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

Config = TypeVar("Config")

TRUE_WORDS, FALSE_WORDS = (
    frozenset({"1", "true", "yes", "on"}),
    frozenset({"0", "false", "no", "off"}),
)
SECRET_BYTES_MIN = 32
# Here, since what reads the settings must not load gRPC yet.
RPC_ENGINES = ("grpcio", "native")
MASK = "********"


class ConfigError(Exception):
    """A setting is wrong or missing; the sentence names the variable and what is allowed."""


@dataclass(frozen=True)
class Setting:
    """One variable, as `tenfold config` shows it."""

    variable: str
    value: str
    help: str
    unit: str


def load(config_class: type[Config], prefix: str, environ: Mapping[str, str]) -> Config:
    """Read a config class from the environment.

    Args:
        config_class: a frozen dataclass as this module's docstring says.
        prefix: "TENFOLD_PAYMENT_".
        environ: usually os.environ; an empty value counts as not set.

    Raises:
        ConfigError: naming the variable, its value and what is allowed.
    """
    hints, values = get_type_hints(config_class), {}
    for entry in fields(config_class):  # type: ignore[arg-type]
        variable = prefix + entry.name.upper()
        text = environ.get(variable, "")
        if text:
            values[entry.name] = _parsed(variable, text, _without_none(hints[entry.name]), entry)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigError(f"{variable} is not set: {_help(entry)}.")
    return config_class(**values)


def settings(config: object, prefix: str) -> Iterator[Setting]:
    """The variables of a loaded config; secrets are masked."""
    for entry in fields(config):  # type: ignore[arg-type]
        given = getattr(config, entry.name)
        value = "" if given is None else str(given)
        shown = MASK if entry.metadata.get("secret") and value else value
        unit = str(entry.metadata.get("unit", ""))
        yield Setting(prefix + entry.name.upper(), shown, _help(entry), unit)


def _help(entry: "Field[Any]") -> str:
    return str(entry.metadata.get("help", entry.name.replace("_", " ")))


def _without_none(hint: object) -> object:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if kinds else hint


def _parsed(variable: str, text: str, kind: object, entry: "Field[Any]") -> object:
    value = _value(variable, text, kind, entry)
    choices = entry.metadata.get("choices")
    if choices and value not in choices:
        raise _wrong(variable, text, entry, f"one of {', '.join(map(str, choices))}")
    least, most = entry.metadata.get("min"), entry.metadata.get("max")
    if isinstance(value, int | float):
        if least is not None and value < least:
            raise _wrong(variable, text, entry, f"at least {least}")
        if most is not None and value > most:
            raise _wrong(variable, text, entry, f"at most {most}")
    return value


def _value(variable: str, text: str, kind: object, entry: "Field[Any]") -> object:
    if kind is str:
        return text
    if kind is Path:
        return Path(text)
    if kind is bool:
        if text.lower() in TRUE_WORDS | FALSE_WORDS:
            return text.lower() in TRUE_WORDS
        raise _wrong(variable, text, entry, "true or false")
    if kind is int or kind is float:
        try:
            number = int(text) if kind is int else float(text)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise _wrong(variable, text, entry, what) from error
        if number in {float("inf"), float("-inf")} or number != number:  # noqa: PLR0124  NaN
            raise _wrong(variable, text, entry, "a finite number")
        return number
    raise TypeError(f"{variable}: a setting cannot be of type {kind}")


def _wrong(variable: str, text: str, entry: "Field[Any]", allowed: str) -> ConfigError:
    shown = MASK if entry.metadata.get("secret") else repr(text)
    unit = entry.metadata.get("unit")
    return ConfigError(
        f"{variable}={shown} is not allowed: it must be {allowed}"
        f"{f' ({unit})' if unit else ''}; it is {_help(entry)}."
    )


@dataclass(frozen=True)
class ProcessConfig:
    """Settings of every process, from TENFOLD_…."""

    data: Path = field(
        default=Path(".tenfold"),
        metadata={"help": "the folder that holds everything of one mesh"},
    )
    listen: str = field(
        default="127.0.0.1:9090",
        metadata={"help": "HOST:PORT where the services serve gRPC; port 0 picks a free one"},
    )
    nats_url: str = field(
        default="nats://127.0.0.1:4222",
        metadata={"help": "one or more NATS servers, comma-separated", "secret": True},
    )
    nats_replicas: int = field(
        default=1,
        metadata={"help": "copies of each stream, 3 on a cluster of NATS", "min": 1, "max": 5},
    )
    valkey_url: str = field(
        default="redis://127.0.0.1:6379",
        metadata={"help": "the Valkey server", "secret": True},
    )
    quota_plans: str = field(
        default="",
        metadata={
            "help": "TOML file of quota plans; empty for the limits of the settings "
            "TENFOLD_EDGE_..._POINTS..."
        },
    )
    upstreams: str = field(
        default="",
        metadata={"help": "package=host:port,…: who serves what; empty for TENFOLD_LISTEN"},
    )
    identity_folder: str = field(
        default="",
        metadata={"help": "<issuer>.pub of all who are trusted, and our <issuer>.pem"},
    )
    identity_issuer: str = field(
        default="services", metadata={"help": "the name under which this process signs"}
    )
    secret_file: str = field(
        default="", metadata={"help": "a file of 32 or more random bytes that never change"}
    )
    log_level: str = field(
        default="info",
        metadata={
            "help": "what is logged at least",
            "choices": ("debug", "info", "warning", "error"),
        },
    )
    metrics_listen: str = field(
        default="",
        metadata={"help": "HOST:PORT of /metrics, never a public one; empty serves none"},
    )
    rpc_engine: str = field(
        default="grpcio", metadata={"help": "what serves gRPC", "choices": RPC_ENGINES}
    )
    rpc_calls_max: int = field(
        default=1000, metadata={"help": "unary calls at once", "unit": "calls", "min": 1}
    )
    rpc_connection_age_s: float | None = field(
        default=None,
        metadata={
            "help": "when clients are asked to connect anew, 0 for never; empty for what the"
            " engine does: grpcio after 300, native never",
            "unit": "s",
            "min": 0,
        },
    )
    rpc_reflection: bool = field(
        default=True, metadata={"help": "whether the server tells its contracts"}
    )
    stop_grace_s: float = field(
        default=8,
        metadata={"help": "how long running calls may take at a stop", "unit": "s", "min": 0},
    )

    @property
    def identity_path(self) -> Path:
        """The folder of identity keys."""
        return Path(self.identity_folder) if self.identity_folder else self.data / "identity"

    @property
    def secret_path(self) -> Path:
        """The file of the secret."""
        return Path(self.secret_file) if self.secret_file else self.data / "secret"


def read_secret(path: Path) -> bytes:
    """The bytes that key our MACs.

    Raises:
        ConfigError: the file is missing, unreadable or too short.
    """
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"TENFOLD_SECRET_FILE={path} cannot be read: {error.strerror}."
        ) from error
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigError(
            f"TENFOLD_SECRET_FILE={path} holds {len(secret)} bytes; it must hold at least"
            f" {SECRET_BYTES_MIN} random ones."
        )
    return secret


def read_trust(folder: Path) -> dict[str, bytes]:
    """The public key of each trusted issuer: every <issuer>.pub of the folder.

    Raises:
        ConfigError: there is none, or one cannot be read.
    """
    try:
        trust = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.pub"))}
    except OSError as error:
        raise ConfigError(
            f"TENFOLD_IDENTITY_FOLDER={folder} cannot be read: {error.strerror}."
        ) from error
    if not trust:
        raise ConfigError(f"TENFOLD_IDENTITY_FOLDER={folder} holds no <issuer>.pub.")
    return trust


def read_identity_key(folder: Path, issuer: str) -> bytes:
    """The private key of this process's issuer, as PEM.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / f"{issuer}.pem"
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"TENFOLD_IDENTITY_ISSUER={issuer}: its key {path} cannot be read: {error.strerror}."
        ) from error
