"""TLS from a client to a server: who is believed to be the server."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class ClientTls:
    """Encrypts calls to servers, and checks their names.

    Attributes:
        authorities: certificates in PEM that vouch for the servers; None for the public ones.
    """

    authorities: bytes | None = None

    @classmethod
    def of_file(cls, path: Path) -> "ClientTls":
        """Believe the authorities of a PEM file.

        Raises:
            OSError: it cannot be read.
            ValueError: it holds no certificate.
        """
        authorities = path.read_bytes()
        try:
            # An empty file would stand for the public ones.
            ssl.create_default_context(cadata=authorities.decode("latin-1") or " ")
        except ssl.SSLError as error:
            raise ValueError("it holds no certificate in PEM") from error
        return cls(authorities)

    def context(self) -> ssl.SSLContext:
        """For a connection of our own HTTP/2 (RFC 9113 §3.3: ALPN chooses it)."""
        data = None if self.authorities is None else self.authorities.decode("latin-1")
        context = ssl.create_default_context(cadata=data)
        context.set_alpn_protocols(["h2"])
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        """The same for a channel of grpc.aio."""
        return grpc.ssl_channel_credentials(root_certificates=self.authorities)
