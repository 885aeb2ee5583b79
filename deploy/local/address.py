"""Where a program listens: parsed, free to take, or refused in one sentence."""

import errno
import secrets
import socket
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from deploy.local.errors import LaunchError

LOOPBACK = "127.0.0.1"
# Below the ports that Linux gives to outgoing connections: one of those would keep a program
# that died from coming back on its own port.
PORTS = range(20_000, 32_000)
PORT_TRIES_MAX = 1000


@dataclass(frozen=True)
class Address:
    """A host and a TCP port, 0 to 65535; port 0 means "any free one"."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, setting: str) -> "Address":
        """Read "HOST:PORT" or "[IPV6]:PORT".

        Raises:
            LaunchError: it is neither; the sentence names the setting.
        """
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise LaunchError(
                f"{setting} is '{text}': it must be HOST:PORT, such as 127.0.0.1:8080."
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        """What parse reads."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_ipv6(self) -> bool:
        """Whether the host is an IPv6 literal."""
        return ":" in self.host


def require_free(address: Address, *, setting: str) -> None:
    """Refuse an address that a program cannot listen on now.

    Raises:
        LaunchError: naming the port and the setting that changes it.
    """
    try:
        _bind(address).close()
    except OSError as error:
        raise LaunchError(_refusal(address, setting, error)) from error


def free_addresses(count: int, *, avoid: Collection[int] = ()) -> list[Address]:
    """Loopback addresses that nothing listens on, all different.

    Between this and the child's own bind another process may take one; the child then
    fails at its start and says so.

    Args:
        count: how many.
        avoid: ports that somebody is about to take.

    Raises:
        LaunchError: there are no free ports left.
    """
    found: list[Address] = []
    for _ in range(PORT_TRIES_MAX):
        address = Address(LOOPBACK, secrets.choice(PORTS))
        if len(found) == count:
            return found
        if address in found or address.port in avoid:
            continue
        with suppress(OSError):
            _bind(address).close()
            found.append(address)
    raise LaunchError("This machine has no free ports between 20000 and 32000.")


def _bind(address: Address) -> socket.socket:
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # As every server does: a connection that lingers in TIME_WAIT holds no port.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address.host, address.port))
    except BaseException:
        bound.close()
        raise
    return bound


def _refusal(address: Address, setting: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {address.port} on {address.host} is taken: "
            f"stop the program that holds it, or choose another with {setting}."
        )
    if error.errno == errno.EACCES:
        return (
            f"Port {address.port} needs more rights than we have: "
            f"choose one from 1024 with {setting}."
        )
    return f"{address} cannot be listened on ({error.strerror}): choose another with {setting}."
