"""The user that drops root's rights, and the places that it can reach.

Postgres refuses to run as root. Started as root, a launcher gives its server another user;
what that user cannot reach, because a folder above it is closed to others, lives in
/var/lib/tenfold then.
"""

import hashlib
import os
import pwd
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from deploy.local.errors import LaunchError

REFUGE = Path("/var/lib/tenfold")
# The user that packages make for Postgres, else the one that owns nothing.
USER_NAMES = ("postgres", "nobody")


@dataclass(frozen=True)
class User:
    """Who a program runs as.

    Attributes:
        uid, gid: of an existing user.
    """

    uid: int
    gid: int

    def __str__(self) -> str:
        """As child.py reads it."""
        return f"{self.uid}:{self.gid}"

    def can_reach(self, path: Path) -> bool:
        """Whether every folder above lets this user through."""
        return all(self._may_enter(folder) for folder in path.absolute().parents)

    def _may_enter(self, folder: Path) -> bool:
        if not folder.exists():
            return True  # it will be made by us, open
        status = folder.stat()
        if status.st_uid == self.uid:
            return bool(status.st_mode & stat.S_IXUSR)
        if status.st_gid == self.gid:
            return bool(status.st_mode & stat.S_IXGRP)
        return bool(status.st_mode & stat.S_IXOTH)


def unprivileged_user() -> User | None:
    """Who to become; None if we are not root and stay who we are.

    Raises:
        LaunchError: we are root, and there is nobody else on this machine.
    """
    if os.geteuid() != 0:
        return None
    for name in USER_NAMES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return User(entry.pw_uid, entry.pw_gid)
    raise LaunchError(
        f"Postgres does not run as root, and this machine has no user {' or '.join(USER_NAMES)}: "
        "add one, or start as another user."
    )


def reachable_folder(folder: Path, user: User | None) -> Path:
    """The folder itself, or its stand-in below /var/lib/tenfold; made if missing.

    Args:
        folder: where it should be.
        user: who must be able to pass through it; None for us.
    """
    if user is None or user.can_reach(folder / "inside"):
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    stand_in = REFUGE / name
    stand_in.mkdir(mode=0o711, parents=True, exist_ok=True)
    return stand_in


def reachable_copy(folder: Path, user: User | None) -> Path:
    """A tree of programs that the user can run: itself, or a copy below /var/lib/tenfold.

    Args:
        folder: the root of the tree.
        user: who runs them; None for us.
    """
    if user is None or user.can_reach(folder / "inside"):
        return folder
    # Another version has another time of installation: it gets a copy of its own.
    identity = f"{folder.absolute()}\0{folder.stat().st_mtime_ns}"
    copy = REFUGE / f"programs-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not copy.exists():
        partial = REFUGE / f"{copy.name}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial, symlinks=True)
        partial.chmod(0o755)
        partial.replace(copy)
    return copy


def make_private_folder(folder: Path, user: User | None) -> None:
    """Make a folder that only its user may enter."""
    folder.mkdir(mode=0o700, exist_ok=True)
    give_to(folder, user)


def give_to(path: Path, user: User | None) -> None:
    """Make a file or folder the user's; None leaves it ours."""
    if user is not None:
        os.chown(path, user.uid, user.gid)
