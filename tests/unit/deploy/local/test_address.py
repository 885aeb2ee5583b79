"""Addresses: parsed, free, or refused in one sentence that names the setting."""

import socket

import pytest

from deploy.local.address import Address, free_addresses, require_free
from deploy.local.errors import LaunchError


@pytest.mark.parametrize("text", ["127.0.0.1:8080", "[::1]:9", "localhost:0"])
def test_an_address_reads_back_as_it_was_written(text: str) -> None:
    assert str(Address.parse(text, setting="x")) == text


@pytest.mark.parametrize("text", ["", "8080", ":8080", "host:", "host:x", "host:65536", "host:٣"])
def test_a_wrong_address_names_its_setting(text: str) -> None:
    with pytest.raises(LaunchError, match=r"^TENFOLD_X is '.*': it must be HOST:PORT"):
        Address.parse(text, setting="TENFOLD_X")


def test_a_taken_port_is_named_with_the_setting_that_changes_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = Address("127.0.0.1", server.getsockname()[1])
        with pytest.raises(LaunchError, match=rf"^Port {taken.port} .* taken.*--edge"):
            require_free(taken, setting="--edge")
    require_free(taken, setting="--edge")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"192\.0\.2\.1:8080 cannot be listened on"):
        require_free(Address("192.0.2.1", 8080), setting="--edge")


def test_free_addresses_differ() -> None:
    assert len(set(free_addresses(20))) == 20
