"""The mesh's data folder: private, locked by one launcher, with its keys and its state."""

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.local.errors import LaunchError
from deploy.local.processes import ProcessMark

LOCK_FILE = "lock"
STATE_FILE = "state.json"
SHAPE_FILE = "cluster.json"
# In a folder that `tenfold restore` has not finished; it writes LOCK_FILE last.
UNFINISHED_FILE = ".restoring"
ISSUERS = ("edge", "services")
SECRET_BYTES = 32
# A killed launcher's children end with it, but the kernel needs a moment to take them down.
ORPHANS_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ClusterShape:
    """A cluster's size, and what tells it from any other.

    Attributes:
        name: random. Databases may lie outside of the data folder; those of a cluster whose
            folder was removed are not taken for this one's.
        shards: Postgres servers.
        replicas: of each.
    """

    name: str
    shards: int
    replicas: int


class DataFolder:
    """Where everything of one mesh lives; open it with open_data_folder.

    Args:
        path: an absolute path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = path / "identity"
        self.secret = path / "secret"
        self.logs = path / "logs"
        self.nats = path / "nats"
        self.valkey = path / "valkey"
        self.mail = path / "mail"
        self.postgres = path / "postgres"
        self.admin_key = path / "admin.key"
        self.databases = path / "databases.json"

    def read_state(self) -> dict[str, Any]:
        """What the running or last launcher wrote; empty if there was none."""
        try:
            state = json.loads((self.path / STATE_FILE).read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace the state in one step: a reader sees the old one or the new one."""
        write_private(self.path / STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())

    def forget_state(self) -> None:
        """Nothing runs any more."""
        (self.path / STATE_FILE).unlink(missing_ok=True)

    def read_databases(self) -> dict[str, str]:
        """The services' database settings while a cluster runs here; empty if none does."""
        try:
            return dict(json.loads(self.databases.read_text()))
        except FileNotFoundError:
            return {}

    def read_cluster(self) -> "ClusterShape | None":
        """The cluster whose data is here; None if none was made.

        Raises:
            LaunchError: the file is damaged: to guess would lose sight of data.
        """
        path = self.path / SHAPE_FILE
        try:
            return ClusterShape(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise LaunchError(f"{path} cannot be read ({error}): restore it.") from error

    def write_cluster(self, shape: "ClusterShape") -> None:
        """Remember it: the next start must find all of it."""
        text = json.dumps(asdict(shape)) + "\n"
        write_private(self.path / SHAPE_FILE, text.encode())

    def require_shape(self, profile: str) -> None:
        """Refuse to serve beside another profile's data: it would seem to be lost.

        Raises:
            LaunchError: the folder is the other profile's.
        """
        if self.read_cluster():
            holder = "cluster"
        elif any(self.path.glob("services/*/shards/*.sqlite")):
            holder = "embedded"
        else:
            return
        if holder != profile:
            raise LaunchError(
                f"The folder {self.path} holds the data of the profile '{holder}': start that, "
                "or choose another folder with --data or TENFOLD_DATA."
            )

    def make_folders(self) -> None:
        """Create the private folders that children write into."""
        for folder in (self.identity, self.logs, self.nats, self.valkey, self.mail):
            folder.mkdir(mode=0o700, exist_ok=True)

    def make_keys(self) -> None:
        """Create the secret and each issuer's key pair, where they are missing."""
        if not self.secret.exists():
            write_private(self.secret, secrets.token_bytes(SECRET_BYTES))
        for issuer in ISSUERS:
            if not (self.identity / f"{issuer}.pub").exists():
                _write_key_pair(self.identity, issuer)


def launcher_of(state: Mapping[str, Any]) -> ProcessMark | None:
    """The launcher that wrote this state, or None."""
    return _mark_of(state.get("launcher"))


def children_of(state: Mapping[str, Any]) -> dict[str, ProcessMark]:
    """The children named in this state, by name."""
    children = state.get("children")
    if not isinstance(children, dict):
        return {}
    marks = {name: _mark_of(child) for name, child in children.items()}
    return {name: mark for name, mark in marks.items() if mark}


@contextmanager
def open_data_folder(path: Path) -> Iterator[DataFolder]:
    """Create or find the folder and hold it for this process alone.

    Raises:
        LaunchError: it cannot be written, holds something else, or another mesh uses it.
    """
    folder = DataFolder(path.absolute())
    lock = _open_lock(folder.path)
    try:
        _lock(lock, folder)
        _wait_for_orphans(folder)
        folder.path.chmod(0o700)
        folder.make_folders()
        yield folder
    finally:
        os.close(lock)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, in one step and durably."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _open_lock(path: Path) -> int:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (path / UNFINISHED_FILE).exists():
            raise LaunchError(
                f"A restore to {path} has not ended: wait for it, or remove the folder and "
                "restore again."
            )
        if not (path / LOCK_FILE).exists() and any(path.iterdir()):
            # Somebody's home, perhaps: we would close it to others and fill it with files.
            raise LaunchError(
                f"The folder {path} is not empty and holds no Tenfold data: "
                "choose another with --data or TENFOLD_DATA."
            )
        return os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LaunchError(
            f"The data folder {path} cannot be written ({error.strerror}): "
            "choose another with --data or TENFOLD_DATA."
        ) from error


def _lock(lock: int, folder: DataFolder) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        launcher = launcher_of(folder.read_state())
        which = f" (process {launcher.pid})" if launcher else ""
        raise LaunchError(
            f"The data folder {folder.path} is in use by another mesh{which}: stop it with "
            f"'tenfold down --data {folder.path}', or choose another folder with --data."
        ) from error


def _wait_for_orphans(folder: DataFolder) -> None:
    left: Sequence[ProcessMark] = list(children_of(folder.read_state()).values())
    deadline_s = time.monotonic() + ORPHANS_TIMEOUT_S
    while left := [child for child in left if child.is_alive]:
        if time.monotonic() > deadline_s:
            pids = ", ".join(str(child.pid) for child in left)
            raise LaunchError(f"Processes of an earlier mesh still use {folder.path}: {pids}.")
        time.sleep(0.02)


def _mark_of(entry: object) -> ProcessMark | None:
    if not isinstance(entry, dict) or not entry.get("pid"):
        return None
    return ProcessMark(int(entry["pid"]), int(entry.get("started", 0)))


def _write_key_pair(folder: Path, issuer: str) -> None:
    # Needed once in a data folder's life; loading it every time would cost the launcher 10 MB.
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_private(folder / f"{issuer}.pem", private)
    write_private(folder / f"{issuer}.pub", public)  # Last: its presence says that both are whole.
