"""The sockets that a process listens on."""

import socket

# Connections that the kernel may hold until we take them.
BACKLOG = 1024


class ListenError(Exception):
    """The address cannot be listened on; the message says why, in one sentence."""


def bind(address: str, *, setting: str, listens: bool = True) -> socket.socket:
    """A socket that listens, or is about to.

    Args:
        address: "127.0.0.1:8080" or "[::1]:0".
        setting: where the address came from, for the error.
        listens: whether connections may come already; else whoever takes them says so.

    Raises:
        ListenError: it is no address, or it is taken.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ListenError(f"{setting}={address!r} is not HOST:PORT.")
    host = host.strip("[]")
    # asyncio sets TCP_NODELAY only on sockets that are known to be TCP's.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        if listens:
            listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ListenError(f"{setting}={address}: cannot listen there: {reason}.") from error
    listener.setblocking(False)
    return listener
