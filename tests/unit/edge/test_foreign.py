"""What is served of another's methods: deny by default."""

from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from edge.contracts import ContractError, Contracts
from edge.foreign import opened, require_upstreams
from edge.sources import FileSource
from shared.rpc.client import Upstreams
from shared.rpc.policy import Access
from tests.protos import compile_protos

HEAD = """
syntax = "proto3";
package t;
import "google/api/annotations.proto";
import "tenfold/options/v1/policy.proto";
message Q {}
"""
BOUND = 'option (google.api.http) = {get: "/%s"};'
POLICY = "option (tenfold.options.v1.method) = {%s};"


@pytest.fixture
def methods_of(tmp_path):
    """The methods of a service whose options are given by name."""

    def make(**options):
        methods = "".join(
            f"rpc {name}(Q) returns (Q) {{ {option} }}\n" for name, option in options.items()
        )
        (tmp_path / "t.proto").write_text(f"{HEAD} service S {{ {methods} }}")
        return list(Contracts(compile_protos(tmp_path, tmp_path)).methods())

    return make


@pytest.fixture
def methods(methods_of):
    return methods_of(
        Public=BOUND % "a" + POLICY % "access: ACCESS_PUBLIC",
        User=BOUND % "b" + POLICY % "access: ACCESS_USER",
        Admin=BOUND % "c" + POLICY % "access: ACCESS_ADMIN",
        Service=BOUND % "d" + POLICY % "access: ACCESS_SERVICE",
        Internal=BOUND % "e" + POLICY % "internal: true",
        Silent=BOUND % "f",
        Patient=BOUND % "g" + POLICY % "deadline_default: {seconds: 30}",
        Unbound="",
    )


def names(served):
    return [method.name for method in served.methods]


def test_only_what_the_contract_says_that_anybody_may_call(methods):
    served = opened(methods, allow_anonymous=False)
    assert names(served) == ["Public"]
    silent, guarded = served.left_out
    assert silent.startswith("2 methods without a word on who may call: --allow-anonymous")
    assert silent.endswith("(t.S/Silent, t.S/Patient)")
    assert guarded == (
        "2 methods that need a credential, which only a mesh can check (t.S/User, t.S/Admin)"
    )


def test_the_operator_may_open_what_says_nothing_and_the_rest_of_its_policy_stays(methods):
    served = opened(methods, allow_anonymous=True)
    assert names(served) == ["Public", "Silent", "Patient"]
    assert {method.policy.access for method in served.methods} == {Access.PUBLIC}
    assert served.methods[-1].policy.deadline_default_s == 30
    assert len(served.left_out) == 1


def test_a_sentence_names_a_few_methods_and_counts_the_rest(methods_of):
    many = {f"M{number}": BOUND % f"m{number}" for number in range(9)}
    with pytest.raises(ContractError, match=r"9 methods .*\(t\.S/M0, t\.S/M1, t\.S/M2, …\)"):
        opened(methods_of(**many), allow_anonymous=False)


@pytest.mark.parametrize("allow_anonymous", [True, False])
def test_contracts_without_any_http_rule_are_nothing_to_serve(methods_of, allow_anonymous):
    unbound = methods_of(A="", B=POLICY % "access: ACCESS_PUBLIC")
    with pytest.raises(ContractError, match=r"no method has a google\.api\.http rule"):
        opened(unbound, allow_anonymous=allow_anonymous)


def test_every_served_service_needs_a_server(methods):
    served = opened(methods, allow_anonymous=True).methods
    require_upstreams(served, Upstreams.parse("t=a:1"))
    with pytest.raises(ContractError, match=r"is given for t\.S$"):
        require_upstreams(served, Upstreams.parse("other=a:1"))


async def found(path: Path) -> Contracts:
    return Contracts((await FileSource(path).find()).file_set)


async def test_a_file_that_is_no_file_is_named(tmp_path):
    with pytest.raises(ContractError, match=f"^{tmp_path} cannot be read: Is a directory$"):
        await found(tmp_path)


async def test_sets_joined_with_cat_are_one_set(tmp_path, methods):
    image = tmp_path / "protos.binpb"
    image.write_bytes(2 * image.read_bytes())
    assert len(list((await found(image)).methods())) == len(methods)


async def test_two_different_files_of_one_name_are_refused(tmp_path, methods):
    image = tmp_path / "protos.binpb"
    other = FileDescriptorSet.FromString(image.read_bytes())
    other.file[-1].message_type.add(name="More")
    image.write_bytes(image.read_bytes() + other.SerializeToString())
    with pytest.raises(ContractError, match=r"two different files are named t\.proto"):
        await found(image)
