"""What a process of services refuses at its start."""

import pytest

from services.__main__ import _server_of
from shared.config import ConfigError, ProcessConfig
from shared.identity import IdentityVerifier
from shared.telemetry.metrics import Metrics


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            ProcessConfig(rpc_engine="native", rpc_connection_age_s=300),
            "TENFOLD_RPC_ENGINE=native cannot age connections: use grpcio, or set"
            " TENFOLD_RPC_CONNECTION_AGE_S=0.",
        ),
        (
            ProcessConfig(rpc_engine="native", listen="0.0.0.0:9090"),
            "TENFOLD_RPC_ENGINE=native cannot listen on 0.0.0.0:9090, only on loopback, since it"
            " keeps a message of any size in memory before it refuses it: use grpcio.",
        ),
    ],
    ids=["connection age", "other machines"],
)
def test_what_the_native_engine_cannot_do_is_refused_in_one_sentence(
    config: ProcessConfig, sentence: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        _server_of(config, IdentityVerifier({}), Metrics())
    assert str(refusal.value) == sentence
