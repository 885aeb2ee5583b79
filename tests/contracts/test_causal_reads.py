"""Which reads a replica may answer, as the contracts and the services' settings say it."""

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tenfold.options.v1 import policy_pb2

from services.auth.wiring import shard_settings as auth_settings
from services.payment.wiring import shard_settings as payment_settings
from shared.rpc.policy import Idempotency, contract_policies, load_policies

CAUSAL = [policy for policy in contract_policies().values() if policy.causal_reads]
MONEY = ("tenfold.payment.", "tenfold.ledger.")


def test_no_method_that_sees_money_or_credentials_reads_from_a_replica():
    packages = {policy.service.rpartition(".")[0] for policy in CAUSAL}
    assert packages == {"tenfold.media.v1", "tenfold.notification.v1", "tenfold.reporting.v1"}
    assert not any(policy.service.startswith(MONEY) for policy in CAUSAL)


@pytest.mark.parametrize("settings", [payment_settings, auth_settings], ids=["payment", "auth"])
def test_a_service_that_decides_about_money_or_access_opens_no_replica(settings, tmp_path):
    assert not settings(tmp_path, {}).causal_reads


@pytest.mark.parametrize("kind", [kind for kind in Idempotency if kind is not Idempotency.SAFE])
def test_a_method_that_may_change_data_cannot_be_marked(kind):
    files = FileDescriptorSet()
    method = files.file.add(package="a").service.add(name="S").method.add(name="M")
    options = method.options.Extensions[policy_pb2.method]
    options.causal_reads, options.idempotency = True, kind
    with pytest.raises(ValueError, match=r"/a\.S/M: causal_reads is for methods that are SAFE"):
        load_policies(files)
