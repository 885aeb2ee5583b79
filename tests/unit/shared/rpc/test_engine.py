"""What an engine refuses before it starts."""

import sys

import grpc
import pytest

from shared.rpc.engine import EngineLimits, open_engine

ADDRESS = "127.0.0.1:0"


@pytest.fixture
def credentials() -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(b"key", b"chain")])


def refusal(address: str = ADDRESS, limits: EngineLimits | None = None) -> str:
    with pytest.raises(ValueError, match=r"^TENFOLD_RPC_ENGINE") as refused:
        open_engine("native", address, limits or EngineLimits())
    return str(refused.value)


def test_an_unknown_engine_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="TENFOLD_RPC_ENGINE='tonic' is not known"):
        open_engine("tonic", ADDRESS, EngineLimits())


def test_native_serves_no_tls(credentials: grpc.ServerCredentials) -> None:
    assert "cannot serve TLS: use grpcio" in refusal(limits=EngineLimits(tls=credentials))


def test_native_compresses_no_answers() -> None:
    assert "cannot compress answers: use grpcio" in refusal(limits=EngineLimits(compresses=True))


def test_native_ages_no_connections_and_says_which_setting_to_change() -> None:
    sentence = refusal(limits=EngineLimits(connection_age_s=300))
    assert "cannot age connections: use grpcio, or set TENFOLD_RPC_CONNECTION_AGE_S=0" in sentence


@pytest.mark.parametrize("age_s", [None, 0], ids=["by default", "when asked for none"])
def test_native_keeps_connections_for_ever(age_s: float | None) -> None:
    open_engine("native", ADDRESS, EngineLimits(connection_age_s=age_s))


@pytest.mark.parametrize(
    "address", ["0.0.0.0:9090", "[::]:9090", "192.0.2.1:9090", "services.example:9090", ":9090"]
)
def test_native_listens_to_no_other_machine(address: str) -> None:
    assert f"cannot listen on {address}, only on loopback" in refusal(address)


@pytest.mark.parametrize(
    "address", [ADDRESS, "127.9.9.9:1", "[::1]:0", "localhost:0", "unix:/run/tenfold.sock"]
)
def test_native_listens_to_this_machine(address: str) -> None:
    open_engine("native", address, EngineLimits())


def test_a_platform_without_the_wheel_is_told_to_use_grpcio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "shared.rpc.native", raising=False)
    monkeypatch.setitem(sys.modules, "pygrpc_native", None)
    sentence = refusal()
    assert "no wheel for this platform: use grpcio" in sentence
    assert "\n" not in sentence
